"""Memory that is freed stays with the process, for the next tensor, where glibc's allocator would give it back.

By default glibc asks the system for each larger tensor and returns it when it is freed, and the system clears every
page anew: a tenth of the time of an autoencoder's step.
"""

import ctypes
import os
import sys
from contextlib import suppress

# From glibc's malloc.h. The threshold of mmap may be 32 MB at most: larger tensors are asked for as before.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_")
_SETTINGS = {_TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 * 2**20, _MMAP_THRESHOLD: 32 * 2**20}


def keep_freed_memory() -> None:
    """Nothing where the environment sets glibc's allocator, nor with another allocator or system."""
    if sys.platform != "linux":
        return
    if any(name in os.environ for name in _OWN) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    with suppress(AttributeError, OSError):  # musl instead of glibc
        set_option = ctypes.CDLL(None).mallopt
        for option, value in _SETTINGS.items():
            set_option(option, value)
