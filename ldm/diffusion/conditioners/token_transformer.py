"""The transformer over token numbers of latent diffusion's own models (Rombach et al. 2022, appendix E.2.1).

Learned tokens and places, pre-norm layers in which every token sees every other, and a last norm: `TransformerWrapper`
in CompVis/latent-diffusion. It is trained with the denoiser, and reads captions and layouts.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.ranges import Count


class TokenTransformer(nn.Module):
    """Token numbers (N, L) int64 -> (N, L, `channels`).

    Args:
        vocab_size: how many tokens there are.
        length: L.
        channels: width.
        depth: layers.
        num_heads: of attention.
        num_head_channels: of each of them, whatever the width.
    """

    def __init__(
        self,
        vocab_size: Count,
        length: Count,
        channels: Count,
        depth: Count,
        num_heads: Count = 8,
        num_head_channels: Count = 64,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab_size, channels)
        self.places = nn.Parameter(torch.empty(length, channels))
        self.layers = nn.ModuleList(Layer(channels, num_heads, num_head_channels) for _ in range(depth))
        self.norm = nn.LayerNorm(channels)
        for table in (self.words.weight, self.places):
            nn.init.normal_(table, std=0.02)

    def encoded(self, words: Tensor, seen: Tensor | None = None) -> Tensor:
        """(N, L, channels); `seen` (N, L) bool: the tokens that are attended to; None: all."""
        h = self.words(words) + self.places  # (N, L, D)
        for layer in self.layers:
            h = layer(h, seen)  # (N, L, D)
        normed: Tensor = self.norm(h)  # (N, L, D)
        return normed


class Layer(nn.Module):
    """Attention of all words to all words, then a feed-forward, each pre-norm and residual: (N, L, D) -> (N, L, D)."""

    def __init__(self, channels: Count, num_heads: Count, num_head_channels: Count) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * num_head_channels
        self.norm_attend = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * inner, bias=False)
        self.out = nn.Linear(inner, channels)
        self.norm_feed = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """mask (N, L) bool: the words that are seen; None: all."""
        qkv = self.qkv(self.norm_attend(h))  # (N, L, 3 inner)
        q, k, v = rearrange(qkv, "n l (three heads c) -> three n heads l c", three=3, heads=self.num_heads)
        seen = None if mask is None else mask[:, None, None]  # (N, 1, 1, L)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)  # (N, heads, L, c)
        h = h + self.out(rearrange(attended, "n heads l c -> n l (heads c)"))  # (N, L, D)
        return h + self.fc2(F.gelu(self.fc1(self.norm_feed(h))))  # (N, L, D)
