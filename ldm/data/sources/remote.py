"""Shards behind URLs: copies of them in a bounded local store, and single pieces where the store cannot hold them."""

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm.data.sources.handles import Handle, Handles, locked
from ldm.data.sources.shards import Shard, changed, refuse
from ldm.data.sources.transfers import CHUNK, NO_ROOM, NoRanges, Transfers
from ldm.errors import ConfigError, DataError, ResourceError
from ldm.files import sync
from ldm.ranges import Count, CountOrZero, Positive
from ldm.runtime import distributed, signals
from ldm.runtime.progress import shown

logger = logging.getLogger(__name__)

READ_AHEAD = 8 << 20
"""Bytes that are read ahead at most, where pieces are asked for one after the other."""

_RECENT = 3600.0  # seconds: a copy that was opened since then does not make way for one item of another shard
_PATIENCE = 60.0  # seconds to wait for copies that other processes read


class Store:
    """A folder of copies of files behind URLs, shared by all processes of a machine, that holds `max_bytes` at most.

    A file is fetched once: others wait for the process that does. It is written aside, continued after an interruption
    where the server sends pieces, compared with the size, version and MD5 that the server states, and then renamed.
    The copies that were used longest ago make way, but never one that a process has open.

    A training order jumps between all shards. If the store holds them all, they are fetched before the first step. If
    it does not, fetching a shard for one item would fetch it again and again, so single items are fetched (range
    requests), further ahead the longer they follow one another, as they do while a latent cache is built; a warning
    says so.

    Args:
        folder: where the copies lie, on a disk of the machine.
        max_bytes: of all copies together.
        timeout: seconds that a request for 8 MiB may take, before it is tried again.
        retries: how often a failed request is repeated, after growing pauses.
        options: for fsspec's file system, such as `{anon: true}` of s3://.
    """

    def __init__(
        self,
        folder: str | Path = "cache/shards",
        max_bytes: Count = 100_000_000_000,
        timeout: Positive = 60.0,
        retries: CountOrZero = 5,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder).absolute()
        self.max_bytes = int(max_bytes)
        self.transfers = Transfers(timeout, retries, options)
        self._handles = Handles()
        self._wanted: set[Shard] = set()
        self._total = 0  # bytes of these
        self._ahead: tuple[Shard, int, bytes] | None = None  # what was read last: shard, offset, bytes

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_ahead": None}

    def find(self, patterns: Sequence[str]) -> list[Shard]:
        """The files and their present states.

        Raises:
            ConfigError: one of them is larger than the store.
            DataError: one does not exist or may not be read.
            ResourceError: the server cannot be reached.
        """
        shards = self.transfers.find(patterns)
        largest = max(shards, key=lambda shard: shard.size)
        if largest.size > self.max_bytes:
            raise ConfigError(
                f"{largest.location}: has {largest.size} bytes, and the store {self.folder} may hold {self.max_bytes}; "
                f"set its `max_bytes` to {largest.size} or more, or make smaller shards"
            )
        self._wanted |= set(shards)
        self._total = sum(shard.size for shard in self._wanted)
        if self._total > self.max_bytes:
            self._announce(shards)
        return shards

    def _announce(self, shards: Sequence[Shard]) -> None:
        total = self._total
        numbers = (
            f"{len(self._wanted)} shards of {total} bytes together, and the store {self.folder} holds {self.max_bytes}"
        )
        try:
            self.transfers.read(shards[-1], shards[-1].size // 2, 1)
        except NoRanges as error:
            raise ConfigError(
                f"{shards[-1].location}: the server sends whole files only, {numbers}: each item would fetch a shard. "
                f"Set `max_bytes` of the store to {total} or more, or use a server that answers range requests"
            ) from error
        if distributed.is_main():
            logger.warning(
                "%s: %s: in random order items are fetched one by one, a request each, which more "
                "data.params.num_workers hide; with `max_bytes` of %d or more each shard is fetched once",
                *(shards[0].location, numbers, total),
            )

    def prepare(self, shards: Sequence[Shard]) -> None:
        """Fetch all shards, if the store can hold them."""
        if self._total > self.max_bytes:
            return
        with shown("fetching shards", silent=not distributed.is_main()) as show:
            for done, shard in enumerate(shards):
                show(done, len(shards))
                self._copy(shard, spare=0.0, wait=_PATIENCE)
            show(len(shards), len(shards))

    def read(self, shard: Shard, offset: int, length: int) -> bytes:
        """A piece of a shard: of its copy, or from the server."""
        try:
            return self._read(shard, offset, length)
        except DataError as error:  # a server that refuses what it has sent before
            raise ResourceError(str(error)) from error

    def _read(self, shard: Shard, offset: int, length: int) -> bytes:
        path = self._place(shard)
        try:
            handle = self._handles.get(path) or self._opened(path)
        except OSError as error:
            refuse(str(path), error)
        if handle is None and self._total <= self.max_bytes:
            handle = self._copy(shard, spare=_RECENT, wait=0.0)
        if handle is None:
            return self._piece(shard, offset, length)
        return self._handles.put(path, handle).read(offset, length)

    def _piece(self, shard: Shard, offset: int, length: int) -> bytes:
        """Bytes from the server, with more behind them the longer the last pieces followed one another."""
        known, start, held = self._ahead or (shard, -1, b"")
        within = offset - start
        if known == shard and within >= 0 and within + length <= len(held):
            return held[within : within + length]
        # The next item begins behind the header of its file, or behind small files of its own.
        follows = known == shard and start >= 0 and within >= 0 and within <= len(held) + READ_AHEAD // 8
        size = min(max(length, 2 * len(held), length * 4), max(length, READ_AHEAD)) if follows else length
        size = min(size, shard.size - offset)
        found = b""
        while len(found) < size:
            found += self.transfers.read(shard, offset + len(found), min(CHUNK, size - len(found)))
        self._ahead = (shard, offset, found)
        return found[:length]

    def demand_unchanged(self, shard: Shard) -> None:
        """ResourceError if the file is another than it was when it was looked at."""
        if self.transfers.state(shard.location) != shard:
            changed(shard.location)

    @contextmanager
    def whole(self, shard: Shard) -> Iterator[Path]:
        """The copy of a shard, fetched if it is not there; it stays at least as long as the block."""
        handle = self._copy(shard, spare=0.0, wait=_PATIENCE)
        assert handle is not None
        try:
            yield self._place(shard)
        finally:
            handle.close()

    def _place(self, shard: Shard) -> Path:
        digest = hashlib.blake2b(repr(tuple(shard)).encode(errors="backslashreplace"), digest_size=16).hexdigest()
        return self.folder / f"{digest}.shard"

    def _lock(self, path: Path) -> Path:
        """Held by who fetches a copy, or continues a part."""
        return self.folder / "locks" / path.name.partition(".")[0]

    def _opened(self, path: Path) -> Handle | None:
        """A complete copy, which cannot make way as long as it is open; None: there is none."""
        try:
            handle = Handle(path)
        except FileNotFoundError:
            return None
        # Who lets it make way holds it exclusively, and what was opened may be gone then.
        if not handle.lock(fcntl.LOCK_SH | fcntl.LOCK_NB) or os.fstat(handle.number).st_nlink == 0:
            handle.close()
            return None
        os.utime(path)
        return handle

    def _copy(self, shard: Shard, spare: float, wait: float) -> Handle | None:
        """The opened copy, which one process fetches; None: it found no room among copies used recently.

        Args:
            shard: what is wanted.
            spare: copies opened in the last so many seconds do not make way.
            wait: seconds to wait for others to close their copies; 0: None is returned at once.
        """
        path = self._place(shard)
        try:
            with locked(self._lock(path)):
                handle = self._opened(path)
                if handle is None and self._reserved(path, shard, spare, wait):
                    self._fetch(path, shard)
                    handle = self._opened(path)
        except OSError as error:
            self._refuse_place(shard, error)
        return handle

    def _refuse_place(self, shard: Shard, error: OSError) -> None:
        fix = (
            "make room there, or lower `max_bytes` of the store to what the disk can hold"
            if error.errno in NO_ROOM
            else "permit writing there, or name another `folder`"
        )
        raise ResourceError(
            f"{self.folder}: cannot keep {shard.location} ({shard.size} bytes): {error.strerror or error}; {fix}. "
            "What has arrived is kept, and another start continues from there"
        ) from error

    def _part(self, path: Path, shard: Shard) -> Path:
        return path.with_name(f"{path.stem}.{shard.size}.part")  # the size that it will have counts already

    def _reserved(self, path: Path, shard: Shard, spare: float, wait: float) -> bool:
        """Make an empty part, once there is room for the whole."""
        begun, part = time.monotonic(), self._part(path, shard)
        while True:
            with locked(self.folder / "locks" / "space"):
                if self._made_room(shard.size, part, spare):
                    Handle(part, os.O_WRONLY | os.O_CREAT).close()
                    return True
            if wait == 0:
                return False
            if time.monotonic() - begun > wait:
                raise ResourceError(
                    f"{self.folder}: no room for {shard.location} ({shard.size} bytes) within `max_bytes` "
                    f"({self.max_bytes}): other processes use the copies that are there; raise `max_bytes`"
                )
            signals.stop_if_asked()
            time.sleep(0.2)

    def _made_room(self, needed: int, own: Path, spare: float) -> bool:
        """Remove copies, and parts that nobody continues, that were used longest ago, until there is room."""
        others = [_use(path) for path in self.folder.iterdir() if path.is_file() and path != own]
        there = sorted(others, key=lambda use: use[0])
        total = needed + sum(size for _, size, _ in there)
        for used, size, path in there:
            if total <= self.max_bytes:
                break
            if time.time() - used >= spare and self._gone(path):
                total -= size
        return total <= self.max_bytes

    def _gone(self, path: Path) -> bool:
        """Remove a copy that no process has open, or a part that none continues."""
        if path.suffix == ".part":
            with locked(self._lock(path), wait=False) as free:
                if free:
                    path.unlink(missing_ok=True)
                return free
        try:
            handle = Handle(path)
        except FileNotFoundError:
            return True
        try:
            free = handle.lock(fcntl.LOCK_EX | fcntl.LOCK_NB)
            if free:
                path.unlink(missing_ok=True)
            return free
        finally:
            handle.close()

    def _fetch(self, path: Path, shard: Shard) -> None:
        """Continue the part until it is whole, compare it, and rename it; only who holds the shard's lock does."""
        part = self._part(path, shard)
        handle = Handle(part, os.O_WRONLY | os.O_CREAT)
        try:
            done = os.fstat(handle.number).st_size
            while done < shard.size:
                signals.stop_if_asked()
                data = self.transfers.read(shard, done, min(CHUNK, shard.size - done))
                _write(handle, data, done)
                done += len(data)
        except NoRanges:
            self.transfers.download(shard, part)
        finally:
            handle.close()
        try:
            self.transfers.demand_arrived(shard, part)
        except (DataError, ResourceError):
            part.unlink(missing_ok=True)
            raise
        sync(part)  # after a power cut, a copy has all its bytes or is not there
        os.replace(part, path)


def _write(handle: Handle, data: bytes, offset: int) -> None:
    rest = memoryview(data)
    while len(rest):
        written = os.pwrite(handle.number, rest, offset)
        rest, offset = rest[written:], offset + written


def _use(path: Path) -> tuple[float, int, Path]:
    """When a copy or part was used last, the bytes that it takes or will take, and where it is."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return 0.0, 0, path
    expected = path.name.split(".")[1] if path.suffix == ".part" else ""
    return state.st_mtime, int(expected) if expected.isdigit() else state.st_size, path
