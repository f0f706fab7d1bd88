"""Build or check latent caches: the same as `ldm cache` (ldm/cli/cache.py)."""

import sys

from ldm.cli.command import start

if __name__ == "__main__":
    start("cache", sys.argv[1:])
