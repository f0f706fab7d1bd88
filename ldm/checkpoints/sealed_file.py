"""One self-verifying file: what `torch.save` writes, and a seal of 35 bytes behind the zip archive.

    newline "ldm" space step (20 digits) space crc32 (8 hex digits) newline

The CRC covers every byte before itself, so any single flipped byte and any truncation is found, headers and padding
included; torch checks none of it on reading. Zip readers skip the seal. The step in it lets the newest file of a folder
be found without unpickling anything.
"""

import fcntl
import os
import pickle
import re
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from ldm import files
from ldm.errors import CheckpointError
from ldm.files import crc32

_SEAL = re.compile(rb"\nldm (\d{20}) ([0-9a-f]{8})\n")
_SEAL_BYTES = 35
_CRC_BYTES = 9  # the seal's end, which the CRC cannot cover: eight digits and a newline
_UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def write(path: Path, state: dict[str, Any], step: int) -> None:
    """Publish `state` atomically: at any moment either the old or the new file exists, and the new one is durable.

    Raises:
        OSError: it could not be written; the old file is intact.
    """
    # Closed last, which releases the lock: a large file is still locked while it is synced.
    with ExitStack() as held, files.published(path) as aside:
        file = held.enter_context(aside.open("wb"))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # so that `abandoned` leaves it alone
        summing = _Summing(file)
        try:
            torch.save(state, cast(IO[bytes], summing))  # it needs no more than write and flush
        except RuntimeError as error:  # what torch makes of a full disk
            raise summing.error or error from error
        summing.write(b"\nldm %020d " % step)
        summing.write(b"%08x\n" % summing.crc)
        summing.flush()


def read(path: Path, mapped: bool = False) -> dict[str, Any]:
    """What was written, without verifying it; never runs code from the file.

    Args:
        path: the file.
        mapped: memory-map the tensors, so that their bytes are read on access.

    Raises:
        CheckpointError: it holds more than plain data.
    """
    if os.environ.get(_UNSAFE):
        raise CheckpointError(f"{path}: not loaded while {_UNSAFE} is set: it lets a checkpoint run code. Unset it.")
    mapped = mapped and _is_utf8(path)  # torch cannot map a file with another name
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path}: not a checkpoint that can be loaded safely: {first_line}") from error
    return state


def fault(path: Path) -> str | None:
    """Why the file cannot be trusted, or None; reads all of it (about 2 GB/s if it is cached)."""
    try:
        with path.open("rb", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            seal = _read_seal(file)
            if size == 0:
                return "empty file"
            if seal is None:
                return "truncated, damaged, or not saved by ldm (no seal at its end)"
        found, expected = crc32(path, size - _CRC_BYTES), seal[2].decode()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if found == expected else f"damaged: its bytes sum to {found}, expected {expected}"


def seal(path: Path) -> bytes:
    """The seal, unverified; empty if there is none."""
    try:
        with path.open("rb", buffering=0) as file:
            found = _read_seal(file)
    except OSError:
        found = None
    return found[0] if found else b""


def step(path: Path) -> int:
    """The step in the seal, unverified; higher than any step if there is no seal, so that the file is checked first."""
    found = _SEAL.fullmatch(seal(path))
    return int(found[1]) if found else 10**20


def abandoned(temporary: Path) -> bool:
    """Remove a temporary file unless its writer is alive and holds a lock on it; returns whether it was removed."""
    try:
        with temporary.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.unlink()
    except OSError:
        return False  # its writer is alive, or another process was faster
    return True


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


class _Summing:
    """A binary file that tracks the CRC-32 of what is written, and the error that stopped it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.crc = 0
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        self.crc = zlib.crc32(data, self.crc)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _read_seal(file: Any) -> re.Match[bytes] | None:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _SEAL_BYTES))
    return _SEAL.fullmatch(file.read(_SEAL_BYTES))
