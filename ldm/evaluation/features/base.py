"""A feature space: a frozen network that maps pictures to vectors, and what two numbers must share to be compared.

A distance of distributions is a distance in a feature space. Its name says which network, which layer and how pictures
were resized for it; `weights` says which numbers the network holds. Only where both are equal can two distances be
compared.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ldm.errors import ConfigError
from ldm.evaluation.features.resize import Resize
from ldm.ranges import Count
from ldm.runtime.full_precision import full_precision

MAIN = "features"
"""The part of every space that distances are computed in."""

LOGITS = "logits"
"""The part of a classifier's space that holds its logits: the Inception Score and the accuracy are computed of it."""

SPATIAL = "spatial"
"""The part with a sense of place, which sFID compares (Nash et al. 2021, arXiv:2103.03841)."""


def size(columns: slice) -> int:
    """How many columns a part has."""
    return int(columns.stop) - int(columns.start or 0)


class Features(nn.Module, ABC):
    """Pictures (N, C, H, W) uint8, gray (C = 1) or RGB -> (N, D) float32, on the module's device; always in eval mode.

    Attributes:
        name: network, layer and resize rule, such as "alexnet-conv5/clean-128": what a distance in it is called after.
        weights: SHA-256 of the weights, hex (ldm/weights/digest.py).
        parts: which columns are what, each with its start and stop; `MAIN` is always among them, `LOGITS` and
            `SPATIAL` where the network has them.
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


class FrozenNetwork(Features):
    """A space whose pictures are brought to the network's channels and size, and go through it in true float32.

    A subclass says what it takes from the network: `extract`, and `parts`.

    A picture's features depend on the batch that it is in by the order of float summation alone: convolution and
    matrix product choose their algorithm by the batch's shape. Measured on 64 photographs in batches of 7 and of 64,
    with one thread and AVX2: AlexNet's differ by at most 1.2e-6, which is 1.2e-7 of the largest feature (and 4.4e-5 of
    a small one), EfficientNet-lite0's by 4.1e-7 of the largest; 16 photographs gave the same bits in VGG16.

    Args:
        network: with its weights; frozen here.
        name: network and layer, such as "alexnet-conv5".
        weights: their hash.
        parts: the columns of what `extract` returns.
        resize: the rule and the size.
        channels: of the pictures that the network takes: gray ones are repeated to three.
    """

    def __init__(
        self,
        network: nn.Module,
        name: str,
        weights: str,
        parts: Mapping[str, slice],
        resize: Resize,
        channels: Count = 3,
    ) -> None:
        super().__init__()
        self.network = network
        self.name = f"{name}/{resize.name}"
        self.weights = weights
        self.parts = dict(parts)
        self.resize = resize
        self.channels = channels
        self.requires_grad_(False).eval()

    @abstractmethod
    def extract(self, pixels: Tensor) -> Tensor:
        """(N, channels, h, w) float32 in [0, 255], resized -> (N, D)."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(N, D) float32: all parts side by side.

        Raises:
            ConfigError: the pictures have channels that the network cannot see.
            TypeError: they are not uint8.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"{self.name}: pictures are uint8, 0 to 255, not {images.dtype}")
        device = next(self.network.parameters()).device
        images = self._in_its_channels(images.to(device))
        with full_precision(device.type):
            return self.extract(self.resize(images)).float()

    def _in_its_channels(self, images: Tensor) -> Tensor:
        found = images.shape[1]
        if found == self.channels:
            return images
        if found == 1:
            return images.expand(-1, self.channels, -1, -1)
        takes = "gray pictures (1 channel)" if self.channels == 1 else f"pictures of 1 or {self.channels} channels"
        raise ConfigError(
            f"the features {self.name} are of {takes}, found {found}: convert the pictures, or choose other features"
        )
