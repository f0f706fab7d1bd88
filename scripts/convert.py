"""Make a run folder of a foreign checkpoint: the same as `ldm convert` (ldm/cli/convert.py)."""

import sys

from ldm.cli.command import start

if __name__ == "__main__":
    start("convert", sys.argv[1:])
