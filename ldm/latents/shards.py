"""What all folders of shards share: how they are described and checked; writing.py builds them.

plan.json          everything that determines the bytes (Spec)
shard-00000.bin    what is kept of the items of shard 0
shard-00000.json   its sidecar: the plan's fingerprint, the checksum, the broken items, what else its kind notes
manifest.json      the plan, the broken items, every shard's checksum (Finished)
claims             who writes what (claims.py)
"""

import json
import mmap
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np

from ldm.errors import DataError
from ldm.files import crc32
from ldm.latents.claims import COMMAND, REBUILD, dump, read_sealed

MANIFEST, PLAN = "manifest.json", "plan.json"

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


class Spec(ABC):
    """What a folder is to hold, known before its first shard; of plain JSON types.

    Attributes:
        kind: of folder, as its plan says; latents, which came first, do not say it.
        what: a folder of this kind is called in messages.
        num_items: items of the source, broken ones included.
        shard_items: items of a shard. Not compared: it determines the layout, not what the shards hold.
    """

    kind: ClassVar[str]
    what: ClassVar[str]
    num_items: int
    shard_items: int

    @classmethod
    @abstractmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Self: ...

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as JSON and `torch.load(weights_only=True)` take them."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """The compared facts under dotted keys."""

    @abstractmethod
    def differences(self, found: Self) -> list[str]:
        """One line for each fact in which `found` differs from this plan."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The plan in a folder; DataError if it is damaged, or of another kind."""
        tree = read_sealed(folder / PLAN)
        cls.check_kind(folder / PLAN, tree)
        return cls.from_dict(tree)

    @classmethod
    def check_kind(cls, file: Path, tree: Mapping[str, Any]) -> None:
        """DataError unless the plan in `file` is of this kind."""
        if (found := kind_of(tree)) != cls.kind:
            raise DataError(f"{file}: kind: expected {cls.kind}, found {found}. Name another folder.")

    @property
    def num_shards(self) -> int:
        return -(-self.num_items // self.shard_items)

    def shard_range(self, shard: int) -> range:
        """The items of a shard: a function of the shard's number alone, whichever process writes it."""
        return range(shard * self.shard_items, min(self.num_items, (shard + 1) * self.shard_items))

    def fingerprint(self) -> str:
        """Names the content: two folders of one fingerprint are interchangeable."""
        return sha256(dump(self.facts())).hexdigest()[:16]

    def require(self, folder: Path, found: Self) -> None:
        """Raise DataError, naming every difference, unless the (possibly unfinished) `folder` is this one's."""
        if lines := self.differences(found):
            raise DataError(
                f"{folder}: this {self.what} was made for something else:\n  " + "\n  ".join(lines) + "\n"
                f"Remove the folder (rm -r {folder}), from which nothing else in the cache is made, or name another in "
                f"data.params.cache; then `{COMMAND}` makes it anew, and keeps what fits."
            )


SpecT = TypeVar("SpecT", bound=Spec)


class Finished(ABC, Generic[SpecT]):
    """The manifest of a finished folder.

    Attributes:
        plan: what it holds.
        broken: items that it does not hold, since they could not be read.
        shards: of each shard `crc32` (hex), `items` (those that are not broken), and what else its kind notes.
    """

    plan: SpecT
    broken: list[int]
    shards: list[dict[str, Any]]
    SPEC: ClassVar[type[Spec]]
    FORMAT: ClassVar[int]

    @classmethod
    @abstractmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Self: ...

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as JSON and `torch.load(weights_only=True)` take them."""

    @abstractmethod
    def shard_bytes(self, shard: int) -> int:
        """The size of a shard's file."""

    @property
    def num_items(self) -> int:
        """Items that are not broken."""
        return self.plan.num_items - len(self.broken)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest in `folder`; DataError if there is none, it is damaged, or of another kind or format."""
        path = Path(folder) / MANIFEST
        tree = read_manifest(path, cls.SPEC.what)
        plan = tree.get("plan", {})
        cls.SPEC.check_kind(path, plan)
        if (found := plan.get("format")) != cls.FORMAT:
            wanted = cls.FORMAT
            raise DataError(f"{path}: format: expected {wanted}, found {found}. Remove the folder, then `{COMMAND}`.")
        return cls.from_dict(tree)


FinishedT = TypeVar("FinishedT", bound=Finished[Any])


def kind_of(plan: Mapping[str, Any]) -> str:
    """The kind of folder that a plan is of."""
    return str(plan.get("kind", "latents"))


def read_manifest(path: Path, what: str = "latent cache") -> dict[str, Any]:
    """The manifest's tree, of any kind; DataError if there is none."""
    if not path.is_file():
        raise DataError(f"{path}: no such file, so this is not a finished {what}. {REBUILD}.")
    return read_sealed(path)


def shard_path(folder: Path, shard: int, suffix: str = ".bin") -> Path:
    """The file of shard number `shard`, or its sidecar with ".json"."""
    return folder / f"shard-{shard:05d}{suffix}"


def mapped(path: Path) -> np.ndarray:
    """The bytes of a shard, memory-mapped: (n,) uint8.

    For rows here and there. What a file system reads ahead of each, from 128 KB to megabytes, would be in vain.
    """
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if sys.platform != "win32":  # which has no such call
        memory.madvise(mmap.MADV_RANDOM)
    # A plain array: indexing a numpy.memmap makes a new memmap each time, which is slow.
    return np.frombuffer(memory, np.uint8)


def check_size(folder: Path, manifest: Finished[Any], shard: int) -> None:
    """DataError unless the shard's file has the size that its items take."""
    path = shard_path(folder, shard)
    expected = manifest.shard_bytes(shard)
    try:
        found = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        found = None
    if found != expected:
        state = "missing" if found is None else "truncated"
        raise DataError(f"{path}: {state}: bytes: expected {expected}, found {found}. Delete it; {REBUILD}.")


def check_sizes(folder: Path, manifest: Finished[Any]) -> None:
    """`check_size` of all shards."""
    for shard in range(manifest.plan.num_shards):
        check_size(folder, manifest, shard)


def check_bytes(folder: Path, manifest: Finished[Any], shard: int) -> None:
    """DataError unless the shard has its size, and its bytes the checksum in the manifest."""
    check_size(folder, manifest, shard)
    path = shard_path(folder, shard)
    expected, found = manifest.shards[shard]["crc32"], crc32(path)
    if found != expected:
        raise DataError(f"{path}: damaged: crc32: expected {expected}, found {found}. Delete it; {REBUILD}.")


def _check_sidecar(folder: Path, manifest: Finished[Any], shard: int) -> None:
    path = shard_path(folder, shard, ".json")
    expected, found = manifest.shards[shard]["crc32"], read_sealed(path)["crc32"]
    if expected != found:
        raise DataError(f"{path}: foreign: crc32: expected {expected}, found {found}. Delete it; {REBUILD}.")


def verify_all_bytes(folder: Path, manifest: Finished[Any], progress: Progress) -> None:
    """Read every byte of a finished folder and compare with its checksums; DataError names every damaged file."""
    plan: Spec = manifest.plan
    damage: list[str] = []
    try:
        plan.require(folder, plan.read(folder))
    except DataError as error:
        damage.append(str(error))
    for shard in range(plan.num_shards):
        for test in (check_bytes, _check_sidecar):
            try:
                test(folder, manifest, shard)
            except DataError as error:
                damage.append(str(error))
                break
        progress(shard + 1, plan.num_shards)
    if damage:
        raise DataError("\n".join(damage))


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves under dotted keys; lists are leaves."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def as_json(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The dotted facts of a plan as JSON gives them back."""
    facts: dict[str, Any] = json.loads(json.dumps(dict(flat(tree))))
    return facts


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any], skipped: tuple[str, ...] = ()) -> list[str]:
    """One line for each fact that differs, but for those whose keys begin with one of `skipped`."""
    return [
        f"{key}: expected {_short(ours.get(key))}, found {_short(theirs.get(key))}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key) and not key.startswith(skipped)
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def size_on_disk(folder: Path) -> str:
    """What a folder's files take, in MB."""
    return f"{sum(file.stat().st_size for file in folder.iterdir()) / 1e6:,.1f} MB"
