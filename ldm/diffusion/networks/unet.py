"""The UNet of ADM (Dhariwal and Nichol 2021) and of latent diffusion (Rombach et al. 2022).

Residual blocks with GroupNorm, conditioned on the noise level; attention at chosen levels (unet_attention.py): plain
self-attention, or, if there are context tokens, a transformer block with cross-attention. All layers have the signature
layer(x (N,C,H,W), embedding (N,E), tokens (N,L,D) | None, mask (N,L) | None) -> x, so that the network is three lists
of layers.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.convolutions import convolved, convolved_upsampled, pointwise, upsampled
from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.networks.unet_attention import SelfAttention, SpatialTransformer
from ldm.errors import ConfigError
from ldm.layers import group_norm, halvings, run_block, timestep_embedding, zero_module
from ldm.ranges import Count, CountOrZero, FractionBelowOne, Positive
from ldm.sizes import SizeError


class Downsample(nn.Module):
    """Halves the height and width with a strided convolution.

    Args:
        pad_end: see UNet.
    """

    def __init__(self, channels: Count, pad_end: bool = False) -> None:
        super().__init__()
        self.pad_end = pad_end
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if pad_end else 1)

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None, mask: Tensor | None = None) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad_end else x)


class Upsample(nn.Module):
    """Doubles the height and width by nearest-neighbor upsampling, then a convolution."""

    def __init__(self, channels: Count) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None, mask: Tensor | None = None) -> Tensor:
        return convolved_upsampled(x, self.conv)  # (N, C, 2H, 2W)


class ResBlock(nn.Module):
    """Two convolutions with a shortcut; the embedding is added between them, or scales and shifts the second norm.

    Args:
        resize: 1, or 2 and 0.5 for a block that also doubles or halves the height and width (BigGAN, ADM).
        norm_groups, norm_eps: see UNet.
    """

    def __init__(
        self,
        in_channels: Count,
        out_channels: Count,
        embedding_channels: Count,
        dropout: FractionBelowOne = 0.0,
        scale_shift: bool = False,
        resize: Positive = 1,
        norm_groups: Count | None = None,
        norm_eps: Positive = 1e-5,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resize = resize
        self.norm_in = group_norm(in_channels, norm_eps, norm_groups)
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embedding = nn.Linear(embedding_channels, out_channels * (2 if scale_shift else 1))
        self.norm_out = group_norm(out_channels, norm_eps, norm_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None, mask: Tensor | None = None) -> Tensor:
        h = F.silu(self.norm_in(x))  # (N, C, H, W)
        if self.resize > 1:
            h, x = convolved_upsampled(h, self.conv_in), upsampled(x)  # (N, C', 2H, 2W), (N, C, 2H, 2W)
        elif self.resize < 1:
            h = convolved(F.avg_pool2d(h, 2), self.conv_in)  # (N, C', H/2, W/2)
            x = F.avg_pool2d(x, 2)  # (N, C, H/2, W/2)
        else:
            h = convolved(h, self.conv_in)  # (N, C', H, W)
        emb = self.embedding(embedding)[:, :, None, None]  # (N, C' or 2C', 1, 1)
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm_out(h), 1 + scale)  # (N, C', H', W')
        else:
            h = self.norm_out(h + emb)  # (N, C', H', W')
        h = convolved(self.dropout(F.silu(h)), self.conv_out)  # (N, C', H', W')
        return pointwise(x, self.shortcut) + h  # (N, C', H', W')


class Chain(nn.ModuleList):
    """Layers in sequence: what lies between two skip connections of the UNet."""

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None, mask: Tensor | None = None) -> Tensor:
        for layer in self:
            x = layer(x, embedding, tokens, mask)
        return x


class UNet(nn.Module):
    """net(x (N,C,H,W), noise_level (N,), conditioning) -> (N,C,H,W), deterministic in its inputs (but for dropout).

    Height and width must be divisible by 2 ** (number of levels - 1).

    Args:
        in_channels: channels of x, and of the output.
        model_channels: width at the first level.
        channel_mult: width of each level in units of `model_channels`; each further level has half the resolution.
        num_res_blocks: residual blocks per level on the way down (one more on the way up).
        attention_levels: levels with attention, 0 = full resolution. The middle always has it.
        num_heads: attention heads; give this or `num_head_channels`.
        num_head_channels: channels per head, so that wider levels have more heads.
        context_dim: width of conditioning tokens; None: no cross-attention.
        transformer_depth: transformer blocks at each attention layer, if there is cross-attention (1 in nearly all
            published models, 3 in the layout-to-image one).
        vector_channels: width of the conditioning vector; None: none.
        spatial_channels: channels of the conditioning image, concatenated to x.
        scale_shift: the embedding scales and shifts (ADM) instead of being added (DDPM, LDM).
        resample_in_blocks: resolution changes inside residual blocks (ADM) instead of in plain convolutions.
        dropout: probability inside residual blocks.
        checkpointing: recompute activations in the backward pass instead of storing them.
        norm_groups: of every norm; None: 32, or fewer below 128 channels. Weights of others may have 32 everywhere.
        norm_eps: epsilon of all norms but those of transformers; the first DDPM's (Ho et al. 2020) have 1e-6.
        pad_end: plain convolutions that halve the resolution see zeros beyond the right and lower edge alone, as the
            first DDPM's do, instead of on all sides.
        longest_period: of the waves that embed the noise level; diffusers' DDPMs have 10000 ** (half / (half - 1)),
            half = model_channels / 2.

    Raises:
        ConfigError: parameters that contradict one another, or an input that does not fit them.
    """

    def __init__(
        self,
        in_channels: Count,
        model_channels: Count,
        channel_mult: Sequence[Count],
        num_res_blocks: Count = 2,
        attention_levels: Sequence[CountOrZero] = (),
        num_heads: Count | None = None,
        num_head_channels: Count | None = None,
        context_dim: Count | None = None,
        vector_channels: Count | None = None,
        spatial_channels: CountOrZero = 0,
        scale_shift: bool = False,
        resample_in_blocks: bool = False,
        dropout: FractionBelowOne = 0.0,
        checkpointing: bool = False,
        transformer_depth: Count = 1,
        norm_groups: Count | None = None,
        norm_eps: Positive = 1e-5,
        pad_end: bool = False,
        longest_period: Positive = 10_000.0,
    ) -> None:
        super().__init__()
        self.in_channels, self.model_channels, self.spatial_channels = in_channels, model_channels, spatial_channels
        self.context_dim, self.vector_channels = context_dim, vector_channels
        self.checkpointing = checkpointing
        self.longest_period = longest_period
        self.shrink = 2 ** (len(channel_mult) - 1)
        if (num_heads is None) == (num_head_channels is None):
            raise ConfigError("UNet: give exactly one of 'num_heads' and 'num_head_channels'")
        if transformer_depth < 1 or (transformer_depth > 1 and context_dim is None):
            raise ConfigError(
                f"UNet: transformer_depth={transformer_depth}, context_dim={context_dim}: expected 1 or more "
                f"blocks, and more than 1 only with cross-attention: set context_dim, or transformer_depth to 1"
            )
        levels = range(len(channel_mult))
        if not set(attention_levels) <= set(levels):
            raise ConfigError(f"UNet: attention_levels {[*attention_levels]} must lie in 0..{levels[-1]}, the levels")
        emb_channels = 4 * model_channels

        def residual(c_in: int, c_out: int, resize: float = 1) -> ResBlock:
            return ResBlock(c_in, c_out, emb_channels, dropout, scale_shift, resize, norm_groups, norm_eps)

        def attention(c: int) -> nn.Module:
            n = num_heads if num_heads is not None else c // (num_head_channels or c)
            if n == 0 or c % n or (num_head_channels and c % num_head_channels):
                raise ConfigError(
                    f"UNet: {c} channels cannot be split: num_heads={num_heads}, num_head_channels={num_head_channels}"
                )
            if context_dim is None:
                return SelfAttention(c, n, norm_groups, norm_eps)
            return SpatialTransformer(c, context_dim, n, transformer_depth, norm_groups)

        self.embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        self.embed_vector = None if vector_channels is None else nn.Linear(vector_channels, emb_channels)
        self.conv_in = nn.Conv2d(in_channels + spatial_channels, model_channels, 3, padding=1)
        widths = [model_channels * multiplier for multiplier in channel_mult]
        last = len(widths) - 1

        c, skips = model_channels, [model_channels]
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                block = residual(c, width)
                self.down.append(Chain([block, attention(width)] if level in attention_levels else [block]))
                c = width
                skips.append(c)
            if level < last:
                self.down.append(Chain([residual(c, c, resize=0.5) if resample_in_blocks else Downsample(c, pad_end)]))
                skips.append(c)

        self.middle = Chain([residual(c, c), attention(c), residual(c, c)])

        self.up = nn.ModuleList()
        for level, width in reversed([*enumerate(widths)]):
            for place in range(num_res_blocks + 1):
                chain = Chain([residual(c + skips.pop(), width)])
                c = width
                if level in attention_levels:
                    chain.append(attention(c))
                if level > 0 and place == num_res_blocks:
                    chain.append(residual(c, c, resize=2) if resample_in_blocks else Upsample(c))
                self.up.append(chain)

        self.norm_out = group_norm(c, norm_eps, norm_groups)
        self.conv_out = zero_module(nn.Conv2d(c, in_channels, 3, padding=1))

    def forward(self, x: Tensor, noise_level: Tensor, conditioning: Conditioning) -> Tensor:
        self._check(x, conditioning)
        waves = timestep_embedding(noise_level, self.model_channels, self.longest_period)  # (N, model_channels)
        embedding = self.embed(waves)  # (N, 4 model_channels)
        if self.embed_vector is not None:
            embedding = embedding + self.embed_vector(conditioning.vector)  # (N, 4 model_channels)
        embedding = F.silu(embedding)  # (N, 4 model_channels), activated here once for all blocks
        x = conditioning.beside(x)  # (N, in_channels + spatial_channels, H, W)
        inputs = (embedding, conditioning.clean_tokens(), conditioning.token_mask)
        h = self.conv_in(x)  # (N, model_channels, H, W)
        skips = [h]
        for chain in self.down:
            h = self._run(chain, h, *inputs)
            skips.append(h)
        h = self._run(self.middle, h, *inputs)  # (N, last width, H / shrink, W / shrink)
        for chain in self.up:
            h = self._run(chain, torch.cat([h, skips.pop()], dim=1), *inputs)
        return self.conv_out(F.silu(self.norm_out(h)))  # (N, in_channels, H, W)

    def blocks(self) -> list[nn.Module]:
        """The parts that hold nearly all of the weights and run one after another, for sharding."""
        return [*self.down, self.middle, *self.up]

    def _run(self, chain: nn.Module, *inputs: Tensor | None) -> Tensor:
        return run_block(chain, *inputs, recompute=self.checkpointing)

    def _check(self, x: Tensor, conditioning: Conditioning) -> None:
        """Shapes only: costs nothing and never waits for the device."""
        if x.shape[1] != self.in_channels or x.shape[2] % self.shrink or x.shape[3] % self.shrink:
            raise SizeError(
                f"UNet: expects a latent of {self.in_channels} channels (in_channels) with sides divisible by "
                f"{self.shrink} (levels of channel_mult), got {[*x.shape[1:]]}, where at most "
                f"{1 + halvings(*x.shape[2:])} levels can: change the network or the data",
                self.shrink,
            )
        slots = (
            ("vector", "vector_channels", self.vector_channels, conditioning.vector, -1),
            ("tokens", "context_dim", self.context_dim, conditioning.tokens, -1),
            ("spatial", "spatial_channels", self.spatial_channels or None, conditioning.spatial, 1),
        )
        for slot, parameter, expected, given, axis in slots:
            found = None if given is None else given.shape[axis]
            if found != expected:
                raise ConfigError(f"UNet: {parameter}={expected}, but the conditioner's {slot} slot has width {found}")
