"""Completes folders of shards: any number of processes, killed at any moment; always the same bytes.

There is no collective and no leader. Every process claims a missing shard, writes it, and continues until all exist:
first its own share (shard % world size == rank), then any that other processes have not taken or died writing. What is
published is never written again, so a killed build resumes where it was.
"""

import logging
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic

from ldm.errors import DataError
from ldm.latents.claims import Claims, publish, read_sealed, seal
from ldm.latents.shards import MANIFEST, PLAN, Finished, FinishedT, Progress, Spec, SpecT, check_size, shard_path
from ldm.ranges import CountOrZero
from ldm.runtime import distributed
from ldm.runtime.signals import stop_if_asked

_PLAN_CLAIM, _MANIFEST_CLAIM = 1 << 40, 1 << 41  # beyond any shard's number
_POLL_SECONDS = 0.5

log = logging.getLogger(__name__)


class Writer(ABC, Generic[SpecT, FinishedT]):
    """Makes shards of one folder and publishes them: the bytes first, then the sidecar that vouches for them.

    Args:
        folder: of the shards.
        plan: of the folder.
        max_broken: how many items may be unreadable.
        progress: called with (items that all processes have done, items of the plan).
    """

    def __init__(self, folder: Path, plan: SpecT, max_broken: CountOrZero, progress: Progress) -> None:
        self.folder = folder
        self.plan = plan
        self.max_broken = max_broken
        self.progress = progress
        self._known: set[int] = set()

    @abstractmethod
    def make(self, shard: int) -> tuple[memoryview, dict[str, Any]]:
        """The bytes of a shard, and its sidecar with `items` and `broken` {item: why}; `report`s on the way."""

    @abstractmethod
    def shard_bytes(self, shard: int) -> int:
        """The size of the file of a shard that has a sidecar."""

    @abstractmethod
    def merge(self, sidecars: Sequence[Mapping[str, Any]], broken: list[int]) -> FinishedT:
        """The manifest: a function of the sidecars' content, whichever process wrote them."""

    def published(self, shard: int) -> bool:
        """Whether the shard and its sidecar exist, whichever process wrote them."""
        if shard not in self._known:
            path = shard_path(self.folder, shard)
            both = path.is_file() and path.with_suffix(".json").is_file()
            if both and path.stat().st_size == self.shard_bytes(shard):
                self._known.add(shard)
        return shard in self._known

    def report(self, under_way: int) -> None:
        done = sum(len(self.plan.shard_range(shard)) for shard in self._known)
        self.progress(done + under_way, self.plan.num_items)

    def write(self, shard: int) -> None:
        data, sidecar = self.make(shard)
        vouched = {**sidecar, "plan": self.plan.fingerprint(), "crc32": f"{zlib.crc32(data):08x}"}
        publish(shard_path(self.folder, shard), data)
        publish(shard_path(self.folder, shard, ".json"), seal(vouched))
        self._known.add(shard)

    def demand_few(self, broken: Mapping[str, str]) -> None:
        """DataError if more items are broken than may be."""
        if len(broken) > self.max_broken:
            listed = "\n  ".join(list(broken.values())[:5])
            raise DataError(
                f"{self.folder}: {len(broken)} items could not be read, {self.max_broken} are allowed:\n  {listed}\n"
                f"Fix or remove them, or allow more; what is already encoded is kept."
            )

    def merged(self) -> FinishedT:
        """The manifest of a folder whose shards are all there."""
        files = [shard_path(self.folder, shard, ".json") for shard in range(self.plan.num_shards)]
        sidecars, ours = [read_sealed(file) for file in files], self.plan.fingerprint()
        for file, sidecar in zip(files, sidecars, strict=True):
            if (found := sidecar["plan"]) != ours:
                raise DataError(f"{file}: plan: expected {ours}, found {found}. Delete it.")
        broken = {item: reason for sidecar in sidecars for item, reason in sidecar["broken"].items()}
        self.demand_few(broken)
        if not sum(sidecar["items"] for sidecar in sidecars):
            raise DataError(
                f"{self.folder}: the data set holds {self.plan.num_items} items, {len(broken)} of them broken: 0 left."
            )
        for reason in list(broken.values())[:5]:
            log.warning("left out of the %s: %s", self.plan.what, reason)
        return self.merge(sidecars, sorted(map(int, broken)))


