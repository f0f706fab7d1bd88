"""From pictures to an open cache of their latents: what it has to hold, where it lies, and how an item is read."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm.autoencoder.codec import Codec
from ldm.data.dataset import ImageDataset, decoding, emptied_classes, has_captions, with_aligned
from ldm.data.transforms import EvalTransform, transformed
from ldm.errors import DataError
from ldm.latents.build import Source, build, shard_items
from ldm.latents.manifest import CacheSpec
from ldm.latents.places import note_source, noted_source, place
from ldm.latents.reader import LatentCache
from ldm.latents.source import former_source, source
from ldm.runtime import distributed
from ldm.runtime.memory import advised
from ldm.runtime.progress import shown
from ldm.sizes import Size

log = logging.getLogger(__name__)


class SizedPart(NamedTuple):
    """Pictures that are cropped to one size: a data set, or a bucket of it.

    Attributes:
        name: of their cache.
        dataset: the pictures.
        size: height and width, pixels.
        max_broken: how many of them may be unreadable.
        mirrored: their mirror images are seen, too.
        items: their numbers in the whole data set; None: they are all of it.
    """

    name: str
    dataset: ImageDataset
    size: Size
    max_broken: int
    mirrored: bool
    items: np.ndarray | None = None


@dataclass(frozen=True)
class Encoding:
    """How caches are made.

    Args:
        codec: the autoencoder.
        weights: its hash.
        transform_of: of pictures of a size.
        cache: folder with a cache for each part, by its name; None: each is `cache/<fingerprint>`.
        encode_batch_size: images encoded at once.
        read_threads: threads that decode images.
        trust: packages that the configuration of an autoencoder may name.
    """

    codec: Codec
    weights: str
    transform_of: Callable[[Size], EvalTransform]
    cache: Path | None = None
    encode_batch_size: int = 64
    read_threads: int = 4
    trust: Sequence[str] = ()

    @property
    def encoder(self) -> str:
        """The hash of what determines latents; that of the whole autoencoder where it has no other."""
        return str(self.codec.describe(self.weights).get("encoder", self.weights))

    def plan(self, part: SizedPart) -> CacheSpec:
        """What the cache of a part has to hold."""
        dataset = part.dataset
        pixels = self.transform_of(part.size).describe()
        plan = CacheSpec(
            shape=self.codec.latent_shape(part.size),
            num_items=len(dataset),
            source=source(dataset),
            pixels={**pixels, "channels": self.codec.in_channels, **decoding(dataset)},
            autoencoder=self.codec.describe(self.weights),
            num_classes=dataset.num_classes,
            class_names=dataset.class_names,
            mirrored=part.mirrored,
            encode_batch=self.encode_batch_size,
        )
        items = shard_items(plan.num_items, plan.record.itemsize, plan.encode_batch)
        return replace(plan, shard_items=items)

    def place(self, part: SizedPart) -> tuple[Path, CacheSpec]:
        """The cache's folder, and the plan as it would be written there."""
        plan = self.plan(part)
        plans = [plan, replace(plan, source=former_source(part.dataset))]
        if part.items is None and has_captions(part.dataset):
            plans.append(replace(plan, source=part.dataset.fingerprint(), captions=True))
        plans += [replace(one, mirrored=True) for one in plans if not one.mirrored]
        return place(plans, None if self.cache is None else self.cache / part.name, self.trust)

    def open(self, part: SizedPart, folder: Path, plan: CacheSpec) -> LatentCache:
        """The cache, completed together with all other ranks.

        Raises:
            DataError: it is damaged, or was made from another autoencoder or other images.
        """
        pictures = Source(
            read=lambda item: self.read(part, item, plan.captions),
            name=part.dataset.path,
            max_broken=part.max_broken,
            threads=self.read_threads,
        )
        # The layout that a folder was begun with applies to whoever goes on with it.
        advice = f"Lower data.params.encode_batch_size ({plan.encode_batch}), and remove {folder}, if it was begun so."
        with shown(f"{part.name} latents", silent=not distributed.is_main()) as progress, advised(advice):
            ranks = distributed.rank(), distributed.world_size()
            manifest = build(folder, plan, self.codec.encode, pictures, *ranks, progress)
        cache = LatentCache(folder, plan, manifest)
        if cache.plan.source != plan.source:
            known = noted_source(folder)
            plan.require(folder, replace(plan, source=known or plan.source))
            if known is None and distributed.is_main():
                note_source(folder, plan)
        return cache

    def read(self, part: SizedPart, item: int, captions: bool) -> Mapping[str, Any]:
        """What is encoded of an item; `captions`: with its caption."""
        dataset = part.dataset
        row = dataset[item] if captions else with_aligned(dataset, item, ())
        transform = self.transform_of(part.size)
        return {**row, "image": transformed(row["image"], transform, self.codec.in_channels, dataset.path(item))}


def check_broken(dataset: ImageDataset, parts: Sequence[SizedPart], caches: Sequence[LatentCache]) -> None:
    """DataError if too many items of a data set are broken; a warning if all of a class are."""
    broken: list[int] = []
    for part, cache in zip(parts, caches, strict=True):
        found = cache.manifest.broken
        broken += found if part.items is None else part.items[found].tolist()
    if len(broken) > (most := parts[0].max_broken):
        raise DataError(
            f"{caches[0].folder}, ...: {len(broken)} items could not be read, {most} are allowed: fix or remove them, "
            "or raise data.params.max_broken; what is already encoded is kept"
        )
    if distributed.is_main() and (emptied := emptied_classes(dataset, broken)):
        log.warning(
            "%s: none of the images of these classes could be read, so they are missing from training: %s; fix them, "
            "remove the folder, and run the same command again",
            *(caches[0].folder, ", ".join(emptied)),
        )
