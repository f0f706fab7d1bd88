"""Parts of a cache: folders beside the latents' own, with what a model is conditioned on, computed once.

    captions    the captions of each item, one or more, as UTF-8
    a feature   what a feature (ldm/diffusion/conditioners/features.py) makes of each caption, or of each item
    a column    what lies on each item's picture, cropped with it (aligned.py)
    masked      latents of the picture with holes (masked.py)

A part is a folder of shards (shards.py), whose rows are as long as they are (ragged.py). It is named by what its source
holds and by all that determines the feature, not by the autoencoder: other autoencoders share it, and other captions
make other parts and leave the latents as they are.
"""

import logging
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from ldm.data.fingerprint import comparable
from ldm.diffusion.conditioners.features import Part
from ldm.errors import DataError
from ldm.latents import manifest
from ldm.latents.claims import read_sealed
from ldm.latents.ragged import Layout, Row, pack
from ldm.latents.shards import (
    MANIFEST,
    Finished,
    Progress,
    Spec,
    as_json,
    differing,
    kind_of,
    read_manifest,
    shard_path,
    verify_all_bytes,
)
from ldm.latents.writing import Writer, complete

FORMAT = 1
TEXT = "text"
"""The only part of a row of captions."""
CAPTIONS: Mapping[str, Part] = {TEXT: Part((1 << 20,), torch.uint8, ragged=True)}
"""A caption: its bytes in UTF-8, 1 MiB at most."""
TOO_LONG = (
    "data.params.features.{name}: {cut} of {rows} {reads}s are longer than what it reads, and their ends have no effect"
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PartSpec(Spec):
    """Everything that determines what a part holds, known before the first of its values is computed.

    Args:
        name: "captions", or of the feature in a configuration; not compared.
        reads: the key of what it is made of: "caption": a row for each caption; otherwise a row for each item.
        source: fingerprint of the captions, or of the whole data set if these cannot be read alone.
        num_items: items of the source, broken ones included.
        parts: of each row: {name: {"shape", "dtype", "ragged"}}.
        feature: what the feature says of itself; nothing for captions.
        shard_items: items per shard; not compared.
    """

    name: str
    reads: str
    source: str
    num_items: int
    parts: dict[str, dict[str, Any]]
    feature: dict[str, Any] = field(default_factory=dict)
    shard_items: int = 4096
    format: int = FORMAT

    kind: ClassVar[str] = "part"
    what: ClassVar[str] = "part of a latent cache"

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "PartSpec":
        return cls(**{name: value for name, value in tree.items() if name != "kind"})

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}

    def facts(self) -> dict[str, Any]:
        return as_json({name: value for name, value in asdict(self).items() if name not in ("shard_items", "name")})

    def differences(self, found: "PartSpec") -> list[str]:
        ours, theirs = self.facts(), found.facts()
        ours["source"], theirs["source"] = comparable(self.source, found.source)
        return differing(ours, theirs)

    def rows(self) -> dict[str, Part]:
        """The parts of each row."""
        return {
            name: Part(tuple(part["shape"]), getattr(torch, part["dtype"]), part["ragged"])
            for name, part in self.parts.items()
        }

    def layout(self, shard: int, noted: Mapping[str, Any]) -> Layout:
        """Of a shard of which its sidecar or the manifest notes `rows` and `lengths`."""
        return Layout(self.rows(), len(self.shard_range(shard)), noted["rows"], noted["lengths"])


def described(parts: Mapping[str, Part]) -> dict[str, dict[str, Any]]:
    """The parts of a row in plain values."""
    return {
        name: {"shape": [*part.shape], "dtype": str(part.dtype).removeprefix("torch."), "ragged": part.ragged}
        for name, part in parts.items()
    }


@dataclass(frozen=True)
class PartManifest(Finished[PartSpec]):
    """A finished part.

    Args:
        plan: what it holds.
        broken: items of which there is no row, since they could not be read.
        null: the row of the feature's null value, as `written` gives it; None: it has none, or this is a part of
            former versions, which did not keep it.
        shards: {"crc32", "items", "rows", "lengths" of ragged parts, "cut" (values that were too long)} for each.
    """

    plan: PartSpec
    broken: list[int]
    shards: list[dict[str, Any]]
    null: Mapping[str, Any] | None = None

    SPEC: ClassVar[type[Spec]] = PartSpec
    FORMAT: ClassVar[int] = FORMAT

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "PartManifest":
        return cls(PartSpec.from_dict(tree["plan"]), tree["broken"], tree["shards"], tree.get("null"))

    def to_dict(self) -> dict[str, Any]:
        tree = {"plan": self.plan.to_dict(), "broken": self.broken, "shards": self.shards}
        return tree if self.null is None else {**tree, "null": self.null}

    def shard_bytes(self, shard: int) -> int:
        return self.plan.layout(shard, self.shards[shard]).size

    @property
    def num_rows(self) -> int:
        """Captions, or what there is for each of them or each item."""
        return sum(shard["rows"] for shard in self.shards)

    @property
    def num_cut(self) -> int:
        """Values that were too long to be read as a whole."""
        return sum(shard["cut"] for shard in self.shards)


