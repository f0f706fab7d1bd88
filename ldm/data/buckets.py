"""Buckets: pictures of many shapes and sizes, each cropped to the nearest of a few, so that a batch is of one size."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import numpy as np
from annotated_types import Interval

from ldm.data.dataset import ImageDataset, sizes
from ldm.errors import ConfigError, DataError
from ldm.ranges import Count, Resolution
from ldm.runtime import distributed
from ldm.sizes import Size, as_size

log = logging.getLogger(__name__)


class Buckets:
    """Which sizes there are, and which one a picture is cropped to.

    A picture goes to the size whose proportions are nearest to its own (the ratio of height to width, on a log scale).
    Of several resolutions it goes to the largest one that does not enlarge it, or to the smallest.

    Args:
        resolutions: a number of pixels each, the side of a square. The other sizes of a resolution have about as many
            pixels and no more: for each short side the longest side that fits (Podell et al. 2023, "SDXL", app. I).
        step: sides are multiples of it, pixels; itself a multiple of the autoencoder's down factor times the patch or
            what the network divides its latents by.
        max_ratio: of the long side to the short one.
        sizes: instead of resolutions: all sizes, each the side of a square or [height, width]. Sizes whose areas are
            within a factor of two of the largest are one resolution, and so on.
        min_items: a bucket of fewer items joins the nearest one; None: as many as a global batch holds.
        constant_tokens: batches of smaller sizes hold more images, so that a batch has about as many pixels (and
            tokens of latents) whatever its size is; `batch_size` is that of the largest size. Otherwise all batches
            hold as many images. Items are visited equally often either way.
        batch_multiple: with constant tokens, batches are multiples of it, and so is `batch_size`; all numbers of ranks
            times micro-batches that a run may be continued with must divide it.

    Raises:
        ConfigError: neither or both of resolutions and sizes; no sizes; a resolution that is no multiple of the step.
    """

    def __init__(
        self,
        resolutions: Sequence[Count] | None = None,
        step: Count = 64,
        max_ratio: Annotated[float, Interval(ge=1)] = 2.0,
        sizes: Sequence[Resolution] | None = None,
        min_items: Count | None = None,
        constant_tokens: bool = False,
        batch_multiple: Count = 8,
    ) -> None:
        if bool(resolutions) == bool(sizes):
            raise ConfigError("data.params.buckets: expected either resolutions or sizes, at least one")
        if sizes:
            self.tiers = _tiers([as_size(size) for size in sizes])
        else:
            self.tiers = [sizes_of(side, step, max_ratio) for side in sorted(set(resolutions or ()), reverse=True)]
            for larger, tier in pairwise(self.tiers):  # close resolutions may share a size
                tier[:] = [size for size in tier if size not in larger]
        self.min_items = min_items
        self.constant_tokens = constant_tokens
        self.batch_multiple = batch_multiple

    @property
    def sizes(self) -> list[Size]:
        """All sizes, (height, width) in pixels: those of the largest resolution first, each from wide to high."""
        return [size for tier in self.tiers for size in tier]

    def batch_size(self, size: Size, batch_size: int) -> int:
        """Images of a global batch of this size, where one of the largest size holds `batch_size`.

        Raises:
            ConfigError: `batch_size` is not a multiple of `batch_multiple`.
        """
        if not self.constant_tokens:
            return batch_size
        multiple = self.batch_multiple
        if batch_size % multiple:
            raise ConfigError(
                "data.params.batch_size: expected a multiple of data.params.buckets.params.batch_multiple "
                f"({multiple}), found {batch_size}"
            )
        largest = max(height * width for height, width in self.sizes)
        return max(1, round(batch_size * largest / (size[0] * size[1] * multiple))) * multiple

    def assign(self, pictures: np.ndarray) -> np.ndarray:
        """The index into `sizes` of each picture, (N,) int64, before small buckets are merged.

        Args:
            pictures: (N, 2) heights and widths, pixels; 0, 0 where they are not known: such go to the largest bucket.
        """
        known = (pictures > 0).all(1)
        heights, widths = np.maximum(pictures, 1).T
        found = np.full(len(pictures), -1)
        start = 0
        for tier in self.tiers:
            nearest = _nearest(np.log(heights / widths), tier)
            sizes = np.array(tier)[nearest]
            fits = (sizes[:, 0] <= heights) & (sizes[:, 1] <= widths)
            free = (found < 0) & (fits | (tier is self.tiers[-1]))
            found[free] = start + nearest[free]
            start += len(tier)
        if known.any():
            found[~known] = np.bincount(found[known]).argmax()
        return found


@dataclass(frozen=True)
class Assigned:
    """The items of a data set in buckets, of which none is empty.

    Attributes:
        sizes: of the buckets, (height, width) in pixels.
        items: of each bucket, ascending.
        cropped: the mean fraction of a picture that its crop leaves out, for each bucket.
        enlarged: how many pictures of each bucket are smaller than the crop.
    """

    sizes: list[Size]
    items: list[np.ndarray]
    cropped: list[float]
    enlarged: list[int]

    def item(self, row: int) -> int:
        """The item of a row; rows number the items bucket by bucket."""
        return int(np.concatenate(self.items)[row])

    def targets(self) -> np.ndarray:
        """The size that each item is cropped to: (N, 2) int64."""
        found = np.zeros((sum(map(len, self.items)), 2), dtype=np.int64)
        for size, few in zip(self.sizes, self.items, strict=True):
            found[few] = size
        return found

    @property
    def default(self) -> int:
        """The bucket with the most items; of several, the one nearest to a square, then the largest."""

        def key(bucket: int) -> tuple[float, ...]:
            height, width = self.sizes[bucket]
            return -len(self.items[bucket]), abs(math.log(height / width)), -height * width

        return min(range(len(self.sizes)), key=key)

    def table(self, batch_sizes: Sequence[int]) -> str:
        """A line for each bucket: size, items, what is cropped and enlarged, images of a global batch."""
        lines = [f"{'height x width':>16}{'items':>10}{'cropped':>10}{'enlarged':>10}{'batch':>8}"]
        rows = zip(self.sizes, self.items, self.cropped, self.enlarged, batch_sizes, strict=True)
        lines += [
            f"{f'{height} x {width}':>16}{len(items):>10}{cropped:>10.1%}{enlarged:>10}{batch:>8}"
            for (height, width), items, cropped, enlarged, batch in rows
        ]
        return "\n".join(lines)


def assigned(
    buckets: Buckets, pictures: np.ndarray, min_items: int = 1, among: Sequence[Size] | None = None
) -> Assigned:
    """The buckets of pictures; one that holds too few joins the nearest other one, which a warning counts.

    The nearest of two sizes is the one whose height and width differ least, on a log scale.

    Args:
        pictures: (N, 2) heights and widths, pixels; 0, 0 where they are not known.
        min_items: fewer items are too few.
        among: the only sizes that may be used, such as those that a model is trained on; None: all.
    """
    known, wanted = buckets.sizes, buckets.assign(pictures)
    kept = np.unique(wanted) if among is None else np.array([known.index(size) for size in among])
    while True:
        found = _nearest_size(known, kept)[wanted]
        counts = np.bincount(found, minlength=len(known))[kept]
        if among is not None or len(kept) == 1 or counts.min() >= min_items:
            break
        kept = np.delete(kept, counts.argmin())
    given_up = len(np.unique(wanted)) - len(kept)
    if among is None and given_up and distributed.is_main():
        log.warning(
            "data.params.buckets: %d of %d sizes would hold fewer than %d items; the %d items concerned, of %d, join "
            "the nearest bucket",
            *(given_up, given_up + len(kept), min_items, int((found != wanted).sum()), len(pictures)),
        )
    return _described(known, found, pictures)


def picture_sizes(dataset: ImageDataset) -> np.ndarray:
    """(N, 2) int64, height and width of every item; ConfigError if the data set does not have them."""
    found = sizes(dataset)
    if found is None:
        raise ConfigError(
            f"data.params.buckets: the data set of {dataset.path(0)}, ... does not know the sizes of its pictures: "
            "give it a method sizes() (ldm/data/dataset.py::Sized), or name one resolution instead of buckets"
        )
    if found.shape != (len(dataset), 2):
        raise DataError(f"{type(dataset).__name__}.sizes(): expected {(len(dataset), 2)}, found {found.shape}")
    return found


def sizes_of(resolution: int, step: int, max_ratio: float) -> list[Size]:
    """Sizes of at most as many pixels as the square, from wide to high; ConfigError if the step does not divide it."""
    if resolution % step:
        near = sorted({max(1, resolution // step) * step, -(-resolution // step) * step})
        raise ConfigError(
            f"data.params.buckets: expected resolutions that are multiples of the step {step}, found {resolution}: "
            f"use {' or '.join(map(str, near))}"
        )
    pairs = [(short, resolution**2 // short // step * step) for short in range(step, resolution + 1, step)]
    kept = {pair for pair in pairs if pair[1] <= max_ratio * pair[0]}
    return sorted({*kept, *(pair[::-1] for pair in kept)}, key=lambda size: size[0] / size[1])


def _tiers(sizes: Sequence[Size]) -> list[list[Size]]:
    """Sizes by resolution: the largest first, then whatever has less than half its area."""
    tiers: list[list[Size]] = []
    for size in sorted(set(sizes), key=math.prod, reverse=True):
        if not tiers or 2 * math.prod(size) < math.prod(tiers[-1][0]):
            tiers.append([])
        tiers[-1].append(size)
    return [sorted(tier, key=lambda size: (size[0] / size[1], size)) for tier in tiers]


def _nearest(log_ratios: np.ndarray, tier: Sequence[Size]) -> np.ndarray:
    """The index of the size of the nearest ratio, for each; sizes from wide to high."""
    known = np.log([height / width for height, width in tier])
    return np.searchsorted((known[1:] + known[:-1]) / 2, log_ratios)


def _nearest_size(sizes: Sequence[Size], kept: np.ndarray) -> np.ndarray:
    """For each of the sizes, which of those `kept` is nearest: indices into `sizes`."""
    sides = np.log(np.array(sizes))
    return kept[np.abs(sides[:, None] - sides[kept]).sum(2).argmin(1)]


def _described(sizes: Sequence[Size], found: np.ndarray, pictures: np.ndarray) -> Assigned:
    heights, widths = np.maximum(pictures, 1).T
    used = np.unique(found).tolist()
    items = [np.flatnonzero(found == bucket) for bucket in used]
    cropped, enlarged = [], []
    for bucket, few in zip(used, items, strict=True):
        ratio = heights[few] * sizes[bucket][1] / (widths[few] * sizes[bucket][0])
        cropped.append(float(1 - np.minimum(ratio, 1 / ratio).mean()))
        enlarged.append(int(((heights[few] < sizes[bucket][0]) | (widths[few] < sizes[bucket][1])).sum()))
    return Assigned([sizes[bucket] for bucket in used], items, cropped, enlarged)
