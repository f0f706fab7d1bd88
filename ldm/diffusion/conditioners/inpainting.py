"""A picture with a hole as a condition: what is around the hole, and where it is."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.conditioners.given import Field
from ldm.errors import ConfigError
from ldm.ranges import Count, Finite
from ldm.sizes import is_multiple


class MaskedPicture(nn.Module):
    """The latent of the picture whose hole is filled with gray, and the mask: an image of `channels` + 1.

    As in latent diffusion (Rombach et al. 2022, inpainting_big) and Stable Diffusion's inpainting. A batch has
    `masked_latent` (N, channels, h, w), standardized, and `mask` (N, 1, H, W) in pixels, 1 in the hole and 0 around
    it, of which each latent pixel gets the nearest.

    The null knows nothing of a picture: a hole everywhere, and zeros, the mean of all latents, instead of its latent.
    A model that also reads a text keeps the picture instead (`kept` of Joint).

    Args:
        channels: of the latent.
        outside: what the mask says where the picture stays; -1 in inpainting_big.

    Raises:
        ConfigError: a batch without them, or of other shapes.
    """

    keys = ("masked_latent", "mask")

    def __init__(self, channels: Count, outside: Finite = 0.0) -> None:
        super().__init__()
        self.channels = channels
        self.outside = outside
        self.register_buffer("_place", torch.zeros(()), persistent=False)  # where the model is, and its type
        self._latent = Field("masked_latent", [channels, None, None], "data.params.masked has it encoded")
        self._mask = Field("mask", [1, None, None], "data.params.masked has it drawn")

    def forward(self, batch: Mapping[str, Any]) -> Conditioning:
        place = self.get_buffer("_place")
        latent, mask = self._latent.read(batch, place), self._mask.read(batch, place)
        size, pixels = latent.shape[2:], mask.shape[2:]
        if not is_multiple(pixels, size):
            raise ConfigError(
                f"condition mask: {[*pixels]} pixels, expected whole multiples of the sides of masked_latent, {[*size]}"
            )
        hole = F.interpolate(mask, size=size)  # (N, 1, h, w)
        return Conditioning(spatial=torch.cat([latent, self.outside + (1 - self.outside) * hole], dim=1))

    def null(self, n: int) -> Conditioning:
        place = self.get_buffer("_place")
        return Conditioning(
            spatial=torch.cat([place.new_zeros(n, self.channels, 1, 1), place.new_ones(n, 1, 1, 1)], dim=1)
        )
