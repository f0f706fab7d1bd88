"""The command `ldm`, and how it and the files beside main.py start a program.

ldm train --base configs/quickstart/autoencoder.yaml
ldm sample -r logs/<run> --guidance 2
"""

import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

from ldm.runtime import imports, threads

COMMANDS = {
    "train": ("train an autoencoder or a diffusion model", "ldm train --base configs/quickstart/autoencoder.yaml"),
    "tokenizer": (
        "make a tokenizer of captions",
        "ldm tokenizer --base my.yaml --vocab 4000 --out tokenizer.json",
    ),
    "cache": ("build or check latent caches", "ldm cache --base configs/quickstart/diffusion.yaml"),
    "sample": ("sample images from a trained model", "ldm sample -r 'logs/*_emoji_diffusion' --guidance 3"),
    "demo": ("make images on a page in the browser", "ldm demo -r 'logs/*_emoji_diffusion'"),
    "evaluate": ("measure samples, reconstructions or pictures", "ldm evaluate -r 'logs/*_emoji_diffusion' -n 5000"),
    "ema": ("reconstruct running averages of other widths", "ldm ema -r logs/<run> --std 0.075"),
    "weights": ("list the trained weights that ldm can use, or bring them", "ldm weights --fetch lpips-alexnet"),
    "convert": ("make a run folder of a foreign checkpoint", "ldm convert sd-vae-ft-mse.safetensors"),
    "export": ("write a model for other programs", "ldm export logs/<run> --to safetensors --out FOLDER"),
    "plot": ("draw a run's curves", "ldm plot logs/<run>"),
}
"""{name of the program in ldm/cli: (what it does, an example)}."""


def start(name: str, words: Sequence[str]) -> NoReturn:
    """Run the program ldm/cli/<name>.py with these arguments, and exit with its code."""
    threads.prepare()  # before torch is imported, which some programs do at once
    imports.prepare()
    from ldm.cli import program

    with imports.uncollected():
        main = importlib.import_module(f"ldm.cli.{name}").main
    program.run(lambda: main(words))


def ldm() -> NoReturn:
    """The command line of `ldm`: the name of a program, then that program's own arguments."""
    name, words = sys.argv[1] if len(sys.argv) > 1 else "--help", sys.argv[2:]
    if name in COMMANDS:
        start(name, words)
    if name in ("-h", "--help"):
        print(usage())
        sys.exit(0)
    near = get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}."
    print(f"error: unknown command {name!r}: {hint}\nSee `ldm --help`.", file=sys.stderr)
    sys.exit(2)


def usage() -> str:
    """What `ldm --help` prints."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{does}\n  {'':<{width}}{example}" for name, (does, example) in COMMANDS.items()]
    return "usage: ldm COMMAND ...\n\n" + "\n".join(lines) + "\n\n`ldm COMMAND --help` describes each."
