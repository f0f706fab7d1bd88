"""A small picture as a condition, of which the model makes a large one."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.conditioners.base import Conditioning, latent_size
from ldm.diffusion.conditioners.given import Field
from ldm.errors import ConfigError
from ldm.layers import timestep_embedding
from ldm.ranges import Count, Fraction
from ldm.sizes import spell

LEVEL = "augmentation"
"""The key under which a condition may say the level of noise, 0 to `most`."""


class LowResolution(nn.Module):
    """The batch's `low_resolution` (N, C, H, W) in [-1, 1], with noise, as an image of the latent's size.

    The network is conditioned on the level of that noise, which keeps it from trusting details that small pictures of
    other origins do not have (Ho et al. 2021, "Cascaded Diffusion Models", section 4.2, where it is Gaussian
    conditioning augmentation; also Saharia et al. 2022, "Imagen", and Stable Diffusion's upscaler). With level s, the
    picture becomes cos(pi s / 2) picture + sin(pi s / 2) noise.

    In training the level is drawn, uniform from 0 to `most`. Otherwise it is that of the condition, whose key
    `augmentation` may be left out, or else `level`. 0 says that the picture is as those of the data: right where the
    small picture is a photograph that was degraded alike. For pictures that another model has made, or that were
    degraded in other ways, 0.1 to 0.3 hides their faults at the price of details; which is best is found by trying.

    The null is zeros, as image and as vector, which has no level (a cosine and a sine are never 0 together).

    Args:
        channels: of the picture.
        fold: squares of this side become the channels of one pixel, so that a picture that is larger than the latent
            loses nothing; the image has channels x fold^2 channels (the network's `spatial_channels`). What has not
            the latent's size then is resized to it, bicubically.
        most: the highest level in training; 0: there is no noise, and no vector.
        level: in validation, and of samples that do not say theirs.
        vector_channels: width of the vector, waves of the level.

    Raises:
        ConfigError: `level` is above `most`, or a batch without such a picture, one that cannot be folded, or that is
            larger than the latent after that, or, on the CPU, a level out of range.
    """

    keys = ("low_resolution",)

    def __init__(
        self,
        channels: Count = 3,
        fold: Count = 1,
        most: Fraction = 0.5,
        level: Fraction = 0.0,
        vector_channels: Count = 128,
    ) -> None:
        super().__init__()
        if level > most:
            raise ConfigError(f"LowResolution: level: expected 0 to most={most:g}, as in training, found {level:g}")
        self.channels, self.fold = channels, fold
        self.most, self.level = most, level
        self.vector_channels = vector_channels
        self.register_buffer("_place", torch.zeros(()), persistent=False)  # where the model is, and its type
        self._field = Field("low_resolution", [channels, None, None], "data.params.drawn.low_resolution has it made")

    def defaults(self) -> Mapping[str, float]:
        return {LEVEL: self.level} if self.most > 0 else {}

    def forward(self, batch: Mapping[str, Any]) -> Conditioning:
        picture = self._field.read(batch, self.get_buffer("_place"))  # (N, C, H, W)
        if self.most == 0:
            return Conditioning(spatial=self._image(picture, batch))
        level = self._level(batch, picture)  # (N,)
        if self.training or LEVEL in batch or self.level > 0:
            noise = batch["draws"].normal(f"{LEVEL}/noise", picture.shape[1:]).to(picture)
            picture = augmented(picture, noise, level)
        vector = timestep_embedding(1000 * level, self.vector_channels).to(picture.dtype)  # (N, vector_channels)
        return Conditioning(vector=vector, spatial=self._image(picture, batch))

    def null(self, n: int) -> Conditioning:
        place = self.get_buffer("_place")
        spatial = place.new_zeros(n, self.channels * self.fold**2, 1, 1)
        vector = place.new_zeros(n, self.vector_channels) if self.most > 0 else None
        return Conditioning(vector=vector, spatial=spatial)

    def _level(self, batch: Mapping[str, Any], picture: Tensor) -> Tensor:
        """(N,) float32."""
        n, device = len(picture), picture.device
        if (given := batch.get(LEVEL)) is not None:
            level = torch.as_tensor(given).float()
            if level.shape != (n,):
                raise ConfigError(f"condition {LEVEL}: expected a number for each row, found {[*level.shape[1:]]}")
            if level.device.type == "cpu" and not bool(((level >= 0) & (level <= self.most)).all()):
                raise ConfigError(
                    f"condition {LEVEL}: expected 0 to {self.most:g}, the levels of training, found {level.tolist()}"
                )
            return level.to(device)
        if self.training:
            drawn: Tensor = batch["draws"].uniform(LEVEL)
            return (self.most * drawn).to(device)
        return torch.full((n,), self.level, device=device)

    def _image(self, picture: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """(N, C, H, W) -> (N, C fold^2, h, w)."""
        height, width = size = latent_size(batch)
        sides = picture.shape[2], picture.shape[3]
        if any(side % self.fold or side > self.fold * of for side, of in zip(sides, size, strict=True)):
            larger = spell((self.fold * height, self.fold * width))
            raise ConfigError(
                f"condition low_resolution: {spell(sides)} pixels, expected multiples of fold={self.fold} up to "
                f"{larger}, since the latent is {spell(size)}: set fold to their ratio, or make the picture smaller"
            )
        folded = F.pixel_unshuffle(picture, self.fold)  # (N, C fold^2, H / fold, W / fold)
        if folded.shape[2:] == size:
            return folded
        return F.interpolate(folded, size=size, mode="bicubic", align_corners=False)


def augmented(picture: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """`picture` (N, ...) with as much of standard normal noise as `level` (N,) in [0, 1] says; variance 1 stays."""
    angle = (level * (math.pi / 2)).reshape(-1, *[1] * (picture.ndim - 1))
    return angle.cos().to(picture.dtype) * picture + angle.sin().to(picture.dtype) * noise
