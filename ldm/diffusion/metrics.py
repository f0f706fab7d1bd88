"""Validation metrics of stage 2: what they see of a batch, and the standard ones.

How a configuration names others: ldm/runtime/validation_metrics.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ldm.runtime.float64 import double
from ldm.runtime.validation_metrics import Mean


@dataclass(frozen=True)
class Output:
    """What metrics see of a batch, beside what it holds.

    In validation an item has the same draws, level and noise each time.

    Attributes:
        loss: of each item, by the trained weights: (N,).
        loss_ema: of each item, by their moving average: (N,).
    """

    loss: Tensor
    loss_ema: Tensor


def standard() -> dict[str, Metric]:
    """The metrics that validation has without a word, in the order in which they are shown."""
    return {"loss": Loss(), "loss_ema": LossEMA(), "latent_std": LatentStd()}


class Loss(Mean):
    """The objective's loss, by the trained weights."""

    def values(self, batch: Mapping[str, Any], output: Output) -> Tensor:
        return output.loss


class LossEMA(Mean):
    """The objective's loss, by their moving average."""

    def values(self, batch: Mapping[str, Any], output: Output) -> Tensor:
        return output.loss_ema


class LatentStd(Metric):
    """The standard deviation of the standardized latents, of the channel where it is farthest from one (as a ratio)."""

    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Takes its shape, (3, c): number, sum and sum of squares, from the first batch.
        self.add_state("sums", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, batch: Mapping[str, Any], output: Output) -> None:
        latent = double(batch["latent"]).transpose(0, 1).flatten(1)  # (c, N h w)
        self.sums = self.sums + torch.stack([torch.ones_like(latent).sum(1), latent.sum(1), latent.square().sum(1)])

    def compute(self) -> Tensor:
        count, first, second = self.sums
        std = (second / count - (first / count).square()).clamp_min(0.0).sqrt()  # (c,)
        return std[std.log().abs().argmax()]
