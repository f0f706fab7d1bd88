"""Validation metrics of stage 2: what they see of a batch, and the standard ones.

How a configuration names others: ldm/runtime/validation_metrics.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchmetrics import Metric

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
    return {"loss": Loss(), "loss_ema": LossEMA()}


class Loss(Mean):
    """The objective's loss, by the trained weights."""

    def values(self, batch: Mapping[str, Any], output: Output) -> Tensor:
        return output.loss


class LossEMA(Mean):
    """The objective's loss, by their moving average."""

    def values(self, batch: Mapping[str, Any], output: Output) -> Tensor:
        return output.loss_ema
