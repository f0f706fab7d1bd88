"""Put together running averages of other widths, from snapshots: the same as `ldm ema` (ldm/cli/ema.py)."""

import sys

from ldm.cli.command import start

if __name__ == "__main__":
    start("ema", sys.argv[1:])
