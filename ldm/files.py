"""Files that are complete or absent: written under a temporary name in the same folder, then renamed."""

import os
import socket
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ldm.errors import ResourceError

DAMAGED_NPZ = (
    *(OSError, EOFError, ValueError, TypeError, AttributeError, RuntimeError),  # RuntimeError: encrypted
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)
"""What zipfile and numpy raise while they read a damaged `.npz`."""

_CHUNK = 1 << 22  # bytes that are read at once


def temporary(path: Path) -> Path:
    """The name beside `path` that this process writes to first; who cleans up finds such files by `.tmp.`."""
    return path.with_name(f"{path.name}.tmp.{socket.gethostname()}.{os.getpid()}")


@contextmanager
def published(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Another name to write to within the block; `path` is then there with all of it, or as it was before.

    Args:
        path: the file.
        durable: also after a power cut; False is for what can be made again.

    Raises:
        OSError: it could not be written; `path` is as it was.
    """
    aside = temporary(path)
    try:
        yield aside
        if durable:
            sync(aside)
        aside.replace(path)
        if durable:
            sync(path.parent)
    finally:
        with suppress(OSError):  # after the rename there is none
            aside.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a small text file so that a reader, or a power cut, finds the old one or the new one, never a part."""
    with published(path) as aside:
        aside.write_text(text)


def check_writable(folder: Path, flag: str = "--logdir") -> None:
    """Create, sync and rename a file in `folder` (created if missing), as a checkpoint's writer will.

    Args:
        flag: of the command line, which names another folder.

    Raises:
        ResourceError: the folder cannot be written to.
    """
    probe = folder / f".probe.{socket.gethostname()}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(probe, "can we write here?\n")
        probe.unlink()
    except OSError as error:
        raise ResourceError(
            f"{folder}: cannot be written to ({error.strerror}).\n"
            f"Expected a folder where files can be created, synced and renamed; choose another one with {flag}."
        ) from error


def check_space(folder: Path, needed: int) -> None:
    """Refuse to start unless `needed` bytes are free.

    Raises:
        ResourceError: with the bytes needed and free.
    """
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < needed:
        raise ResourceError(
            f"{folder}: {needed / 1e6:,.0f} MB are needed for checkpoints, {free / 1e6:,.0f} MB are free.\n"
            "Free some space or choose another folder with --logdir."
        )


def crc32(path: Path, length: int | None = None) -> str:
    """The CRC-32 of a file's first `length` bytes, 8 hex digits; None: of all of them. About 2 GB/s if it is cached."""
    crc, left = 0, path.stat().st_size if length is None else length
    with path.open("rb", buffering=0) as file:
        while left and (data := file.read(min(_CHUNK, left))):
            crc, left = zlib.crc32(data, crc), left - len(data)
    return f"{crc:08x}"


def expanded(value: Any) -> Any:
    """`~`, `~/...` and `~user/...` with the home folder written out; everything else as it is."""
    return os.path.expanduser(value) if isinstance(value, str) else value


def sync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
