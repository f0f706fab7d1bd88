"""The magnitude-preserving UNet of Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion
Models" (arXiv:2312.02696), configuration G.

Activations keep unit variance by construction instead of by normalization layers: every weight is used with rows of
unit length, and every sum and concatenation is rescaled to unit variance. After each optimizer step the weights are
brought back to unit length (`constrain`), so that the learning rate alone sets how fast they rotate. There are no
biases.

Vocabulary: the `balance` of a sum is the weight of its second term.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.convolutions import upsampled
from ldm.diffusion.conditioners.base import Conditioning
from ldm.errors import ConfigError
from ldm.layers import attend, halvings, run_block
from ldm.ranges import Count, CountOrZero, FractionBelowOne, Positive
from ldm.sizes import SizeError

_EPS = 1e-4
_SILU = 0.596
"""Standard deviation of mp_silu(x) for normal x (eq. 81)."""
HEAD_CHANNELS = 64
_LIMIT = 256.0
"""Activations are clipped to this magnitude, for the sake of fp16."""


def normalize(x: Tensor, dims: Sequence[int]) -> Tensor:
    """x with a root mean square of 1 over `dims`; the length is measured in float32."""
    length = torch.linalg.vector_norm(x, dim=[*dims], keepdim=True, dtype=torch.float32)
    size = math.prod(x.shape[dim] for dim in dims)
    return x / (_EPS + length / math.sqrt(size)).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU, scaled to preserve unit variance (eq. 81)."""
    return F.silu(x) / _SILU


def mp_sum(a: Tensor, b: Tensor, balance: float) -> Tensor:
    """(1 - balance) a + balance b, of unit variance if both are independent and have unit variance (eq. 88)."""
    return a.lerp(b, balance) / math.hypot(1 - balance, balance)


def mp_cat(a: Tensor, b: Tensor, balance: float = 0.5) -> Tensor:
    """Concatenation along the channels, each part weighted by its balance, not by its width (eq. 103)."""
    total = math.sqrt((a.shape[1] + b.shape[1]) / ((1 - balance) ** 2 + balance**2))
    shares = total * (1 - balance) / math.sqrt(a.shape[1]), total * balance / math.sqrt(b.shape[1])
    return torch.cat([shares[0] * a, shares[1] * b], dim=1)


