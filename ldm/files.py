"""Files that are complete or absent: written under a temporary name in the same folder, then renamed."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def temporary(path: Path) -> Path:
    """The name beside `path` that this process writes to first; who cleans up finds such files by `.tmp.`."""
    return path.with_name(f"{path.name}.tmp.{socket.gethostname()}.{os.getpid()}")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name to write to within the block; afterwards `path` is complete, or unchanged if the block failed.

    Not synced to disk: for files that can be recreated.
    """
    aside = temporary(path)
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def expanded(value: Any) -> Any:
    """`~`, `~/...` and `~user/...` with the home folder written out; everything else as it is."""
    return os.path.expanduser(value) if isinstance(value, str) else value
