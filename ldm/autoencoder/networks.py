"""Encoder and decoder of the latent-diffusion family (Rombach et al. 2022, arXiv:2112.10752, appendix E.1).

The convolutional autoencoder of VQGAN (Esser et al. 2021) and DDPM (Ho et al. 2020): residual blocks with
GroupNorm and swish, a strided convolution between levels, self-attention at chosen levels and, unless switched off, in
the middle.
Both 1x1 convolutions around the latent (`quant_conv`, `post_quant_conv`) belong to the networks here.

Vocabulary: level 0 has the resolution of the image (divided by `patch_size`), each further level half of the previous
one, so the down factor is patch_size * 2 ** (levels - 1); `moments` are mean and log-variance of the latent, stacked
along the channels.

Both lay their pictures out as their device computes fastest (ldm/channels_last.py).
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.channels_last import fastest_layout
from ldm.convolutions import convolved, convolved_upsampled, pointwise
from ldm.layers import group_norm, halvings
from ldm.ranges import Count, CountOrZero, FractionBelowOne
from ldm.sizes import SizeError

EPS = 1e-6
"""Epsilon of all norms here, as in the published models."""


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut: (N, in_channels, H, W) -> (N, out_channels, H, W)."""

    def __init__(
        self,
        in_channels: Count,
        out_channels: Count,
        dropout: FractionBelowOne = 0.0,
        norm_groups: Count | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, EPS, norm_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, EPS, norm_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = convolved(F.silu(self.norm1(x)), self.conv1)  # (N, out_channels, H, W)
        h = convolved(self.dropout(F.silu(self.norm2(h))), self.conv2)  # (N, out_channels, H, W)
        return pointwise(x, self.shortcut) + h  # (N, out_channels, H, W)


class Attention(nn.Module):
    """Single-head self-attention over the positions of a feature map, with a residual connection; keeps the shape."""

    def __init__(self, channels: Count, norm_groups: Count | None = None) -> None:
        super().__init__()
        self.norm = group_norm(channels, EPS, norm_groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)  # (N, C, H, W)
        q, k, v = (_to_tokens(project(h)) for project in (self.q, self.k, self.v))  # each (N, 1, H*W, C)
        h = F.scaled_dot_product_attention(q, k, v)  # (N, 1, H*W, C)
        h = h.squeeze(1).transpose(1, 2).reshape(x.shape)  # (N, C, H, W)
        return x + self.out(h)  # (N, C, H, W)


def _to_tokens(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, 1, H*W, C): one head."""
    return x.flatten(2).transpose(1, 2).unsqueeze(1)


class Downsample(nn.Module):
    """Halve the resolution with a strided convolution: (N, C, H, W) -> (N, C, H/2, W/2)."""

    def __init__(self, channels: Count) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1))  # (N, C, H+1, W+1): right and bottom only, as the published weights expect
        return self.conv(x)  # (N, C, H/2, W/2)


class Upsample(nn.Module):
    """Nearest-neighbor upsampling by 2, then a convolution: (N, C, H, W) -> (N, C, 2H, 2W)."""

    def __init__(self, channels: Count) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return convolved_upsampled(x, self.conv)  # (N, C, 2H, 2W)


def _blocks(
    in_channels: int, out_channels: int, count: int, attention: bool, dropout: float, norm_groups: int | None
) -> list[nn.Module]:
    """The residual blocks of one level, each followed by attention if the level has it."""
    layers: list[nn.Module] = []
    for _ in range(count):
        layers.append(ResBlock(in_channels, out_channels, dropout, norm_groups))
        if attention:
            layers.append(Attention(out_channels, norm_groups))
        in_channels = out_channels
    return layers


def _middle(channels: int, attention: bool, dropout: float, norm_groups: int | None) -> nn.Sequential:
    return nn.Sequential(
        ResBlock(channels, channels, dropout, norm_groups),
        # Blocks have the same names either way.
        Attention(channels, norm_groups) if attention else nn.Identity(),
        ResBlock(channels, channels, dropout, norm_groups),
    )


class Encoder(nn.Module):
    """Images to moments: (N, in_channels, H, W) in [-1, 1] -> (N, outputs*latent_channels, H/f, W/f), f = down_factor.

    Args:
        in_channels: of the image.
        base_channels: of level 0.
        channel_mult: width of each level, in units of `base_channels`; one entry per level.
        num_res_blocks: residual blocks of each level.
        attention_levels: levels with self-attention after each block (only the last in the published f16 model).
        latent_channels: of the latent.
        dropout: probability within the residual blocks.
        patch_size: side of the pixel patches that form one position of level 0 (1 in the published models). 2 merges
            the two most expensive resolutions into one, at some loss of detail: for small machines.
        moments: output mean and log-variance, twice the latent's channels; False: the latent itself, for a quantizer.
        middle_attention: self-attention between the two blocks at the lowest resolution; the published vq-f4-noattn
            has none.
        norm_groups: of every norm; None: 32, or fewer below 128 channels. Weights of others may have 32 everywhere.
        unit_range: images are brought to [0, 1] first, as EDM2 gives them to Stable Diffusion's encoder.

    Raises:
        SizeError: images whose sides are not divisible by the down factor.
    """

    def __init__(
        self,
        in_channels: Count,
        base_channels: Count,
        channel_mult: Sequence[Count],
        num_res_blocks: Count,
        latent_channels: Count,
        attention_levels: Sequence[CountOrZero] = (),
        dropout: FractionBelowOne = 0.0,
        patch_size: Count = 1,
        moments: bool = True,
        middle_attention: bool = True,
        norm_groups: Count | None = None,
        unit_range: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.unit_range = unit_range
        self.outputs = 2 if moments else 1
        self.latent_channels = latent_channels
        self.patch_size = patch_size
        self.down_factor = patch_size * 2 ** (len(channel_mult) - 1)
        widths = [base_channels * multiplier for multiplier in channel_mult]
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, base_channels, 3, padding=1)
        self.levels = nn.Sequential()
        previous = base_channels
        for level, width in enumerate(widths):
            layers = _blocks(previous, width, num_res_blocks, level in attention_levels, dropout, norm_groups)
            if level < len(widths) - 1:
                layers.append(Downsample(width))
            self.levels.append(nn.Sequential(*layers))
            previous = width
        self.middle = _middle(previous, middle_attention, dropout, norm_groups)
        self.norm_out = group_norm(previous, EPS, norm_groups)
        moment_channels = self.outputs * latent_channels
        self.conv_out = nn.Conv2d(previous, moment_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(moment_channels, moment_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        self._check(*images.shape[2:])
        if self.unit_range:
            images = (images + 1) / 2  # (N, in_channels, H, W)
        h = F.pixel_unshuffle(images, self.patch_size)  # (N, in_channels*p*p, H/p, W/p), p = patch_size
        h = fastest_layout(self.conv_in(h))  # (N, base_channels, H/p, W/p)
        h = self.levels(h)  # (N, last width, H/f, W/f)
        h = self.middle(h)  # (N, last width, H/f, W/f)
        h = self.conv_out(F.silu(self.norm_out(h)))  # (N, outputs*latent_channels, H/f, W/f)
        return self.quant_conv(h)  # (N, outputs*latent_channels, H/f, W/f)

    def _check(self, height: int, width: int) -> None:
        factor, patch = self.down_factor, self.patch_size
        if height % factor == 0 and width % factor == 0:
            return
        fit = 0 if height % patch or width % patch else 1 + halvings(height // patch, width // patch)
        fix = f"at most {fit} levels can divide" if fit else f"patch_size={patch} does not divide"
        raise SizeError(
            f"Encoder: expected pictures with sides divisible by {factor} (patch_size={patch} times 2 for each of "
            f"channel_mult' {len(self.levels)} levels but the first), found {height}x{width}, which {fix}: "
            f"change data.params.resolution, or the encoder's and decoder's channel_mult",
            factor,
        )


class Decoder(nn.Module):
    """Latents to images: (N, latent_channels, h, w) -> (N, out_channels, h*f, w*f), about [-1, 1], f = up_factor.

    The arguments mean the same as the encoder's, and levels are also counted from the image's resolution; each level
    has one more residual block than the encoder's.
    """

    def __init__(
        self,
        out_channels: Count,
        base_channels: Count,
        channel_mult: Sequence[Count],
        num_res_blocks: Count,
        latent_channels: Count,
        attention_levels: Sequence[CountOrZero] = (),
        dropout: FractionBelowOne = 0.0,
        patch_size: Count = 1,
        middle_attention: bool = True,
        norm_groups: Count | None = None,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.latent_channels = latent_channels
        self.patch_size = patch_size
        self.up_factor = patch_size * 2 ** (len(channel_mult) - 1)
        widths = [base_channels * multiplier for multiplier in channel_mult]
        previous = widths[-1]
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.conv_in = nn.Conv2d(latent_channels, previous, 3, padding=1)
        self.middle = _middle(previous, middle_attention, dropout, norm_groups)
        self.levels = nn.Sequential()
        for level, width in reversed(list(enumerate(widths))):
            layers = _blocks(previous, width, num_res_blocks + 1, level in attention_levels, dropout, norm_groups)
            if level > 0:
                layers.append(Upsample(width))
            self.levels.append(nn.Sequential(*layers))
            previous = width
        self.norm_out = group_norm(previous, EPS, norm_groups)
        self.conv_out = nn.Conv2d(previous, out_channels * patch_size**2, 3, padding=1)

    @property
    def last_layer(self) -> nn.Conv2d:
        """The convolution that outputs the image: the gradient of its weight sets the adversarial weight."""
        return self.conv_out

    def forward(self, latents: Tensor) -> Tensor:
        h = fastest_layout(self.conv_in(self.post_quant_conv(latents)))  # (N, last width, h, w)
        h = self.middle(h)  # (N, last width, h, w)
        h = self.levels(h)  # (N, base_channels, h*f/p, w*f/p), p = patch_size
        h = self.conv_out(F.silu(self.norm_out(h)))  # (N, out_channels*p*p, h*f/p, w*f/p)
        return F.pixel_shuffle(h, self.patch_size)  # (N, out_channels, h*f, w*f)