def complete(
    folder: Path,
    plan: SpecT,
    kind: type[FinishedT],
    writer_of: Callable[[SpecT], Writer[SpecT, FinishedT]],
    rank: int = 0,
    world_size: int = 1,
) -> FinishedT:
    """Complete the folder of `plan`, doing whatever part of the work is left (collective, where there are ranks).

    Of a finished folder one rank of each machine looks at the shards. Of one that is not, who finds it complete first
    writes the manifest, and the others read that.

    Args:
        folder: visible to all ranks.
        plan: what to build.
        kind: of its manifest.
        writer_of: the plan as it was begun -> what makes its shards; not called if there is nothing left to do.
        rank, world_size: which shards to take first.

    Raises:
        DataError: the folder holds something else; too many broken items; what `Writer.make` raises.
        ResourceError: the folder cannot be written.
        Stopped: a signal requested a stop; the current shard is abandoned, earlier ones are kept.
    """
    before = _stamp(folder / MANIFEST)
    finished = _finished(folder, plan, kind)
    if finished is not None:
        return finished
    claims = Claims(folder)
    try:
        writer = writer_of(_agree(folder, plan, claims))
        order = sorted(range(writer.plan.num_shards), key=lambda shard: (shard % world_size != rank, shard))
        while missing := [shard for shard in order if not writer.published(shard)]:
            stop_if_asked()
            if not sum(_write_if_free(writer, claims, shard) for shard in missing):
                time.sleep(_POLL_SECONDS)  # other processes are writing the rest
            writer.report(0)
        with claims.take(_MANIFEST_CLAIM, folder / MANIFEST, wait=True):
            if _stamp(folder / MANIFEST) != before:  # another process has written it meanwhile
                return kind.read(folder)
            manifest = writer.merged()
            publish(folder / MANIFEST, seal(manifest.to_dict()))
    finally:
        claims.close()
    return manifest


def _finished(folder: Path, plan: SpecT, kind: type[FinishedT]) -> FinishedT | None:
    """The manifest, if nothing is left to do; a folder of another plan is refused."""
    manifest = None
    if (folder / MANIFEST).is_file():
        manifest = kind.read(folder)
        plan.require(folder, manifest.plan)
    incomplete = distributed.on_any_machine(lambda: manifest is None or _lacks_shards(folder, manifest))
    return None if incomplete else manifest


def _lacks_shards(folder: Path, manifest: Finished[Any]) -> bool:
    """Whether a shard is not as long as it should be, or a sidecar cannot be read, with a warning."""
    plan: Spec = manifest.plan
    try:
        for shard in range(plan.num_shards):
            check_size(folder, manifest, shard)
            read_sealed(shard_path(folder, shard, ".json"))
    except DataError as error:
        log.warning("%s", error)
        return True
    return False


def _stamp(file: Path) -> tuple[int, int] | None:
    """Changes when another file is published in its place; None: there is none."""
    try:
        status = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_ino, status.st_mtime_ns


def _agree(folder: Path, plan: SpecT, claims: Claims) -> SpecT:
    """The plan of this build: the one already in the folder (its layout applies), else ours, which is written first."""
    with claims.take(_PLAN_CLAIM, folder / PLAN, wait=True):
        if not (folder / PLAN).is_file():
            publish(folder / PLAN, seal(plan.to_dict()))
        begun = plan.read(folder)
    plan.require(folder, begun)
    return begun


def _write_if_free(writer: Writer[Any, Any], claims: Claims, shard: int) -> bool:
    with claims.take(shard, shard_path(writer.folder, shard)) as mine:
        if not mine or writer.published(shard):
            return False
        writer.write(shard)
    return True
