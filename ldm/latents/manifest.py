"""The latent cache on disk: what it contains, and how to verify that it is complete and the right one.

    plan.json          what is being encoded, by which autoencoder: everything that determines the bytes (CacheSpec)
    shard-00000.bin    records of fixed size, memory-mapped: the posterior's moments, plain and mirrored, and the label
    shard-00000.json   the shard's checksum, its sums for the statistics, its broken items, its captions
    manifest.json      the plan, the statistics over all items and both orientations, every shard's checksum (Manifest)
    contents.json      only if the plan covers just names and sizes of its source: the fingerprint, recorded later

Vocabulary: an *item* is an index into the source dataset; *moments* are mean and standard deviation of the posterior
N(mean, std^2), so that a fresh latent is drawn each time, z = mean + std * noise; *standardized* is a latent with zero
mean and unit variance per channel over the whole cache. The mirrored orientation is the encoding of the mirrored
*pixels*: an autoencoder is not equivariant, so a mirrored latent is not the same.

build.py writes what is described here, reader.py reads it.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.config.tree import current_plain
from ldm.data.fingerprint import comparable
from ldm.errors import DataError
from ldm.files import crc32
from ldm.latents.claims import COMMAND, REBUILD, dump, read_sealed
from ldm.latents.statistics import Statistics

FORMAT = 1
MANIFEST, PLAN, CONTENTS = "manifest.json", "plan.json", "contents.json"

# Facts that determine pictures of latents, but not the latents.
_OF_DECODER = ("autoencoder.weights", "autoencoder.config.decoder", "autoencoder.config.quantizer")


@dataclass(frozen=True)
class CacheSpec:
    """Everything that determines what a cache holds, known before the first image is encoded; plain JSON types only.

    Args:
        shape: (c, h, w) of one latent.
        num_items: items of the source, broken ones included.
        source: fingerprint of the source dataset; one without `:contents:` covers only names and sizes.
        pixels: how an item becomes a tensor: resolution, crop, interpolation, channels, range; and `value_range` where
            gray images of more than 8 bits have one (not compared, since `source` covers it).
        autoencoder: {"weights": hash, "encoder": hash of the encoder alone, "config": of encoder and decoder, "path":
            where it was found (not compared)}. Of one encoder, other decoders are as good. (Plans from before there
            was "encoder" are compared by "weights", or completed: places.py.)
        num_classes: None if items carry no class label; the labels are 0 .. num_classes - 1.
        class_names: their names, if known.
        captions: items carry a caption.
        shard_items: items per shard. Not compared: it determines how the records are laid out, not what they hold.
        encode_batch: images encoded at once, in an order fixed by the item numbers; not compared.
    """

    shape: tuple[int, int, int]
    num_items: int
    source: str
    pixels: dict[str, Any]
    autoencoder: dict[str, Any]
    num_classes: int | None = None
    class_names: list[str] | None = None
    captions: bool = False
    shard_items: int = 4096
    encode_batch: int = 64
    dtype: str = "float16"
    format: int = FORMAT

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "CacheSpec":
        return cls(**{**tree, "shape": tuple(tree["shape"])})

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as JSON and `torch.load(weights_only=True)` take them."""
        return {**asdict(self), "shape": list(self.shape)}

    @property
    def record(self) -> np.dtype:
        """One item: moments [plain or mirrored, mean or std, c, h, w] and the label (-1 for none)."""
        return np.dtype([("moments", "<f2", (2, 2, *self.shape)), ("label", "<i8")])

    @property
    def num_shards(self) -> int:
        return -(-self.num_items // self.shard_items)

    def shard_range(self, shard: int) -> range:
        """The items of a shard: a function of the shard's number alone, whichever process writes it."""
        return range(shard * self.shard_items, min(self.num_items, (shard + 1) * self.shard_items))

    def facts(self) -> dict[str, Any]:
        """The compared facts under dotted keys."""
        tree = {key: value for key, value in asdict(self).items() if key not in ("shard_items", "encode_batch")}
        # The encoder's hash is left out, so that a cache has the name that it always had.
        tree["autoencoder"] = {key: value for key, value in self.autoencoder.items() if key not in ("path", "encoder")}
        tree["pixels"] = {key: value for key, value in self.pixels.items() if key != "value_range"}
        facts: dict[str, Any] = json.loads(json.dumps(dict(_flat(tree))))
        return facts

    def fingerprint(self) -> str:
        """Names the cache's content: two caches of one fingerprint are interchangeable."""
        return sha256(dump(self.facts())).hexdigest()[:16]

    def differences(self, found: "CacheSpec") -> list[str]:
        """One line for each fact in which `found` differs from this plan."""
        # A configuration stored under former names means the same.
        ours, theirs = (replace(plan, autoencoder=current_plain(plan.autoencoder)).facts() for plan in (self, found))
        ours["source"], theirs["source"] = comparable(self.source, found.source)
        other_decoder = ours.get("autoencoder.weights") != theirs.get("autoencoder.weights")
        skipped = _OF_DECODER if other_decoder and same_encoder(self.autoencoder, found.autoencoder) else ()
        return [
            f"{key}: expected {_short(ours.get(key))}, found {_short(theirs.get(key))}"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key) and not key.startswith(skipped)
        ]

    def require(self, folder: Path, found: "CacheSpec") -> None:
        """Raise DataError, naming every difference, unless the (possibly unfinished) cache in `folder` is this one."""
        if lines := self.differences(found):
            raise DataError(
                f"{folder}: this latent cache was made for something else:\n  " + "\n  ".join(lines) + "\n"
                f"Remove the folder or name another in data.params.cache, then `{COMMAND}`."
            )


