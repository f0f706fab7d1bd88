"""Small building blocks shared by several networks: norms, embeddings, attention."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm import channels_last
from ldm.ranges import Count, Positive


def timestep_embedding(noise_level: Tensor, channels: int, longest_period: float = 10_000.0) -> Tensor:
    """Cosines, then sines, of the noise level: (N,) -> (N, channels) float32 (Vaswani et al. 2017, section 3.5)."""
    half = channels // 2
    exponents = torch.arange(half, dtype=torch.float32, device=noise_level.device) / half  # (half,)
    angles = noise_level.float()[:, None] * torch.exp(-math.log(longest_period) * exponents)  # (N, half)
    waves = torch.cat([angles.cos(), angles.sin()], dim=1)  # (N, 2 half)
    return F.pad(waves, (0, channels - 2 * half))  # (N, channels)


def run_block(block: nn.Module, *inputs: Tensor | None, recompute: bool) -> Tensor:
    """block(*inputs): a Tensor.

    Args:
        recompute: in training, compute the block's activations again in the backward pass instead of storing them.
    """
    if not (recompute and torch.is_grad_enabled()):
        result: Tensor = block(*inputs)
        return result
    # Its own dropout, or that of an adapter, must drop the same values the second time.
    drops = any(isinstance(layer, nn.Dropout) and layer.p > 0 and layer.training for layer in block.modules())
    # Not re-entrant: the second pass sees the autocast of the first.
    again: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=drops)
    return again


class GroupNorm(nn.GroupNorm):
    """torch's, with another way to compute it where images are in channels_last (channels_last.py)."""

    def __init__(self, num_groups: Count, num_channels: Count, eps: Positive = 1e-5) -> None:
        super().__init__(num_groups, num_channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        return channels_last.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def group_norm(channels: int, eps: float = 1e-5, groups: int | None = None) -> nn.GroupNorm:
    """32 groups if the channels allow groups of four or more, as in the published models (128 channels and up).

    Narrower networks get fewer groups: with one or two channels per group the norm would remove each channel's mean.

    Args:
        groups: that many instead, for weights that were trained with them.
    """
    return GroupNorm(groups or math.gcd(channels, min(32, max(1, channels // 4))), channels, eps=eps)


def halvings(*sides: int) -> int:
    """How many times all the sides (each 1 or more) can be halved without a remainder."""
    common = math.gcd(*sides)
    return (common & -common).bit_length() - 1


def zero_module(module: nn.Module) -> nn.Module:
    """The module with zero-initialized parameters, for a residual branch that starts at zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


FEW_QUERIES, FEW_QUERIES_IN_BF16 = 128, 256
"""Up to how many queries `attend` is plain products on CPUs; the second: in bf16 with gradients.

The CPU's fused kernel packs bf16 anew in its backward pass. Plain products take a quarter of its time in bf16 on 8x8
pixels, half on 16x16 and the same on 32x32, whose L x M matrix it does not keep; in fp32 they are no faster.
"""


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention: (N, heads, L, D) over (N, heads, M, D) twice -> (N, heads, L, D).

    Args:
        mask: (N, M) bool, false for keys that nothing attends to, one or more true in each row; None: all true. What
            lies under a false one must be finite.
    """
    seen = None if mask is None else mask[:, None, None]  # (N, 1, 1, M)
    few = FEW_QUERIES_IN_BF16 if query.dtype == torch.bfloat16 and torch.is_grad_enabled() else FEW_QUERIES
    if query.device.type == "cpu" and not torch.compiler.is_exporting() and query.shape[-2] <= few:
        # (An exported program keeps one of the two for all sizes.)
        scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)  # (N, heads, L, M)
        return (scores if seen is None else scores.masked_fill(~seen, -math.inf)).softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value, seen)


class Attention(nn.Module):
    """Queries (N, L, C) attend to tokens (N, M, D) where `mask` (N, M) is true; with themselves: self-attention."""

    def __init__(self, channels: Count, token_channels: Count, heads: Count) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(token_channels, channels, bias=False)
        self.value = nn.Linear(token_channels, channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.query(x), self.key(tokens), self.value(tokens)  # (N, L, C), twice (N, M, C)
        q, k, v = (rearrange(part, "n l (h d) -> n h l d", h=self.heads) for part in (q, k, v))
        h = attend(q, k, v, mask)  # (N, heads, L, C / heads)
        return self.out(rearrange(h, "n h l d -> n l (h d)"))  # (N, L, C)


class GatedFeedForward(nn.Module):
    """Two linear layers with four times the width in between and a GELU gate (GEGLU; Shazeer 2020): (N, L, C)."""

    def __init__(self, channels: Count) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 8 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.fc1(x).chunk(2, dim=-1)  # 2 x (N, L, 4C)
        return self.fc2(value * F.gelu(gate))  # (N, L, C)
