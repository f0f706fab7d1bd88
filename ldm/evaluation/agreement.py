"""Whether samples show what they were asked to show."""

from torch import Tensor

from ldm.runtime.float64 import double


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share in [0, 1] of rows of a classifier's `logits` (N, K) whose largest entry is at `labels` (N,)."""
    return double(logits.argmax(dim=1) == labels).mean().item()
