"""List or bring trained weights: the same as `ldm weights` (ldm/cli/weights.py)."""

import sys

from ldm.cli.command import start

if __name__ == "__main__":
    start("weights", sys.argv[1:])
