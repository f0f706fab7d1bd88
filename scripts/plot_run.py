"""Draw a run's curves: the same as `ldm plot` (ldm/cli/plot.py)."""

import sys

from ldm.cli.command import start

if __name__ == "__main__":
    start("plot", sys.argv[1:])
