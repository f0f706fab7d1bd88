"""A tiny autoencoder for the latents of a large one: TAESD (Ollin Boer Bohan, github.com/madebyollin/taesd).

Convolutions and ReLU alone, no norm and no attention: 1.2M parameters in each half, about a thirtieth of the original's
time. Its latents are those that models of the original see, already shifted and scaled (mean 0, deviation 1).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.layers import halvings
from ldm.ranges import Count
from ldm.sizes import SizeError

LOWEST_LOGVAR = -30.0
"""What `DiagonalGaussian` clamps a log-variance to: its draws are then the mean, up to 3e-7."""
_LIMIT = 3.0
"""Latents are kept within this on their way into the decoder."""


class TinyBlock(nn.Module):
    """Three 3x3 convolutions beside an identity: (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels: Count) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv1(x))  # (N, C, H, W)
        h = F.relu(self.conv2(h))  # (N, C, H, W)
        return F.relu(self.conv3(h) + x)  # (N, C, H, W)


class TinyEncoder(nn.Module):
    """Images to moments of a point mass: (N, in_channels, H, W) in [-1, 1] -> (N, 2*latent_channels, H/f, W/f).

    f = down_factor = 2 ** (levels - 1); the log-variance is the lowest that there is.

    Args:
        in_channels: of the image.
        latent_channels: of the latent: 4 in taesd and taesdxl, 16 in taesd3 and taef1.
        channels: of all other layers.
        num_blocks: of each level, from the image's resolution down.

    Raises:
        SizeError: images whose sides are not divisible by the down factor.
    """

    outputs = 2

    def __init__(
        self,
        in_channels: Count = 3,
        latent_channels: Count = 4,
        channels: Count = 64,
        num_blocks: Sequence[Count] = (1, 3, 3, 3),
    ) -> None:
        super().__init__()
        self.in_channels, self.latent_channels = in_channels, latent_channels
        self.down_factor = 2 ** (len(num_blocks) - 1)
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.levels = nn.Sequential()
        for level, count in enumerate(num_blocks):
            down = [nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)] if level else []
            self.levels.append(nn.Sequential(*down, *(TinyBlock(channels) for _ in range(count))))
        self.conv_out = nn.Conv2d(channels, latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        self._check(*images.shape[2:])
        h = self.conv_in(images.add(1).div(2))  # (N, channels, H, W), of an image in [0, 1]
        h = self.levels(h)  # (N, channels, H/f, W/f)
        mean = self.conv_out(h)  # (N, latent_channels, H/f, W/f)
        return torch.cat([mean, torch.full_like(mean, LOWEST_LOGVAR)], dim=1)  # (N, 2*latent_channels, H/f, W/f)

    def _check(self, height: int, width: int) -> None:
        if height % self.down_factor or width % self.down_factor:
            raise SizeError(
                f"TinyEncoder: expected pictures with sides divisible by {self.down_factor} (2 for each of num_blocks' "
                f"{len(self.levels)} levels but the first), found {height}x{width}, which at most "
                f"{1 + halvings(height, width)} levels can divide: change data.params.resolution",
                self.down_factor,
            )


class TinyDecoder(nn.Module):
    """Latents to images: (N, latent_channels, h, w) -> (N, out_channels, h*f, w*f), about [-1, 1], f = up_factor.

    The arguments mean the same as the encoder's, but `num_blocks` counts from the latent's resolution up.
    """

    def __init__(
        self,
        out_channels: Count = 3,
        latent_channels: Count = 4,
        channels: Count = 64,
        num_blocks: Sequence[Count] = (3, 3, 3, 1),
    ) -> None:
        super().__init__()
        self.out_channels, self.latent_channels = out_channels, latent_channels
        self.up_factor = 2 ** (len(num_blocks) - 1)
        self.conv_in = nn.Conv2d(latent_channels, channels, 3, padding=1)
        self.levels = nn.Sequential()
        for level, count in enumerate(num_blocks):
            last = level == len(num_blocks) - 1
            up = [] if last else [nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, padding=1, bias=False)]
            self.levels.append(nn.Sequential(*(TinyBlock(channels) for _ in range(count)), *up))
        self.conv_out = nn.Conv2d(channels, out_channels, 3, padding=1)

    @property
    def last_layer(self) -> nn.Conv2d:
        """The convolution that outputs the image."""
        return self.conv_out

    def forward(self, latents: Tensor) -> Tensor:
        h = torch.tanh(latents / _LIMIT) * _LIMIT  # (N, latent_channels, h, w)
        h = F.relu(self.conv_in(h))  # (N, channels, h, w)
        h = self.levels(h)  # (N, channels, h*f, w*f)
        return self.conv_out(h).mul(2).sub(1)  # (N, out_channels, h*f, w*f), of an image in [0, 1]
