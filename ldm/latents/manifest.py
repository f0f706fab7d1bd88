"""The latent cache on disk: what it contains, and how to verify that it is complete and the right one.

    plan.json          what is being encoded, by which autoencoder: everything that determines the bytes (CacheSpec)
    shard-00000.bin    records of fixed size, memory-mapped: the posterior's moments, plain and, where runs see mirror
                       images, mirrored, and the label
    shard-00000.json   the shard's checksum, its sums for the statistics, its broken items
    manifest.json      the plan, the statistics over all items and orientations, every shard's checksum (Manifest)
    contents.json      only if the plan covers just names and sizes of its source: the fingerprint, recorded later

What a model is conditioned on lies in folders of its own (parts.py); captions lay in the sidecars at first, and are
read from those of such a cache. What both kinds of folders share is in shards.py.

Vocabulary: an *item* is an index into the source dataset; *moments* are mean and standard deviation of the posterior
N(mean, std^2), so that a fresh latent is drawn each time, z = mean + std * noise; *standardized* is a latent with zero
mean and unit variance per channel over the whole cache. The mirrored orientation is the encoding of the mirrored
*pixels*: an autoencoder is not equivariant, so a mirrored latent is not the same.

build.py writes what is described here, reader.py reads it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ldm.config.tree import current_plain
from ldm.data.fingerprint import comparable
from ldm.latents.shards import Finished, Progress, Spec, as_json, differing, verify_all_bytes
from ldm.latents.statistics import Statistics

FORMAT = 1
CONTENTS = "contents.json"

# Facts that determine pictures of latents, but not the latents.
_OF_DECODER = ("autoencoder.weights", "autoencoder.config.decoder", "autoencoder.config.quantizer")


@dataclass(frozen=True)
class CacheSpec(Spec):
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
        captions: the sidecars hold a caption of each item, as they did at first; `source` covers them.
        mirrored: of each item, its mirror image is encoded, too. A cache that has both serves runs that see one alone.
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
    mirrored: bool = True
    shard_items: int = 4096
    encode_batch: int = 64
    dtype: str = "float16"
    format: int = FORMAT

    kind: ClassVar[str] = "latents"
    what: ClassVar[str] = "latent cache"

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "CacheSpec":
        return cls(**{**tree, "shape": tuple(tree["shape"])})

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as JSON and `torch.load(weights_only=True)` take them."""
        tree = {**asdict(self), "shape": list(self.shape)}
        if self.mirrored:
            del tree["mirrored"]  # as all plans were written at first
        return tree

    @property
    def orientations(self) -> int:
        """Of each item: 1, plain, or 2, plain and mirrored."""
        return 2 if self.mirrored else 1

    @property
    def record(self) -> np.dtype:
        """One item: moments [orientation, mean or std, c, h, w] and the label (-1 for none)."""
        return np.dtype([("moments", "<f2", (self.orientations, 2, *self.shape)), ("label", "<i8")])

    def facts(self) -> dict[str, Any]:
        """The compared facts under dotted keys."""
        tree = {key: value for key, value in self.to_dict().items() if key not in ("shard_items", "encode_batch")}
        # The encoder's hash is left out, so that a cache has the name that it always had.
        tree["autoencoder"] = {key: value for key, value in self.autoencoder.items() if key not in ("path", "encoder")}
        tree["pixels"] = {key: value for key, value in self.pixels.items() if key != "value_range"}
        return as_json(tree)

    def differences(self, found: "CacheSpec") -> list[str]:
        """One line for each fact in which `found` differs from this plan; that it has mirror images, too, is none."""
        # A configuration stored under former names means the same.
        ours, theirs = (replace(plan, autoencoder=current_plain(plan.autoencoder)).facts() for plan in (self, found))
        ours["source"], theirs["source"] = comparable(self.source, found.source)
        ours["mirrored"], theirs["mirrored"] = self.mirrored, self.mirrored and found.mirrored
        other_decoder = ours.get("autoencoder.weights") != theirs.get("autoencoder.weights")
        skipped = _OF_DECODER if other_decoder and same_encoder(self.autoencoder, found.autoencoder) else ()
        return differing(ours, theirs, skipped)


@dataclass(frozen=True)
class Manifest(Finished[CacheSpec]):
    """A finished cache: its plan, its statistics, its shards. Also stored in every stage-2 checkpoint.

    Args:
        plan: what was encoded.
        mean, std: per channel (c,), over all items, positions and orientations, in fp64; the variance is that of the
            latents that training sees: the variance of the means plus the mean of the posterior variances.
        broken: items that could not be read and hold no record.
        shards: {"crc32": hex, "items": count} for each.
        sizes: heights and widths of the images, pixels, where several caches of one each, in buckets, were joined
            (bucketed.py); `plan` then has the size of most of them. None: all are of that of the plan.
    """

    plan: CacheSpec
    mean: list[float]
    std: list[float]
    broken: list[int]
    shards: list[dict[str, Any]]
    sizes: list[list[int]] | None = None
    _placed: dict[torch.device, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    SPEC: ClassVar[type[Spec]] = CacheSpec
    FORMAT: ClassVar[int] = FORMAT

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "Manifest":
        return cls(**{**tree, "plan": CacheSpec.from_dict(tree["plan"])})

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as JSON and `torch.load(weights_only=True)` take them."""
        return {
            "plan": self.plan.to_dict(),
            "mean": list(self.mean),
            "std": list(self.std),
            "broken": list(self.broken),
            "shards": [dict(shard) for shard in self.shards],
            **({} if self.sizes is None else {"sizes": [list(size) for size in self.sizes]}),
        }

    @property
    def statistics(self) -> Statistics:
        return Statistics([*self.mean], [*self.std])

    def standardized_by(self, statistics: Statistics) -> "Manifest":
        """The same latents on another scale."""
        return replace(self, mean=[*statistics.mean], std=[*statistics.std])

    def shard_bytes(self, shard: int) -> int:
        return len(self.plan.shard_range(shard)) * self.plan.record.itemsize

    def decoded_by(self, autoencoder: Mapping[str, Any]) -> "Manifest":
        """Of the same latents, decoded by one that is at hand: the same autoencoder, wherever it is now, or another
        decoder of the same encoder. Itself if it says that already."""
        own = self.plan.autoencoder
        if autoencoder["weights"] == own["weights"]:
            # Of it the hash of the encoder, which plans did not have at first, and where it is.
            autoencoder = {**autoencoder, **own, "path": autoencoder.get("path", "")}
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


def verify(folder: Path | str, progress: Progress = lambda done, total: None) -> Manifest:
    """Read every byte of the finished cache in `folder` and compare with its checksums.

    Args:
        folder: of the cache.
        progress: called with (shards checked, shards).

    Raises:
        DataError: names every damaged file.
    """
    manifest = Manifest.read(Path(folder))
    verify_all_bytes(Path(folder), manifest, progress)
    return manifest
