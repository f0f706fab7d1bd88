"""Whether samples are what they were asked to be: measures of a model that reads pictures, masks, maps or boxes.

Every measure has rows of numbers, one a sample, and beside its values those of a baseline that knows nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from ldm.evaluation.feature_store import Column
from ldm.evaluation.values import Value
from ldm.sampling.conditions import Condition

FOLLOWED = ("psnr", "ssim", "lpips", "boxes", "map")
"""Measures of samples of dense models, by their names on the command line."""


class Followed(NamedTuple):
    """A batch of samples, and what they were asked by; all of it on the CPU.

    Attributes:
        images: the samples, (n, C, H, W) uint8.
        truths: the pictures of the items that they were asked by, (n, C, H, W) uint8.
        conditions: what each was asked by, n (`DenseItems.condition`).
        others: what the sample of the next seed is asked by, n: conditions shuffled, whatever batches and ranks are.
    """

    images: Tensor
    truths: Tensor
    conditions: Sequence[Condition]
    others: Sequence[Condition]


class Measure(Protocol):
    """Something to be known of samples and what they were asked by."""

    @property
    def column(self) -> Column:
        """Computes (n, k) rows from a `Followed`."""

    def values(self, rows: np.ndarray) -> list[Value]:
        """The numbers, with standard errors, from all rows (N, k).

        Baselines are values of their own, whose names say so: "PSNR in the hole", "PSNR in the hole, mean fill".
        """
