"""Measure ldm, and print Markdown tables.

python scripts/bench steps       # our training steps beside diffusers' networks in the usual loop
python scripts/bench quality     # FashionMNIST: train both stages, sample, and let a classifier judge
python scripts/bench quality --autoencoder logs/<run> --diffusion logs/<run> --guidance 1 2 4
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
from ldm.cli.options import Parser, finite, path, split_overrides, whole_number
from scripts.bench.healthy import healthy
from scripts.bench.quality import quality
from scripts.bench.steps import steps

EPILOG = "With `quality`, words of the form key=value override the configuration of both stages."


def parse(argv: Sequence[str]) -> Any:
    parser = Parser(prog="bench", description="Measure ldm.", epilog=EPILOG, allow_abbrev=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("what", choices=["steps", "quality", "healthy"])
    add = parser.add_argument_group("steps and quality").add_argument
    add("--device", default=device, help="such as cuda or cpu (default: cuda where there is one)")
    add = parser.add_argument_group("quality and healthy").add_argument
    add("--logdir", type=path, default=Path("logs"), help="where runs are made (default: logs)")
    add = parser.add_argument_group("steps").add_argument
    add("--tiny", action="store_true", help="the smallest networks: to see that it runs")
    add("--repeats", type=whole_number, default=9, help="steps timed of each kind (default: 9)")
    add = parser.add_argument_group("quality").add_argument
    add("--autoencoder", type=path, metavar="RUN", help="a trained first stage (default: train it)")
    add("--diffusion", type=path, metavar="RUN", help="a trained second stage (default: train it)")
    add("--number", type=whole_number, default=100, help="images a class (default: 100)")
    add("--guidance", type=finite, nargs="+", default=[2.0], help="scales to sample with (default: 2)")
    add("--steps", type=whole_number, default=30, help="DDIM steps (default: 30)")
    add("--epochs", type=whole_number, default=4, help="of the classifier (default: 4)")
    add("--out", type=path, help="folder for quality.json and pictures.png (default: <diffusion run>/quality)")
    overrides, words = split_overrides(argv)
    options = parser.parse_strictly(words)
    options.overrides = overrides
    return options


def main(argv: Sequence[str]) -> int:
    """Returns the exit code (ldm/errors.py)."""

    def work() -> None:
        options = parse(argv)
        print({"steps": steps, "quality": quality, "healthy": healthy}[options.what](options))

    return program.answer(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