class MPConv(nn.Module):
    """A linear layer (size 0) or convolution (size 1 or 3) without bias; rows of unit length times `gain` (eq. 47)."""

    def __init__(self, c_in: Count, c_out: Count, size: CountOrZero = 0) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.randn(c_out, c_in, size, size) if size else torch.randn(c_out, c_in))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = normalize(self.weight.float(), self._row_dims)  # float32, since its changes are small
        weight = (weight * (gain / math.sqrt(self.weight[0].numel()))).to(x.dtype)
        return F.conv2d(x, weight, padding=self.size // 2) if self.size else x @ weight.t()

    @property
    def _row_dims(self) -> range:
        return range(1, self.weight.ndim)

    @torch.no_grad()
    def constrain(self) -> None:
        """Normalize the rows back to unit length (eq. 66)."""
        self.weight.copy_(normalize(self.weight, self._row_dims))


class Block(nn.Module):
    """A residual block of two convolutions, scaled by the embedding; then, if it has heads, self-attention.

    Args:
        down: part of the encoder: x is normalized, and its channels are changed, before everything else.
        resize: 1, or 2 and 0.5 to double or halve height and width first.
    """

    def __init__(
        self,
        c_in: Count,
        c_out: Count,
        emb_channels: Count,
        down: bool,
        resize: Positive = 1,
        attention: bool = False,
        dropout: FractionBelowOne = 0.0,
    ) -> None:
        super().__init__()
        self.down, self.resize = down, resize
        self.dropout = nn.Dropout(dropout)
        self.shortcut = MPConv(c_in, c_out, 1) if c_in != c_out else None
        self.conv_in = MPConv(c_out if down else c_in, c_out, 3)
        self.embedding = MPConv(emb_channels, c_out)
        self.gain = nn.Parameter(torch.zeros(1))  # one-dimensional, since scalars cannot be sharded
        self.conv_out = MPConv(c_out, c_out, 3)
        self.qkv = MPConv(c_out, 3 * c_out, 1) if attention else None
        self.out = MPConv(c_out, c_out, 1) if attention else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if self.resize < 1:
            x = F.avg_pool2d(x, 2)  # (N, C, H / 2, W / 2)
        elif self.resize > 1:
            x = upsampled(x)  # (N, C, 2 H, 2 W)
        if self.down:
            x = normalize(x if self.shortcut is None else self.shortcut(x), [1])  # (N, C', H, W)
        h = self.conv_in(mp_silu(x))  # (N, C', H, W)
        emb = self.embedding(embedding, self.gain) + 1  # (N, C')
        h = mp_silu(h * emb[:, :, None, None].to(h.dtype))  # (N, C', H, W)
        h = self.conv_out(self.dropout(h))  # (N, C', H, W)
        if not self.down and self.shortcut is not None:
            x = self.shortcut(x)  # (N, C', H, W)
        x = mp_sum(x, h, 0.3)  # (N, C', H, W)
        if self.qkv is not None and self.out is not None:
            x = mp_sum(x, self.out(self._attend(self.qkv(x))), 0.3)  # (N, C', H, W)
        return x.clamp(-_LIMIT, _LIMIT)

    @staticmethod
    def _attend(qkv: Tensor) -> Tensor:
        rows = qkv.shape[2]
        parts = rearrange(
            qkv, "n (three h d) y x -> three n h (y x) d", three=3, d=min(HEAD_CHANNELS, qkv.shape[1] // 3)
        )
        q, k, v = normalize(parts, [-1])  # each (N, heads, H W, D), cosine attention
        return rearrange(attend(q, k, v), "n h (y x) d -> n (h d) y x", y=rows)  # (N, C', H, W)


class MagnitudePreservingUNet(nn.Module):
    """net(x (N,C,H,W), noise_level (N,), conditioning) -> (N,C,H,W), deterministic in its inputs (but for dropout).

    Height and width must be divisible by 2 ** (number of levels - 1). The paper's sizes on latents 4x64x64: XS 128, S
    192, M 256, L 320, XL 384, XXL 448 channels, with attention at levels 2 and 3.

    Args:
        in_channels: channels of x, and of the output.
        model_channels: width at the first level; levels with attention are a multiple of 64 wide, or less.
        channel_mult: width of each level in units of `model_channels`; each further level has half the resolution.
        num_res_blocks: blocks per level on the way down (one more on the way up).
        attention_levels: levels with attention, 0 = full resolution. The middle always has it.
        vector_channels: width of the conditioning vector, such as `ClassOneHot` produces; None: none.
        spatial_channels: channels of the conditioning image, concatenated to x; of about unit variance, as x.
        dropout: probability inside blocks.
        checkpointing: recompute activations in the backward pass instead of storing them.

    Raises:
        ConfigError: a width that cannot be split into heads, or an input that does not fit the parameters.
    """

    def __init__(
        self,
        in_channels: Count,
        model_channels: Count,
        channel_mult: Sequence[Count] = (1, 2, 3, 4),
        num_res_blocks: Count = 3,
        attention_levels: Sequence[CountOrZero] = (2, 3),
        vector_channels: Count | None = None,
        dropout: FractionBelowOne = 0.0,
        checkpointing: bool = False,
        spatial_channels: CountOrZero = 0,
    ) -> None:
        super().__init__()
        widths = [model_channels * multiplier for multiplier in channel_mult]
        attending = {widths[-1], *(widths[level] for level in attention_levels)}
        if uneven := sorted(width for width in attending if width > HEAD_CHANNELS and width % HEAD_CHANNELS):
            raise ConfigError(
                f"MagnitudePreservingUNet: model_channels={model_channels} makes a level with attention {uneven[0]} "
                f"wide; expected a multiple of {HEAD_CHANNELS}, the width of a head, or less"
            )
        emb_channels, last = max(widths), len(widths) - 1
        self.in_channels, self.vector_channels = in_channels, vector_channels
        self.spatial_channels = spatial_channels
        self.checkpointing = checkpointing
        self.shrink = 2**last
        # Random features of the noise level, never trained (eq. 75).
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(widths[0]))
        self.register_buffer("phases", 2 * math.pi * torch.rand(widths[0]))
        self.embed = MPConv(widths[0], emb_channels)
        self.embed_vector = None if vector_channels is None else MPConv(vector_channels, emb_channels)
        self.conv_in = MPConv(in_channels + spatial_channels + 1, widths[0], 3)

        c, skips = widths[0], [widths[0]]
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            if level > 0:
                self.down.append(Block(c, c, emb_channels, down=True, resize=0.5, dropout=dropout))
                skips.append(c)
            for _ in range(num_res_blocks):
                self.down.append(Block(c, width, emb_channels, True, 1, level in attention_levels, dropout))
                c = width
                skips.append(c)
        self.middle = nn.ModuleList(
            Block(c, c, emb_channels, False, 1, attention, dropout) for attention in (True, False)
        )
        self.up = nn.ModuleList()
        self.joints = set[int]()  # blocks on the way up that take a skip connection
        for level, width in reversed([*enumerate(widths)]):
            if level < last:
                self.up.append(Block(c, c, emb_channels, down=False, resize=2, dropout=dropout))
            for _ in range(num_res_blocks + 1):
                self.joints.add(len(self.up))
                self.up.append(
                    Block(c + skips.pop(), width, emb_channels, False, 1, level in attention_levels, dropout)
                )
                c = width
        self.conv_out = MPConv(c, in_channels, 3)
        self.gain_out = nn.Parameter(torch.zeros(1))
        self.constrain()

    def forward(self, x: Tensor, noise_level: Tensor, conditioning: Conditioning) -> Tensor:
        self._check(x, conditioning)
        level = noise_level.float() / 1000
        waves = level[:, None] * self.get_buffer("frequencies") + self.get_buffer("phases")  # (N, C)
        embedding = self.embed((waves.cos() * math.sqrt(2)).to(x.dtype))  # (N, emb_channels)
        if self.embed_vector is not None and conditioning.vector is not None:
            embedding = mp_sum(embedding, self.embed_vector(conditioning.vector.to(x.dtype)), 0.5)  # (N, emb_channels)
        embedding = mp_silu(embedding)  # (N, emb_channels)
        x = conditioning.beside(x)  # (N, in_channels + spatial_channels, H, W)
        # A channel of ones replaces the biases.
        x = self.conv_in(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))  # (N, model_channels, H, W)
        skips = [x]
        for block in self.down:
            x = self._run(block, x, embedding)
            skips.append(x)
        for block in self.middle:
            x = self._run(block, x, embedding)  # (N, last width, H / shrink, W / shrink)
        for place, block in enumerate(self.up):
            x = self._run(block, mp_cat(x, skips.pop()) if place in self.joints else x, embedding)
        return self.conv_out(x, self.gain_out)  # (N, in_channels, H, W)

    def blocks(self) -> list[nn.Module]:
        """The parts that hold nearly all of the weights and run one after another, for sharding."""
        return [*self.down, *self.middle, *self.up]

    def constrain(self) -> None:
        """Bring every weight's rows back to unit length; LatentDiffusion calls it after each optimizer step."""
        for module in self.modules():
            if isinstance(module, MPConv):
                module.constrain()

    def _run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        return run_block(block, *inputs, recompute=self.checkpointing)

    def _check(self, x: Tensor, conditioning: Conditioning) -> None:
        """Shapes only: costs nothing and never waits for the device."""
        if x.shape[1] != self.in_channels or x.shape[2] % self.shrink or x.shape[3] % self.shrink:
            raise SizeError(
                f"MagnitudePreservingUNet: expects a latent of {self.in_channels} channels (in_channels) with sides "
                f"divisible by {self.shrink} (levels of channel_mult), got {[*x.shape[1:]]}, where at most "
                f"{1 + halvings(*x.shape[2:])} levels can: change the network or the data",
                self.shrink,
            )
        if conditioning.tokens is not None:
            raise ConfigError(
                "MagnitudePreservingUNet: reads only a vector (ClassOneHot) and an image; use a UNet for tokens"
            )
        width = 0 if conditioning.spatial is None else conditioning.spatial.shape[1]
        if width != self.spatial_channels:
            raise ConfigError(
                f"MagnitudePreservingUNet: spatial_channels={self.spatial_channels}, but the conditioner's spatial "
                f"slot has width {width}"
            )
        found = None if conditioning.vector is None else conditioning.vector.shape[-1]
        if found != self.vector_channels:
            raise ConfigError(
                f"MagnitudePreservingUNet: vector_channels={self.vector_channels}, but the conditioner's vector slot "
                f"has width {found}"
            )
