"""Maps of classes as conditions: which class each pixel belongs to."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.conditioners.base import Conditioning, latent_size
from ldm.diffusion.conditioners.given import Field
from ldm.errors import ConfigError
from ldm.ranges import Count
from ldm.sizes import Size, is_multiple, spell


class SemanticMap(nn.Module):
    """The batch's `map` (N, H, W) as an image: a learned row of each class, averaged over the pixels of a latent's.

    This is latent diffusion's SpatialRescaler (Rombach et al. 2022, semantic synthesis), which halves the one-hot map
    bilinearly until it has the latent's size, then projects it without bias: an average and a linear map, whose order
    does not matter. The rows are looked up first, since there are fewer channels than classes.

    Unlabeled pixels are zeros: below 0 or, where 255 is no class, 255. So is the null, a map without a label.

    Args:
        map_classes: of the map: 0 .. map_classes - 1.
        channels: of the image, the network's `spatial_channels`; None: as many as classes, the one-hot itself.
        nearest: the class of one pixel, the top left one, in place of the average over all.

    Raises:
        ConfigError: a batch has no such map, its sides are no multiples of the latent's, or, on the CPU, it has a class
            that does not exist. (Elsewhere, torch stops the program at such a class.)
    """

    keys = ("map",)

    def __init__(self, map_classes: Count, channels: Count | None = 3, nearest: bool = False) -> None:
        super().__init__()
        self.map_classes = map_classes
        self.channels = channels or map_classes
        self.nearest = nearest
        self.table = None if channels is None else nn.Embedding(map_classes, channels)
        self.register_buffer("_place", torch.zeros(()), persistent=False)  # where the model is, and its type
        self._field = Field("map", [None, None], "data.params.aligned.map has it kept in the cache, ")

    def forward(self, batch: Mapping[str, Any]) -> Conditioning:
        classes = self._classes(self._field.find(batch))  # (N, H, W)
        rows, columns = _factors(_size(classes), latent_size(batch))
        if self.nearest:
            return Conditioning(spatial=self._image(classes[:, ::rows, ::columns]))
        return Conditioning(spatial=F.avg_pool2d(self._image(classes), (rows, columns)))  # (N, channels, h, w)

    def null(self, n: int) -> Conditioning:
        return Conditioning(spatial=self.get_buffer("_place").new_zeros(n, self.channels, 1, 1))

    def _classes(self, given: Tensor) -> Tensor:
        """int64: 0 where there is no label, else 1 + the class."""
        unlabeled = given < 0
        if given.dtype == torch.uint8 or self.map_classes <= 255:
            unlabeled = unlabeled | (given == 255)
        classes = (1 + given.long()).masked_fill(unlabeled, 0)
        if classes.device.type == "cpu" and classes.numel() and (most := int(classes.max())) > self.map_classes:
            raise ConfigError(
                f"condition map: found class {most - 1}, expected 0 to {self.map_classes - 1} (map_classes="
                f"{self.map_classes}), or 255 (uint8) or -1 for unlabeled"
            )
        return classes.to(self.get_buffer("_place").device)

    def _image(self, classes: Tensor) -> Tensor:
        """(N, H, W) -> (N, channels, H, W)."""
        if self.table is None:
            hot = F.one_hot(classes, 1 + self.map_classes)[..., 1:]
            return hot.movedim(-1, 1).to(self.get_buffer("_place").dtype)
        weight = self.table.weight  # (map_classes, channels)
        return F.embedding(classes, torch.cat([torch.zeros_like(weight[:1]), weight])).movedim(-1, 1)


def _size(given: Tensor) -> Size:
    return given.shape[-2], given.shape[-1]


def _factors(found: Size, latent: Size) -> Size:
    """How many pixels of a map make one of the latent, down and across."""
    if not is_multiple(found, latent):
        raise ConfigError(
            f"condition map: {spell(found)} pixels, expected whole multiples of the latent's sides, {spell(latent)}, "
            "such as those of its picture"
        )
    return found[0] // latent[0], found[1] // latent[1]
