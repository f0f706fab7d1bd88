"""What lies where in a tar: its headers, read once from front to back by Python's tarfile, and nothing overlooked."""

import os
import struct
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ldm.data.decoding import image_size
from ldm.data.fingerprint import sample
from ldm.data.sources.listing import EXTENSIONS
from ldm.data.sources.shards import Shard
from ldm.errors import DataError

TEXTS = frozenset({".txt", ".json", ".cls"})
"""Endings of the files whose contents the index holds."""

LONGEST_TEXT = 1 << 20
"""Bytes; a longer one is left out."""

MEMBER = np.dtype(
    [
        *(("item", "<u4"), ("ending", "<u2"), ("offset", "<i8"), ("size", "<i8")),
        *(("sample", "<u8"), ("height", "<u4"), ("width", "<u4")),
    ]
)
"""A file of an item: its item and ending by number; where its bytes lie in the tar, or those of a text in the index;
a hash of samples of its bytes (ldm/data/fingerprint.py); height and width, 0 for a text or an unreadable header."""

_MEMBER = struct.Struct("<IHqqQII")  # the same
_BLOCK = 512  # of a tar
_HEADER = 1 << 15  # bytes of a picture that usually hold its size
_MOST_ENDINGS = 1000
_SAID = 1000  # files between two signs of progress
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass
class TarReader:
    """What one pass over a tar finds, as bytes rather than objects, for it may be millions of files.

    Attributes:
        shard: what the tar is, for messages.
        stems: of the items, in the order of their first files -> number.
        endings: of pictures and texts -> number.
        left_out: how many files of which kind are neither.
        texts: the contents of the text files, one after the other.
        repeated: how many files come again further down; the last one counts, as it does for tar.
    """

    shard: Shard
    stems: dict[bytes, int] = field(default_factory=dict)
    endings: dict[str, int] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    texts: bytearray = field(default_factory=bytearray)
    repeated: int = 0
    _rows: bytearray = field(default_factory=bytearray)

    def read(self, tar: Path, show: Callable[[int], None]) -> "TarReader":
        with tar.open("rb") as file:
            self._demand_plain(file)
            for number, entry in enumerate(self._entries(tar)):
                self._add(entry, file.fileno())
                if number % _SAID == 0:
                    show(entry.offset)
        return self

    def members(self) -> np.ndarray:
        """All files, each (item, ending) once: the last of it."""
        rows = np.frombuffer(bytes(self._rows), MEMBER)
        keys = rows["item"].astype(np.int64) << 16 | rows["ending"]
        _, last = np.unique(keys[::-1], return_index=True)
        self.repeated = len(rows) - len(last)
        return rows[np.sort(len(rows) - 1 - last)]

    def names(self) -> bytes:
        """Where each stem ends, int64, and the stems."""
        ends = np.cumsum([len(stem) for stem in self.stems], dtype="<i8")
        return ends.tobytes() + b"".join(self.stems)

    def _demand_plain(self, file: BinaryIO) -> None:
        start = file.read(8)
        if not start:
            raise DataError(f"{self.shard.location}: is empty (0 bytes); fetch it again, or leave it out of `shards`")
        for magic, kind in _COMPRESSED.items():
            if start.startswith(magic):
                raise DataError(
                    f"{self.shard.location}: is compressed ({kind}), so that no item can be read without all before "
                    "it; decompress it (pictures are compressed already)"
                )

    def _entries(self, tar: Path) -> Iterator[tarfile.TarInfo]:
        """The tar's entries one by one, and a DataError where they end too early."""
        size = tar.stat().st_size
        offset = 0
        try:
            with tarfile.open(tar, "r:", encoding="utf-8", errors="surrogateescape") as archive:
                while (entry := archive.next()) is not None:
                    if entry.offset_data + entry.size > size:
                        self._refuse(
                            entry.offset, f"is cut: {entry.name} should end at byte {entry.offset_data + entry.size}"
                        )
                    yield entry
                    offset = archive.offset
                    archive.members.clear()  # type: ignore[attr-defined]  # which would hold an object for each
                offset = archive.offset
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            self._refuse(offset, f"is damaged or cut there ({error})", error)
        self._demand_end(tar, offset)

    def _demand_end(self, tar: Path, offset: int) -> None:
        """After the last entry come zeros; tarfile takes anything else for an end, too."""
        with tar.open("rb") as file:
            file.seek(offset)
            rest = file.read(_BLOCK)
            if not rest:
                fix = f"if it is whole, head -c 1024 /dev/zero >> {self.shard.location}"
                self._refuse(offset, f"is cut, or was never closed: there are no zeros that end a tar ({fix})")
            while rest:
                if rest.count(0) < len(rest):
                    place = file.tell() - len(rest.lstrip(b"\0"))
                    self._refuse(place - place % _BLOCK, "is no header of tar (was it damaged, or were tars joined?)")
                rest = file.read(1 << 20)

    def _refuse(self, offset: int, fault: str, error: Exception | None = None) -> None:
        raise DataError(
            f"{self.shard.location}: byte {offset} of {self.shard.size}: {fault}; what follows would be lost. "
            "Make or fetch it again, or leave it out of `shards`"
        ) from error

    def _add(self, entry: tarfile.TarInfo, file: int) -> None:
        if entry.isdir():
            return
        folder, _, base = entry.name.removeprefix("./").rpartition("/")
        stem, _, ending = base.partition(".")
        ending = f".{ending.casefold()}" if ending else ""
        is_text = ending in TEXTS and entry.size <= LONGEST_TEXT
        is_picture = ending[ending.rfind(".") :] in EXTENSIONS
        if not stem or not entry.isreg() or entry.issparse() or not (is_text or is_picture):
            self.left_out[self._kind(entry, stem, ending)] += 1
            return
        name = os.fsencode(f"{folder}/{stem}" if folder else stem)
        item, number = self.stems.setdefault(name, len(self.stems)), self._number(ending, entry.name)
        if is_text:
            offset, text = len(self.texts), os.pread(file, entry.size, entry.offset_data)
            looks = text_sample(text), 0, 0
            self.texts += text
        else:
            offset, looks = entry.offset_data, _picture(file, entry)
        self._rows += _MEMBER.pack(item, number, offset, entry.size, *looks)

    def _number(self, ending: str, name: str) -> int:
        number = self.endings.setdefault(ending, len(self.endings))
        if number == _MOST_ENDINGS:
            raise DataError(
                f"{self.shard.location}: {name}: the layout of WebDataset ends a stem at its first dot, and then there "
                f"are more than {_MOST_ENDINGS} different endings; rename the files to <stem>.<extension>"
            )
        return number

    def _kind(self, entry: tarfile.TarInfo, stem: str, ending: str) -> str:
        if not stem:
            return "hidden"
        if not entry.isreg() or entry.issparse():
            return "links or sparse files"
        return f"{ending} of more than {LONGEST_TEXT} bytes" if ending in TEXTS else ending or "without extension"


def text_sample(text: bytes) -> int:
    """The sample of a text file."""
    return sample(len(text), lambda position, length: text[position : position + length])


def _picture(file: int, entry: tarfile.TarInfo) -> tuple[int, int, int]:
    """Sample, height and width; 0, 0 for one that cannot be read."""
    head = os.pread(file, min(entry.size, _HEADER), entry.offset_data)

    def read(position: int, length: int) -> bytes:
        known = head[position : position + length]
        return known if len(known) == length else os.pread(file, length, entry.offset_data + position)

    hashed = sample(entry.size, read)
    try:
        # Buffered, since decoders read a few bytes at a time; what lies behind the head is read when it is asked for.
        return hashed, *image_size(entry.name, BufferedReader(_Bytes(entry.size, read), 512))
    except DataError:
        return hashed, 0, 0


class _Bytes(RawIOBase):
    """The bytes of a file within a tar, as a file.

    Args:
        size: of it.
        read: (position, length) -> those bytes, all of which there are.
    """

    def __init__(self, size: int, read: Callable[[int, int], bytes]) -> None:
        super().__init__()
        self._size, self._read, self._at = size, read, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        found = self._read(self._at, max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)
