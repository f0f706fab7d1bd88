"""Make pictures with a trained diffusion model: the same as `ldm sample` (ldm/cli/sample.py)."""

import sys

from ldm.cli.command import start

if __name__ == "__main__":
    start("sample", sys.argv[1:])
