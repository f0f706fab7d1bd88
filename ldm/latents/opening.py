"""From the data sets of a data module to their open caches: which parts there are, each completed, then read as one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm.data.bucketed import Bucketing
from ldm.data.dataset import ImageDataset, has_captions
from ldm.latents.bucketed import BucketedLatents, joined
from ldm.latents.columns import Crop
from ldm.latents.conditions import Captions, Conditions
from ldm.latents.dataset_parts import DatasetParts
from ldm.latents.dense import Dense, DenseRows
from ldm.latents.encoding import Encoding, SizedPart, check_broken
from ldm.latents.manifest import Manifest
from ldm.latents.reader import LatentCache, LatentDataset
from ldm.ranges import Fraction
from ldm.sizes import Size


@dataclass(frozen=True)
class Sources:
    """The data sets of a data module.

    Args:
        datasets: `train` and, if there is one, `validation`.
        size: of their pictures; with buckets, that of most.
        bucketing: None: pictures are of one size.
        cache: folder that holds all of the cache; None: `cache/`.
        max_broken: the fraction of the items that may be unreadable.
        threads: that read.
        flip: training sees mirror images, too.
    """

    datasets: Mapping[str, ImageDataset]
    size: Size
    bucketing: Bucketing | None
    cache: Path | None
    max_broken: Fraction
    threads: int
    flip: bool

    def sized(self, name: str) -> list[SizedPart]:
        """The parts of a data set whose pictures are cropped to one size."""
        most, mirrored = self._most_broken(name), self.flip and name == "train"
        if self.bucketing is None:
            return [SizedPart(name, self.datasets[name], self.size, most, mirrored)]
        parts = zip(self.bucketing.parts(name), self.bucketing.of(name).items, strict=True)
        return [
            SizedPart(f"{name}-{size[0]}x{size[1]}", part, size, most, mirrored, items) for (size, part), items in parts
        ]

    def targets(self, name: str) -> np.ndarray:
        """The size that each picture of a data set is cropped to: (2,), or (items, 2) with buckets."""
        return np.array(self.size) if self.bucketing is None else self.bucketing.of(name).targets()

    def parts(self, name: str) -> DatasetParts:
        """What the cache keeps of a data set, whatever the size of its pictures."""
        return DatasetParts(name, self.datasets[name], self.cache, self._most_broken(name), self.threads)

    def joined(self, caches: Sequence[LatentCache]) -> Manifest:
        """One manifest of the caches of the training data."""
        if self.bucketing is None:
            return caches[0].manifest
        return joined(caches, self.bucketing.train, self.datasets["train"])

    def _most_broken(self, name: str) -> int:
        """How many items of a data set may be unreadable."""
        return int(self.max_broken * len(self.datasets[name]))


@dataclass(frozen=True)
class Opened:
    """What is made of a data set with the autoencoder, open.

    Args:
        parts: of the data set, one for each size.
        caches: of their latents.
        dense: what lies on their pictures; None: nothing is wanted.
        captions: of the whole data set; None: it has none.
    """

    parts: Sequence[SizedPart]
    caches: Sequence[LatentCache]
    dense: Sequence[DenseRows | None]
    captions: Captions | None

    def rows(self, seed: int, flip: bool, conditions: Conditions) -> LatentDataset | BucketedLatents:
        """What a loader reads; the arguments are those of `LatentDataset`."""
        each = zip(self.parts, self.caches, self.dense, strict=True)
        rows = [LatentDataset(cache, seed, flip, conditions, part.items, dense) for part, cache, dense in each]
        return rows[0] if self.parts[0].items is None else BucketedLatents(rows)


def opened(name: str, sources: Sources, encoding: Encoding, dense: Dense) -> Opened:
    """Whatever is missing of a data set, `train` or `validation`, is built together with all other ranks.

    Raises:
        DataError: a cache is damaged, or was made from another autoencoder or other images.
    """
    dataset, parts = sources.datasets[name], sources.sized(name)
    placed = [encoding.place(part) for part in parts]
    inside, captions = placed[0][1].captions, None
    if has_captions(dataset) and not inside:  # first, since what is wrong with them is seen in seconds
        captions = sources.parts(name).captions()
    rows = [_dense(part, sources, encoding, dense) for part in parts]
    caches = [encoding.open(part, *where) for part, where in zip(parts, placed, strict=True)]
    check_broken(dataset, parts, caches)
    return Opened(parts, caches, rows, caches[0] if inside else captions)


def _dense(part: SizedPart, sources: Sources, encoding: Encoding, dense: Dense) -> DenseRows | None:
    """What lies on the pictures of a part, computed where it is not there."""
    parts = DatasetParts(part.name, part.dataset, sources.cache, part.max_broken, sources.threads)
    crop = Crop(encoding.transform_of(part.size), encoding.codec.in_channels)
    return dense.opened(parts, crop, encoding.codec, encoding.encoder, part.mirrored)
