"""A feature space: a frozen network that maps pictures to vectors, and what two numbers must share to be compared.

A distance of distributions is a distance in a feature space. Its name says which network, which layer and how pictures
were resized for it; `weights` says which numbers the network holds. Only where both are equal can two distances be
compared.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

MAIN = "features"
"""The part of every space that distances are computed in."""

LOGITS = "logits"
"""The part of a classifier's space that holds its logits: the Inception Score and the accuracy are computed of it."""

SPATIAL = "spatial"
"""The part with a sense of place, which sFID compares (Nash et al. 2021, arXiv:2103.03841)."""


class Features(nn.Module, ABC):
    """Pictures (N, C, H, W) uint8, gray (C = 1) or RGB -> (N, D) float32, on the module's device; always in eval mode.

    Attributes:
        name: network, layer and resize rule, such as "alexnet-pool5/clean-224": what a distance in it is called after.
        weights: SHA-256 of the weights, hex.
        parts: which columns are what; `MAIN` is always among them, `LOGITS` and `SPATIAL` where the network has them.
    """

    name: str
    weights: str
    parts: Mapping[str, slice]

    def train(self, mode: bool = True) -> "Features":
        """Always stays in eval mode."""
        return super().train(False)

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """(N, D) float32: all parts side by side."""
