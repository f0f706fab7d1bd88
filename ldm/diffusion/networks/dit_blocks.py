"""The layers of the diffusion transformer (dit.py): attention within a sequence and to tokens, feed-forward, blocks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.layers import attend
from ldm.ranges import Count, Positive


class SelfAttention(nn.Module):
    """Self-attention over tokens (N, L, C).

    `rotation` (2, L, C / heads) rotates queries and keys by position, and `mask` (N, L) is false where nothing looks.
    """

    def __init__(self, channels: Count, heads: Count, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.norm_q = nn.RMSNorm(channels // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(channels // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, rotation: Tensor | None, mask: Tensor | None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "n l (three h d) -> three n h l d", three=3, h=self.heads)
        q, k = self.norm_q(q), self.norm_k(k)  # each (N, heads, L, C / heads)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)  # each (N, heads, L, C / heads)
        h = attend(q, k, v, mask)  # (N, heads, L, C / heads)
        return self.out(rearrange(h, "n h l d -> n l (h d)"))  # (N, L, C)


class CrossAttention(nn.Module):
    """Queries (N, L, C) attend to tokens (N, M, C) where `mask` (N, M) is true."""

    def __init__(self, channels: Count, heads: Count, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(channels, 2 * channels)
        self.norm_q = nn.RMSNorm(channels // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(channels // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        q = rearrange(self.query(x), "n l (h d) -> n h l d", h=self.heads)  # (N, heads, L, C / heads)
        k, v = rearrange(self.key_value(tokens), "n m (two h d) -> two n h m d", two=2, h=self.heads)
        h = attend(self.norm_q(q), self.norm_k(k), v, mask)  # (N, heads, L, C / heads)
        return self.out(rearrange(h, "n h l d -> n l (h d)"))  # (N, L, C)


class FeedForward(nn.Module):
    """Two linear layers around a GELU: (N, L, C)."""

    def __init__(self, channels: Count, ratio: Positive) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, int(ratio * channels))
        self.fc2 = nn.Linear(int(ratio * channels), channels)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.fc1(x), approximate="tanh")  # (N, L, ratio C)
        return self.fc2(h)  # (N, L, C)


class SwiGLU(nn.Module):
    """Two linear layers with a SiLU gate (Shazeer 2020), two thirds as wide for the same parameter count: (N, L, C)."""

    def __init__(self, channels: Count, ratio: Positive) -> None:
        super().__init__()
        width = int(ratio * channels * 2 / 3)
        self.fc1 = nn.Linear(channels, 2 * width)
        self.fc2 = nn.Linear(width, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)  # 2 x (N, L, 2/3 ratio C)
        return self.fc2(F.silu(gate) * value)  # (N, L, C)


class Block(nn.Module):
    """Attention, then a feed-forward network, each normalized, shifted, scaled and gated by `emb` (N, C).

    Args:
        cross: attention to tokens in between, as it is; None: there is none.
    """

    def __init__(
        self,
        channels: Count,
        attention: nn.Module,
        feed: nn.Module,
        make_norm: Callable[[int], nn.Module],
        cross: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm_attention = make_norm(channels)
        self.attention = attention
        self.cross = cross
        self.norm_feed = make_norm(channels)
        self.feed = feed
        self.modulation = nn.Linear(channels, 6 * channels)

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        rotation: Tensor | None,
        mask: Tensor | None = None,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulation(emb)[:, None].chunk(6, dim=-1)  # (N, 1, C)
        h = self.attention(self.norm_attention(x) * (1 + scale_a) + shift_a, rotation, mask)  # (N, L, C)
        x = x + gate_a * h  # (N, L, C)
        if self.cross is not None:
            x = x + self.cross(x, tokens, token_mask)  # (N, L, C)
        h = self.feed(self.norm_feed(x) * (1 + scale_f) + shift_f)  # (N, L, C)
        return x + gate_f * h  # (N, L, C)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates each pair of channels (i, i + D / 2) of (N, heads, L, D) by its angle; computed in float32."""
    cosine, sine = rotation  # each (L, D)
    first, second = x.float().chunk(2, dim=-1)  # 2 x (N, heads, L, D / 2)
    return (x * cosine + torch.cat([-second, first], dim=-1) * sine).to(x.dtype)  # (N, heads, L, D)
