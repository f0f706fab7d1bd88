"""What loaders read: a data set's items as rows of pixels, collated into batches; and unreadable images."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.dataset import ImageDataset, Picture, class_labels, named
from ldm.data.elastic_sampler import Address
from ldm.data.transforms import Transform, transformed
from ldm.errors import ConfigError, DataError
from ldm.randomness import Draws, ambient
from ldm.ranges import Count, CountOrZero, Fraction, Resolution, Seed
from ldm.sizes import as_size

logger = logging.getLogger(__name__)


def chosen(seed: int, numbers: Sequence[int] | np.ndarray, counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Which of an item's captions each sample sees: (N,) int64, 0 .. count - 1.

    Args:
        seed: of the run; of validation `VALIDATION_SEED`.
        numbers: (N,) sample numbers.
        counts: (N,) captions of each one's item, 1 or more.
    """
    drawn = Draws(seed, numbers, 1).uniform("caption").numpy().astype(np.float64)
    return np.floor(drawn * np.asarray(counts)).astype(np.int64)


class TransformedDataset(Dataset[dict[str, Any]]):
    """A data set as rows of a batch, addressed by (sample number, item).

    A row holds `image` (C,H,W), `class_label` and `caption` (one of several) where the data set has them,
    `sample_number`, and `broken` {item: message}: the unreadable items that were skipped before the one returned. An
    unreadable item is replaced by the next readable one, which depends only on the data: it is the same on every rank,
    in every worker and after a resume. `BrokenImages` reports and counts them in the main process.

    Args:
        dataset: the data set to read.
        transform: picture -> (channels, height, width) float32 in [-1,1].
        channels: expected of the transformed image.
        resolution: expected size of the transformed image.
        seed: the run's seed, for random transforms.
        patience: give up after this many unreadable items in a row and return a row without an image.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Transform,
        channels: Count,
        resolution: Resolution,
        seed: Seed,
        patience: Count = 100,
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.channels = channels
        self.size = as_size(resolution)
        self.seed = seed
        self.patience = patience

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, address: Address) -> dict[str, Any]:
        number, index = address
        broken: dict[int, str] = {}
        while len(broken) < min(self.patience, len(self)):
            candidate = (index + len(broken)) % len(self)
            try:
                item = self.dataset[candidate]
                row: dict[str, Any] = {**item, "image": self._pixels(item["image"], number, candidate)}
                if isinstance(captions := item.get("caption"), list):
                    row["caption"] = self._caption(captions, number, candidate)
            except DataError as error:
                broken[candidate] = str(error)
                continue
            return {**row, "sample_number": number, "broken": broken}
        return {"sample_number": number, "broken": broken}

    def _caption(self, captions: Sequence[str], number: int, index: int) -> str:
        """That of several which the sample sees."""
        if not captions:
            raise DataError(f"{self.dataset.path(index)}: has no caption")
        return captions[int(chosen(self.seed, [number], [len(captions)])[0])]

    def _pixels(self, image: Picture, number: int, index: int) -> Tensor:
        """The transformed image (C,H,W); refuses a transform that returns anything else."""
        with ambient(self.seed, "augment", number):
            pixels = transformed(image, self.transform, self.channels, self.dataset.path(index))
        expected = (self.channels, *self.size)
        if tuple(pixels.shape) != expected or pixels.dtype != torch.float32:
            raise ConfigError(
                f"the transform made {tuple(pixels.shape)} {pixels.dtype} of {self.dataset.path(index)}; "
                f"expected {expected} torch.float32 in [-1,1]: end it with a crop to data.params.resolution, "
                "v2.ToImage, v2.ToDtype(torch.float32, scale=True) and v2.Normalize([0.5], [0.5])"
            )
        return pixels


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows of a `TransformedDataset` -> a batch.

    It holds `image` (N,C,H,W), `class_label` (N,) int64, `caption` list of N, and what stays on the host:
    `sample_number` (N,) int64 array and `broken`.

    If a row has no image, the batch holds only the last two: `BrokenImages.check` must see it first.
    """
    broken = {index: message for row in rows for index, message in row["broken"].items()}
    batch: dict[str, Any] = {"sample_number": np.array([row["sample_number"] for row in rows]), "broken": broken}
    if any("image" not in row for row in rows):
        return batch
    batch["image"] = torch.stack([row["image"] for row in rows])
    if "class_label" in rows[0]:
        batch["class_label"] = torch.tensor([row["class_label"] for row in rows], dtype=torch.int64)
    if "caption" in rows[0]:
        batch["caption"] = [row["caption"] for row in rows]
    return batch


class BrokenImages:
    """Reports each unreadable image of one data set once, counts them, and stops the run if there are too many.

    A class with no readable image left is named.

    Args:
        total: items in the data set.
        allowed: the fraction of them that may be broken.
        dataset: the data set, for its classes; None: unknown.
    """

    def __init__(self, total: CountOrZero, allowed: Fraction, dataset: ImageDataset | None = None) -> None:
        self.total = total
        self.allowed = allowed
        self.dataset = dataset
        self.found: set[int] = set()
        self._labels: np.ndarray | None = None
        self._readable: np.ndarray | None = None  # images left of each class

    def check(self, batch: dict[str, Any]) -> None:
        """Remove `broken` from a batch and warn about new entries.

        Raises:
            DataError: more than the allowed fraction is broken.
        """
        broken: dict[int, str] = batch.pop("broken")
        for index, message in broken.items():
            if index not in self.found:
                self.found.add(index)
                logger.warning("%s; the next readable image takes its place (%d so far)", message, len(self.found))
                self._count(index)
        if broken and (len(self.found) > self.allowed * self.total or "image" not in batch):
            raise DataError(
                f"{len(self.found)} of {self.total} images are broken, more than the fraction of {self.allowed:g} that "
                f"data.params.max_broken allows; the last: {list(broken.values())[-1]}. "
                "Fix or remove them, or raise data.params.max_broken"
            )

    def _count(self, index: int) -> None:
        """Subtract a broken image from its class."""
        if self.dataset is None:
            return
        if self._readable is None:
            self._labels = class_labels(self.dataset)
            self._readable = np.bincount(np.zeros(0, int) if self._labels is None else self._labels)
        if self._labels is None:
            return
        label = int(self._labels[index])
        self._readable[label] -= 1
        if self._readable[label] == 0:
            (name,) = named(self.dataset, [label])
            logger.warning("class %s: none of its images can be read, so it is missing from training; fix them", name)
