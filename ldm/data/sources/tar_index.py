"""Where each file of a tar lies: read once, kept beside a data set, and checked against the tar at each start.

The index of one tar is one file: a line of JSON, then arrays, then the names of the items, then the contents of small
text files, so that captions, labels and numbers are read without the tar. Python's tarfile reads the headers.
"""

import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np

from ldm import files
from ldm.data.sources.handles import locked
from ldm.data.sources.shards import Shard, Shards
from ldm.data.sources.tar_reader import MEMBER, TarReader
from ldm.errors import ResourceError
from ldm.runtime import distributed, signals
from ldm.runtime.progress import shown

_FORMAT = 1


@dataclass
class TarIndex:
    """The files of one tar that belong to items, in the tar's order.

    Attributes:
        place: of the index.
        num_items: different stems.
        endings: what `members["ending"]` counts: ".jpg", ".seg.png"; those of pictures and texts.
        members: (M,) `MEMBER`.
        left_out: how many files of which ending are neither pictures nor texts.
        repeated: how many files come again further down; the last one counts, as it does for tar.
        texts_at: where in the index the contents of text files begin, at which the offsets of texts count.
    """

    place: Path
    num_items: int
    endings: list[str]
    members: np.ndarray
    left_out: dict[str, int]
    repeated: int
    texts_at: int
    _names: int

    def closed(self) -> "TarIndex":
        """Without the members, for the items have been chosen."""
        return replace(self, members=np.zeros(0, MEMBER))

    def name(self, item: int) -> str:
        """The stem of an item, with its folder in the tar; of messages, so it never fails."""
        try:
            with self.place.open("rb") as file:
                file.seek(self._names + 8 * max(0, item - 1))
                ends = np.frombuffer(file.read(16 if item else 8), "<i8").tolist()
                start, end = ends if item else (0, *ends)
                file.seek(self._names + 8 * self.num_items + start)
                return os.fsdecode(file.read(end - start))
        except (OSError, ValueError):
            return f"item {item}"

    def names(self) -> list[bytes]:
        """The stem of each item."""
        with self.place.open("rb") as file:
            file.seek(self._names)
            ends = np.frombuffer(file.read(8 * self.num_items), "<i8").tolist()
            raw = file.read(ends[-1] if ends else 0)
        return [raw[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def load(place: Path, shard: Shard) -> TarIndex | None:
    """The index at `place`; None: there is none, it is damaged, or it is of another tar or of a former state of it."""
    try:
        with place.open("rb") as file:
            head = json.loads(file.readline())
            if head["format"] != _FORMAT or head["state"] != [shard.size, shard.version]:
                return None
            start = file.tell()
            arrays = file.read(head["members"] * MEMBER.itemsize)
            if os.fstat(file.fileno()).st_size != head["bytes"] + start or zlib.crc32(arrays) != head["checksum"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    names = start + len(arrays)
    known = {name: head[name] for name in ("num_items", "endings", "left_out", "repeated")}
    members = np.frombuffer(arrays, MEMBER)
    return TarIndex(place, members=members, _names=names, texts_at=names + head["names"], **known)


def build(place: Path, shard: Shard, tar: Path, show: Callable[[int], None]) -> None:
    """Read the tar and write its index.

    Args:
        place: where to.
        shard: what the tar is; its location is for messages.
        tar: a local file of it.
        show: called with the bytes of the tar that are done.

    Raises:
        DataError: the tar is compressed, empty, cut or damaged, naming the place.
        ResourceError: the index cannot be written.
    """
    found = TarReader(shard).read(tar, show)
    members, names, texts = found.members(), found.names(), bytes(found.texts)
    head = {
        "format": _FORMAT,
        "state": [shard.size, shard.version],
        "num_items": len(found.stems),
        "endings": list(found.endings),
        "left_out": dict(found.left_out),
        "repeated": found.repeated,
        "members": len(members),
        "names": len(names),
        "checksum": zlib.crc32(members.data),
        "bytes": members.nbytes + len(names) + len(texts),
    }
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with files.published(place, durable=False) as aside, aside.open("wb") as file:
            file.writelines([json.dumps(head).encode() + b"\n", members.tobytes(), names, texts])
    except OSError as error:
        raise ResourceError(
            f"{place}: cannot write the index of {shard.location}: {error.strerror}; make room or permit writing "
            "there, or name another folder as `index`. Indexes that are written stay"
        ) from error


def indexes(shards: Sequence[Shard], reader: Shards, folder: Path) -> list[TarIndex]:
    """The index of each shard; those that are missing or stale are built, shared among all processes that want them.

    An interrupted start goes on with the next shard.
    """
    found = [load(_place(folder, shard), shard) for shard in shards]
    total = sum(shard.size for shard in shards)
    with shown("indexing shards (MB)", silent=not distributed.is_main()) as show:

        def tell(read: int) -> None:
            done = sum(shard.size for shard, index in zip(shards, found, strict=True) if index is not None)
            show((done + read) // 1_000_000, total // 1_000_000)

        for wait in (False, True):  # first what nobody is at, then wait for the others
            for row, shard in enumerate(shards):
                if found[row] is None:
                    signals.stop_if_asked()
                    found[row] = _made(shard, reader, folder, wait, tell)
    return [index for index in found if index is not None]


def _made(shard: Shard, reader: Shards, folder: Path, wait: bool, show: Callable[[int], None]) -> TarIndex | None:
    """The index, by this process or another; None: another is at it, and we do not wait."""
    place = _place(folder, shard)
    try:
        with locked(folder / "locks" / place.stem, wait) as mine:
            if not mine:
                return None
            if (index := load(place, shard)) is None:
                with reader.whole(shard) as tar:
                    build(place, shard, tar, show)
                index = load(place, shard)
    except OSError as error:
        raise ResourceError(
            f"{folder}: cannot keep indexes of shards there: {error.strerror}; name another `index`"
        ) from error
    if index is None:
        raise ResourceError(f"{place}: was written and cannot be read again; name another folder as `index`")
    return index


def _place(folder: Path, shard: Shard) -> Path:
    return folder / f"{blake2b(os.fsencode(shard.location), digest_size=16).hexdigest()}.index"
