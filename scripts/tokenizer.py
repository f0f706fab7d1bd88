"""Make a tokenizer of the captions of a data set: the same as `ldm tokenizer` (ldm/cli/tokenizer.py)."""

import sys

from ldm.cli.command import start

if __name__ == "__main__":
    start("tokenizer", sys.argv[1:])
