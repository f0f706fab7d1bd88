"""How the files of a latent cache are written: sealed JSON, publishing by rename, claims that die with their owner."""

import errno
import fcntl
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm import files
from ldm.errors import DataError, ResourceError

COMMAND = "python scripts/cache_latents.py --base <your config>"
REBUILD = f"`{COMMAND}` builds what is missing and keeps the rest"


def dump(tree: Mapping[str, Any]) -> bytes:
    """The one way to write `tree` as JSON, so that equal content means equal bytes.

    A file name need not be UTF-8: Python represents its invalid bytes as lone surrogates, written as JSON escapes.
    """
    text = json.dumps(tree, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode(errors="backslashreplace")


def seal(tree: Mapping[str, Any]) -> bytes:
    """JSON that carries the CRC-32 of the rest under "checksum"."""
    return dump({**tree, "checksum": f"{zlib.crc32(dump(tree)):08x}"})


def read_sealed(path: Path) -> dict[str, Any]:
    """What `seal` wrote; DataError if any byte has changed."""
    try:
        raw = path.read_bytes()
        tree = json.loads(raw)
        checksum = tree.pop("checksum")
    except FileNotFoundError:
        raise DataError(f"{path}: missing from the latent cache. {REBUILD}.") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: damaged: not the JSON that was written ({error}). Delete it; {REBUILD}.") from error
    if seal(tree) != raw:
        found = f"{zlib.crc32(dump(tree)):08x}"
        raise DataError(f"{path}: damaged: checksum: expected {checksum}, found {found}. Delete it; {REBUILD}.")
    return tree


def publish(path: Path, data: bytes | memoryview) -> None:
    """Put `data` at `path`: durable, and never half there. ResourceError where the disk refuses."""
    try:
        with files.published(path) as aside:
            aside.write_bytes(data)
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot write the latent cache: {error.strerror}; needed {memoryview(data).nbytes} bytes. "
            f"Make room or permit writing in {path.parent}; another start continues from here."
        ) from error


class Claims:
    """Who writes what, among all processes on all machines that see the folder.

    A claim is a lock on one byte of the file `claims`; the kernel drops it when its owner dies, however it dies.
    If the file system has no locks, every claim is granted: work is then done twice, with the same bytes.

    Args:
        folder: where the work is shared; made if it is missing.
        what: is built there, for messages.

    Close it only when this process needs none of its claims any more: POSIX locks end with the first close of the file.
    """

    _NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)

    def __init__(self, folder: Path, what: str = "a latent cache") -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / "claims").open("ab")
        except OSError as error:
            raise ResourceError(f"{folder}: cannot build {what} there: {error.strerror}.") from error

    def close(self) -> None:
        self._file.close()

    @contextmanager
    def take(self, number: int, path: Path, wait: bool = False) -> Iterator[bool]:
        """Yields whether the block may write `path` and its siblings; leftovers of a dead writer are removed first.

        Args:
            number: of the claim.
            path: the file written under the claim.
            wait: wait for the present owner; otherwise the block runs at once, with False.
        """
        exclusive = True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
        except (BlockingIOError, PermissionError):
            yield False
            return
        except OSError as error:
            if error.errno not in self._NO_LOCKS:
                raise
            exclusive = False
        try:
            if exclusive:
                for leftover in path.parent.glob(f"{path.stem}.*.tmp.*"):
                    leftover.unlink(missing_ok=True)
            yield True
        finally:
            if exclusive:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)
