"""Open files that are read at any place: a bounded number of handles, and locks that die with their owner."""

import errno
import fcntl
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ldm.ranges import Count, CountOrZero

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


class Handle:
    """An open file, closed when nobody refers to it any more; reading moves no position, so a fork may share it."""

    def __init__(self, path: Path, flags: CountOrZero = os.O_RDONLY) -> None:
        self.number = -1
        self.number = os.open(path, flags | os.O_CLOEXEC, 0o666)

    def close(self) -> None:
        """Give up the file and its locks; closing twice is harmless."""
        number, self.number = self.number, -1
        if number >= 0:
            os.close(number)

    __del__ = close

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes, or fewer where the file ends."""
        found = os.pread(self.number, length, offset)
        while len(found) < length and (more := os.pread(self.number, length - len(found), offset + len(found))):
            found += more  # one call reads 2 GiB at most, and less from some network disks
        return found

    def lock(self, kind: int) -> bool:
        """Take a lock of `fcntl.flock`; False: another holds it. A file system without locks grants every one."""
        try:
            fcntl.flock(self.number, kind)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        return True


class Handles:
    """The most recently used open files of this process.

    Args:
        limit: how many are open at most.
    """

    def __init__(self, limit: Count = 32) -> None:
        self._limit = limit
        self._open: OrderedDict[Path, Handle] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_limit": self._limit, "_open": OrderedDict()}

    def get(self, path: Path) -> Handle | None:
        """The handle that is open for `path`, if there is one."""
        if (handle := self._open.get(path)) is not None:
            with suppress(KeyError):  # another thread may just have dropped it
                self._open.move_to_end(path)
        return handle

    def put(self, path: Path, handle: Handle) -> Handle:
        """Keep `handle`, and drop the one that was used longest ago."""
        self._open[path] = handle
        while len(self._open) > self._limit:
            self._open.popitem(last=False)
        return handle

    def drop(self, path: Path) -> None:
        """Forget a file, which is then closed."""
        self._open.pop(path, None)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Yields whether this process alone is in the block, among all that name the same file, which is made and stays.

    Args:
        path: of the lock file.
        wait: wait for the present owner; otherwise the block runs at once, with False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = Handle(path, os.O_RDWR | os.O_CREAT)
    try:
        yield handle.lock(fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    finally:
        handle.close()
