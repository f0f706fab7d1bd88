"""Write a trained model as a folder that others load: the same as `ldm export` (ldm/cli/export.py)."""

import sys

from ldm.cli.command import start

if __name__ == "__main__":
    start("export", sys.argv[1:])
