"""Measure samples, reconstructions or any pictures: the same as `ldm evaluate` (ldm/cli/evaluate.py)."""

import sys

from ldm.cli.command import start

if __name__ == "__main__":
    start("evaluate", sys.argv[1:])
