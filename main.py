"""Train an autoencoder or a diffusion model on its latents: the same as `ldm train` (ldm/cli/train.py)."""

import sys

from ldm.cli.command import start
from ldm.cli.train import main

__all__ = ["main"]

if __name__ == "__main__":
    start("train", sys.argv[1:])
