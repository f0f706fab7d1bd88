"""Hashes of large files' contents, remembered while the files are unchanged, so that a start need not load them again.

They lie in `cache/.contents/`, together with each file's name, size, times and inode, as git does in its index; the
folder may be deleted. Times decide only what is read, never the result.
"""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ldm import files

_FOLDER = Path("cache") / ".contents"
# A file that changes twice within one tick of the file system's clock looks unchanged, so recent ones are not trusted.
_SETTLED = 2_000_000_000


def remembered(folder: Path, kind: str, compute: Callable[[], str]) -> str:
    """`compute()`, or what it was when all files of the folder (not of its subfolders) were what they are now.

    Args:
        folder: with the files.
        kind: what is made of them.
        compute: makes it of their contents alone.
    """
    begun, state = time.time_ns(), _state(folder)
    name = blake2b(f"{os.path.realpath(folder)} {kind}".encode(errors="surrogateescape"), digest_size=16).hexdigest()
    path = _FOLDER / f"{name}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(path.read_text())
        if known["state"] == state:
            return str(known["found"])
    found = compute()
    if state and max(max(times) for _, _, times, _ in state) < begun - _SETTLED:
        with suppress(OSError):  # best effort: without it the files are read again
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(path, json.dumps({"state": state, "found": found}))
    return found


def _state(folder: Path) -> list[list[Any]]:
    """[name, size, times of change (ns), inode] of each file, links followed."""
    entries = sorted((entry for entry in os.scandir(folder) if entry.is_file()), key=lambda entry: entry.name)
    stats = [(ascii(entry.name), entry.stat()) for entry in entries]
    return [[name, found.st_size, [found.st_mtime_ns, found.st_ctime_ns], found.st_ino] for name, found in stats]
