"""Measure ldm, and print Markdown tables.

python scripts/bench stage1 --compvis DIR --taming DIR            # a step of the autoencoder beside others'
python scripts/bench stage2 --compvis DIR                         # a step of the UNet on the cache
python scripts/bench dit --dit DIR --sit DIR --lightningdit DIR   # a step of DiT-S/2
python scripts/bench sampling                                     # pictures, beside a pipeline of diffusers
python scripts/bench choices                                      # other optimizers, averages, checkpointing
python scripts/bench roofline                                     # the share of arithmetic, and how near its best
python scripts/bench scale       # what 1 to 512 devices, and up to a billion pictures, would cost: a model, with inputs
python scripts/bench ranks       # two processes: what they send, a step, what they hold; beside the forms of `scale`
python scripts/bench quality     # FashionMNIST: train both stages, sample, and let a classifier judge
python scripts/bench quality --autoencoder logs/<run> --diffusion logs/<run> --guidance 1 2 4
python scripts/bench race --compvis DIR   # FashionMNIST: how soon ldm and others reach the same quality
python scripts/bench healthy     # the runs and pictures of docs/healthy.md
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # in place of this folder: its files are scripts.bench.*
    from ldm.runtime import threads

    threads.prepare()  # before torch is imported

import torch

from ldm.cli import program
from ldm.cli.options import Parser, finite, path, positive, split_overrides, whole_number
from ldm.errors import ConfigError
from scripts.bench.healthy import healthy
from scripts.bench.quality import quality
from scripts.bench.race import race
from scripts.bench.ranks import ranks
from scripts.bench.roofline import roofline
from scripts.bench.scale import add_options, scale
from scripts.bench.steps import choices, dit, sampling, stage1, stage2

TABLES = {
    "stage1": stage1,
    "stage2": stage2,
    "dit": dit,
    "sampling": sampling,
    "choices": choices,
    "roofline": roofline,
    "scale": scale,
    "ranks": ranks,
    "quality": quality,
    "race": race,
    "healthy": healthy,
}
PEERS = {
    "compvis": "CompVis/latent-diffusion",
    "taming": "CompVis/taming-transformers, which its stage 1 needs",
    "dit": "facebookresearch/DiT",
    "sit": "willisma/SiT",
    "lightningdit": "hustvl/LightningDiT",
}
EPILOG = "With `quality` and `race`, words of the form key=value override the configuration of both stages."


def parse(argv: Sequence[str]) -> Any:
    parser = Parser(prog="bench", description="Measure ldm.", epilog=EPILOG, allow_abbrev=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("what", choices=[*TABLES])
    add = parser.add_argument_group("all but healthy and ranks").add_argument
    add("--device", default=device, help="such as cuda or cpu (default: cuda where there is one)")
    add = parser.add_argument_group("quality, race and healthy").add_argument
    add("--logdir", type=path, default=Path("logs"), help="where runs are made (default: logs)")
    add = parser.add_argument_group("all but quality, race and healthy").add_argument
    add("--tiny", action="store_true", help="the smallest networks: to see that it runs")
    add("--repeats", type=whole_number, default=9, help="steps timed of each kind (default: 9)")
    add = parser.add_argument_group(
        "stage1, stage2, dit and race: folders of others' code, which is left out otherwise"
    ).add_argument
    for name, repository in PEERS.items():
        add(f"--{name}", type=path, metavar="DIR", help=repository)
    add_options(parser.add_argument_group("scale").add_argument)
    add = parser.add_argument_group("race").add_argument
    more = "train others for so many times as long as ldm, and judge them at each (default: 1 2 4)"
    add("--times", type=positive, nargs="+", default=[1.0, 2.0, 4.0], help=more)
    add = parser.add_argument_group("quality").add_argument
    add("--autoencoder", type=path, metavar="RUN", help="a trained first stage (default: train it)")
    add("--diffusion", type=path, metavar="RUN", help="a trained second stage (default: train it)")
    add("--guidance", type=finite, nargs="+", default=[2.0], help="scales to sample with (default: 2)")
    add = parser.add_argument_group("quality and race").add_argument
    add("--number", type=whole_number, default=100, help="images a class (default: 100)")
    add("--steps", type=whole_number, default=30, help="DDIM steps (default: 30)")
    add("--epochs", type=whole_number, default=4, help="of the classifier (default: 4)")
    add(
        "--out",
        type=path,
        help="folder of what is written (default: logs/bench; quality: <diffusion run>/quality; race: logs/race)",
    )
    overrides, words = split_overrides(argv)
    options = parser.parse_strictly(words)
    options.overrides = overrides
    if options.out is None and options.what != "quality":
        options.out = Path("logs", "race" if options.what == "race" else "bench")
    return options


def check(options: Any) -> None:
    """Raises ConfigError if the code of others is not where it is said to be."""
    for name, repository in PEERS.items():
        folder = getattr(options, name)
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"--{name}: expected a folder with the code of {repository}, found none at {folder}")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code (ldm/errors.py)."""

    def work() -> None:
        options = parse(argv)
        check(options)
        print(TABLES[options.what](options))

    return program.answer(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
