"""Serve a page that makes pictures with trained diffusion models: the same as `ldm demo` (ldm/cli/demo.py)."""

import sys

from ldm.cli.command import start

if __name__ == "__main__":
    start("demo", sys.argv[1:])
