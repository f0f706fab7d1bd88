"""Whether samples show what they were asked to show: a class, things in boxes, a map of classes.

What a judge finds in samples stands beside what it finds where nothing was known, asked for something else
("shuffled"), and beside what it finds in the real pictures, which is what can be had.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ldm.errors import DataError
from ldm.evaluation.distances.spread import jackknife
from ldm.evaluation.feature_store import Column
from ldm.evaluation.features.classifier import UNLABELED
from ldm.evaluation.followed import Followed, turns
from ldm.evaluation.judges import BoxClassifier, Judge, MapSegmenter
from ldm.evaluation.pictures.base import digest
from ldm.evaluation.values import Value
from ldm.ranges import Count
from ldm.runtime.float64 import double
from ldm.sampling.conditions import Condition

BESIDE = ("", ", shuffled", ", real pictures")
"""What follows the names of values: of samples, of samples and what others were asked by, of the real pictures."""


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share in [0, 1] of rows of a classifier's `logits` (N, K) whose largest entry is at `labels` (N,)."""
    return double(logits.argmax(dim=1) == labels).mean().item()


class Agreement(ABC):
    """What a judge says of samples, of samples and what others were asked by, and of the real pictures.

    Args:
        judge: which looks at them.
        items: how many ask in turn; None: each sample is asked for by one of its own.

    Attributes:
        what: is asked for, a key of conditions.
        statistics: by name, each of sums (M, k) of `counts` over items -> (M,).
    """

    what: ClassVar[str]
    statistics: ClassVar[Mapping[str, Callable[[np.ndarray], np.ndarray]]]

    def __init__(self, judge: Judge, items: Count | None = None) -> None:
        self.judge = judge
        self.items = items

    @property
    def column(self) -> Column:
        return Column(digest({self.what: self.judge.weights}), self.rows, self.what)

    @abstractmethod
    def counts(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """(n, k) float64, of which the first is 0 where nothing is asked for.

        Args:
            images: (n, C, H, W) uint8.
            conditions: what each should show.

        Raises:
            DataError: one has a class that the judge does not know.
        """

    def rows(self, made: Followed) -> Tensor:
        """(n, 3 k): the counts, in the order of `BESIDE`."""
        images, truths, conditions, others = made
        pairs = (images, conditions), (images, others), (truths, conditions)
        return torch.cat([self.counts(*pair) for pair in pairs], dim=1)

    def values(self, rows: np.ndarray) -> list[Value]:
        """The numbers, with errors over items, from all rows (N, 3 k)."""
        asking = turns(len(rows), self.items)
        of_items = np.zeros((asking.max() + 1, rows.shape[1]))
        np.add.at(of_items, asking, rows)
        parts = zip(BESIDE, np.split(of_items, len(BESIDE), axis=1), strict=True)
        return [value for beside, counts in parts for value in self.figures(counts, beside)]

    def figures(self, counts: np.ndarray, beside: str = "") -> list[Value]:
        """The statistics of counts (N, k), with errors by the jackknife; none where nothing is asked for."""
        counted = counts[counts[:, 0] > 0].astype(np.float64)
        if not len(counted):
            return []
        total, better = counted.sum(0), "" if beside else "higher"  # what stands beside is no merit of the model
        settings = {"items": len(counted), "counted": int(total[0])}
        found = []
        for name, statistic in self.statistics.items():
            value, error, freedom = float(statistic(total[None])[0]), None, None
            if len(counted) > 1:
                _, error, freedom = jackknife(value, statistic(total - counted).tolist()).measured
            found.append(Value(f"{name}{beside}", value, error, freedom, better=better, settings=settings))
        return found

    @abstractmethod
    def notes(self, rows: np.ndarray) -> list[str]:
        """What counted for nothing, from all rows (N, 3 k)."""


class BoxAgreement(Agreement):
    """How often a judge sees in a box what was asked for there, over all boxes. An empty layout counts for nothing.

    Args:
        judge: of the crops of boxes.
        items: as of `Agreement`.
    """

    what = "boxes"
    statistics: ClassVar = {"accuracy in boxes": lambda sums: sums[:, 1] / sums[:, 0]}

    def __init__(self, judge: BoxClassifier, items: Count | None = None) -> None:
        super().__init__(judge, items)
        self._classes_in = judge

    def counts(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """Boxes and hits of each picture, (n, 2)."""
        boxes = [torch.as_tensor(condition["boxes"]).reshape(-1, 5) for condition in conditions]
        wanted = torch.cat(boxes)[:, 4].long()
        _demand_known(wanted, self.judge.num_classes, self.what)
        number = torch.tensor([len(one) for one in boxes])
        hits = torch.zeros(len(boxes), dtype=torch.float64)
        owner = torch.repeat_interleave(torch.arange(len(boxes)), number)
        hits.index_add_(0, owner, double(self._classes_in(images, boxes) == wanted))
        return torch.stack([double(number), hits], dim=1)

    def notes(self, rows: np.ndarray) -> list[str]:
        empty = int((rows[:, 0] == 0).sum())
        return (
            [f"boxes: {empty} of {len(rows)} samples have an empty layout, which counts for nothing"] if empty else []
        )


class MapAgreement(Agreement):
    """How many pixels a judge sees in the class that the map asked for, and the mean over classes of their IoU.

    Intersections and unions are those of all samples together, and classes that are neither asked for nor seen are
    left out. Unlabeled pixels count for nothing.

    Args:
        judge: which draws maps.
        items: as of `Agreement`.
    """

    what = "map"
    statistics: ClassVar = {
        "pixel accuracy of the map": lambda sums: np.split(sums[:, 2:], 2, axis=1)[0].sum(1) / sums[:, 0],
        "mIoU of the map": lambda sums: mean_iou(*np.split(sums[:, 2:], 2, axis=1)),
    }

    def __init__(self, judge: MapSegmenter, items: Count | None = None) -> None:
        super().__init__(judge, items)
        self._map_of = judge

    def counts(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """Pixels that are labeled, pixels that are not, and of each class intersection and union: (n, 2 + 2 K)."""
        classes = self.judge.num_classes
        wanted = torch.stack([classes_of(torch.as_tensor(condition["map"]), classes) for condition in conditions])
        _demand_known(wanted, classes, self.what)
        seen, labeled = self._map_of(images), wanted != UNLABELED
        both, asked, drawn = (
            _histograms(values, where, classes)
            for values, where in ((seen, labeled & (seen == wanted)), (wanted, labeled), (seen, labeled))
        )
        known = labeled.flatten(1).sum(1, keepdim=True)
        return double(torch.cat([known, labeled[0].numel() - known, both, asked + drawn - both], dim=1))

    def notes(self, rows: np.ndarray) -> list[str]:
        share = rows[:, 1].sum() / rows[:, :2].sum()
        return [f"map: {share:.1%} of the pixels are unlabeled, and count for nothing"] if share else []


def mean_iou(intersections: np.ndarray, unions: np.ndarray) -> np.ndarray:
    """The mean over classes, of those that there are: (M, K) twice -> (M,)."""
    return (intersections / np.maximum(unions, 1)).sum(1) / (unions > 0).sum(1)


def classes_of(values: Tensor, classes: Count) -> Tensor:
    """A map (H, W) as int64, `UNLABELED` where it is so: -1, and 255 of uint8 or where there are no such classes."""
    unlabeled = values < 0
    if values.dtype == torch.uint8 or classes <= 255:
        unlabeled = unlabeled | (values == 255)
    return torch.where(unlabeled, UNLABELED, values.long())


def _demand_known(wanted: Tensor, classes: Count, what: str) -> None:
    if wanted.numel() and int(wanted.max()) >= classes:
        raise DataError(f"{what}: the judge knows classes 0 to {classes - 1}, found {int(wanted.max())}")


def _histograms(values: Tensor, where: Tensor, classes: Count) -> Tensor:
    """How many pixels of each item have each class, of those `where`: (n, K) int64."""
    item = torch.arange(len(values))[:, None, None] * classes
    return torch.bincount((values + item)[where], minlength=len(values) * classes).reshape(-1, classes)