@dataclass(frozen=True)
class Manifest:
    """A finished cache: its plan, its statistics, its shards. Also stored in every stage-2 checkpoint.

    Args:
        plan: what was encoded.
        mean, std: per channel (c,), over all items, positions and both orientations, in fp64; the variance is that of
            the latents that training sees: the variance of the means plus the mean of the posterior variances.
        broken: items that could not be read and hold no record.
        shards: {"crc32": hex, "items": count} for each.
    """

    plan: CacheSpec
    mean: list[float]
    std: list[float]
    broken: list[int]
    shards: list[dict[str, Any]]
    _placed: dict[torch.device, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "Manifest":
        return cls(**{**tree, "plan": CacheSpec.from_dict(tree["plan"])})

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of the finished cache in `folder`; DataError if there is none or it is damaged."""
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise DataError(f"{path}: no such file, so this is not a finished latent cache. {REBUILD}.")
        tree = read_sealed(path)
        if tree.get("plan", {}).get("format") != FORMAT:
            found = tree.get("plan", {}).get("format")
            raise DataError(f"{path}: format: expected {FORMAT}, found {found}. Remove the folder, then `{COMMAND}`.")
        return cls.from_dict(tree)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as JSON and `torch.load(weights_only=True)` take them."""
        return {
            "plan": self.plan.to_dict(),
            "mean": list(self.mean),
            "std": list(self.std),
            "broken": list(self.broken),
            "shards": [dict(shard) for shard in self.shards],
        }

    @property
    def statistics(self) -> Statistics:
        return Statistics([*self.mean], [*self.std])

    def standardized_by(self, statistics: Statistics) -> "Manifest":
        """The same latents on another scale."""
        return replace(self, mean=[*statistics.mean], std=[*statistics.std])

    @property
    def num_items(self) -> int:
        """Items with a record."""
        return self.plan.num_items - len(self.broken)

    def decoded_by(self, autoencoder: Mapping[str, Any]) -> "Manifest":
        """Of the same latents, whose decoder is another one with that encoder; itself if it names that one already."""
        own = self.plan.autoencoder
        if autoencoder["weights"] == own["weights"]:
            autoencoder = {**autoencoder, **own}  # the hash of the encoder, which plans did not have at first
        return self if autoencoder == own else replace(self, plan=replace(self.plan, autoencoder=dict(autoencoder)))

    def standardize(self, latents: Tensor) -> Tensor:
        """(N,c,h,w) from the encoder -> zero mean, unit variance per channel over the cache."""
        mean, std = self._on(latents.device)
        return ((latents - mean) / std).to(latents.dtype)

    def unstandardize(self, latents: Tensor) -> Tensor:
        """(N,c,h,w) standardized -> as the decoder expects them."""
        mean, std = self._on(latents.device)
        return (latents * std + mean).to(latents.dtype)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and std as (c,1,1); copied to a device once, because each copy makes the host wait."""
        if device not in self._placed:
            both = torch.tensor([self.mean, self.std], dtype=torch.float32, device=device)[:, :, None, None]
            self._placed[device] = (both[0], both[1])
        return self._placed[device]


def same_encoder(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two autoencoders, as a CacheSpec describes them, make the same latents; False where it is not known."""
    known = one.get("encoder")
    return one.get("weights") == other.get("weights") or (known is not None and known == other.get("encoder"))


def verify(folder: Path | str, progress: Callable[[int, int], None] = lambda done, total: None) -> Manifest:
    """Read every byte of the finished cache in `folder` and compare with its checksums.

    Args:
        folder: of the cache.
        progress: called with (shards checked, shards).

    Raises:
        DataError: names every damaged file.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    plan, total = manifest.plan, manifest.plan.num_shards
    damage: list[str] = []
    try:
        plan.require(folder, CacheSpec.from_dict(read_sealed(folder / PLAN)))
    except DataError as error:
        damage.append(str(error))
    for shard in range(total):
        for test in (check_size, check_bytes, _check_sidecar):
            try:
                test(folder, manifest, shard)
            except DataError as error:
                damage.append(str(error))
                break
        progress(shard + 1, total)
    if damage:
        raise DataError("\n".join(damage))
    return manifest


def shard_path(folder: Path, shard: int, suffix: str = ".bin") -> Path:
    """The file of shard number `shard`, or its sidecar with ".json"."""
    return folder / f"shard-{shard:05d}{suffix}"


def check_size(folder: Path, manifest: Manifest, shard: int) -> None:
    """DataError unless the shard's file has the size that its items take."""
    path = shard_path(folder, shard)
    expected = len(manifest.plan.shard_range(shard)) * manifest.plan.record.itemsize
    found = path.stat().st_size if path.is_file() else None
    if found != expected:
        state = "missing" if found is None else "truncated"
        raise DataError(f"{path}: {state}: bytes: expected {expected}, found {found}. Delete it; {REBUILD}.")


def check_bytes(folder: Path, manifest: Manifest, shard: int) -> None:
    """DataError unless the shard's bytes have the checksum in the manifest."""
    path = shard_path(folder, shard)
    expected, found = manifest.shards[shard]["crc32"], crc32(path)
    if found != expected:
        raise DataError(f"{path}: damaged: crc32: expected {expected}, found {found}. Delete it; {REBUILD}.")


def _check_sidecar(folder: Path, manifest: Manifest, shard: int) -> None:
    path = shard_path(folder, shard, ".json")
    expected, found = manifest.shards[shard]["crc32"], read_sealed(path)["crc32"]
    if expected != found:
        raise DataError(f"{path}: foreign: crc32: expected {expected}, found {found}. Delete it; {REBUILD}.")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves under dotted keys; lists are leaves."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