def verify(folder: Path, progress: Progress = lambda done, total: None) -> Finished[Any]:
    """Read every byte of the finished cache, or part of one, in `folder`; see `manifest.verify`."""
    tree = read_manifest(Path(folder) / MANIFEST)
    if kind_of(tree.get("plan", {})) != PartSpec.kind:
        return manifest.verify(folder, progress)
    found = PartManifest.read(Path(folder))
    verify_all_bytes(Path(folder), found, progress)
    return found


# ---- building --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """The rows of an item, one or more; and how many of the values that they were made of were too long to be read."""

    rows: Sequence[Row]
    cut: int = 0


def written(row: Row) -> dict[str, Any]:
    """A row in plain values."""
    return {name: {"length": len(raw), "base64": b64encode(raw.tobytes()).decode()} for name, raw in row.items()}


def made_of(parts: Mapping[str, Part], tree: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What `written` was given, as tensors."""
    found = {}
    for name, part in parts.items():
        flat = torch.frombuffer(bytearray(b64decode(tree[name]["base64"])), dtype=part.dtype)
        found[name] = flat.reshape(tree[name]["length"], *part.shape[1:])
    return found


Rows = Callable[[range], Iterable[tuple[int, Found | DataError]]]
"""Items -> each with its rows, or why it has none; in their order."""


def build_part(
    folder: Path,
    plan: PartSpec,
    rows: Rows,
    max_broken: int = 0,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress = lambda done, total: None,
    too_long: str = TOO_LONG,
    null: Callable[[], Row | None] = lambda: None,
) -> PartManifest:
    """Complete the part of `plan` in `folder`, doing whatever part of the work is left; see `writing.complete`.

    Args:
        folder: of the part, visible to all ranks.
        plan: what to build.
        rows: computes them; not called if there is nothing left to do.
        max_broken: how many items may be unreadable.
        rank, world_size: which shards to take first.
        progress: called with (items that all processes have done, items of the plan).
        too_long: what is said if some values were, with {name}, {cut} of {rows}, and what is read as {reads}.
        null: computes the row of the feature's null value, if it has one.
    """

    def writer_of(begun: PartSpec) -> "_PartWriter":
        return _PartWriter(folder, begun, rows, max_broken, progress, too_long, null)

    return complete(folder, plan, PartManifest, writer_of, rank, world_size)


class _PartWriter(Writer[PartSpec, PartManifest]):
    """Computes the rows of shards."""

    def __init__(
        self,
        folder: Path,
        plan: PartSpec,
        rows: Rows,
        max_broken: int,
        progress: Progress,
        too_long: str,
        null: Callable[[], Row | None],
    ) -> None:
        super().__init__(folder, plan, max_broken, progress)
        self.rows = rows
        self.too_long = too_long
        self.null = null

    def shard_bytes(self, shard: int) -> int:
        return self.plan.layout(shard, read_sealed(shard_path(self.folder, shard, ".json"))).size

    def make(self, shard: int) -> tuple[memoryview, dict[str, Any]]:
        items = self.plan.shard_range(shard)
        rows_of: list[Sequence[Row]] = []
        broken: dict[str, str] = {}
        cut = 0
        for item, found in self.rows(items):
            if isinstance(found, DataError):
                broken[str(item)] = str(found)
                self.demand_few(broken)
                rows_of.append([])
            else:
                rows_of.append(found.rows)
                cut += found.cut
            if len(rows_of) % 64 == 0:
                self.report(len(rows_of))
        data, rows, lengths = pack(self.plan.rows(), rows_of)
        noted = {"items": len(items) - len(broken), "broken": broken, "rows": rows, "lengths": lengths, "cut": cut}
        return data.data, noted

    def merge(self, sidecars: Sequence[Mapping[str, Any]], broken: list[int]) -> PartManifest:
        noted = ("crc32", "items", "rows", "lengths", "cut")
        null = self.null()
        found = PartManifest(
            self.plan,
            broken,
            [{name: sidecar[name] for name in noted} for sidecar in sidecars],
            None if null is None else written(null),
        )
        if found.num_cut:
            about = {"name": self.plan.name, "reads": self.plan.reads}
            log.warning("%s", self.too_long.format(cut=found.num_cut, rows=found.num_rows, **about))
        return found
