"""The attention layers of the UNet: among pixels, and from pixels to context tokens.

Inside, the channels of a pixel lie side by side in memory (channels_last), as attention wants them and as a 1x1
convolution, which is then a matrix product, is fastest.
"""

from torch import Tensor, nn

from ldm.channels_last import LAYOUT
from ldm.layers import Attention, GatedFeedForward, attend, group_norm, zero_module
from ldm.ranges import Count, Positive


class SelfAttention(nn.Module):
    """Every pixel attends to every other."""

    def __init__(
        self, channels: Count, heads: Count, norm_groups: Count | None = None, norm_eps: Positive = 1e-5
    ) -> None:
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels, norm_eps, norm_groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_module(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None, mask: Tensor | None = None) -> Tensor:
        qkv = self.qkv(self.norm(x).contiguous(memory_format=LAYOUT)).flatten(2).transpose(1, 2)  # (N, HW, 3C)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (N, heads, HW, C / heads)
        h = attend(q, k, v).transpose(1, 2).flatten(2)  # (N, HW, C)
        return x + self.out(h.transpose(1, 2).reshape_as(x))  # (N, C, H, W)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the tokens, feed-forward, each pre-norm, residual: (N, L, C) -> (N, L, C)."""

    def __init__(self, channels: Count, token_channels: Count, heads: Count) -> None:
        super().__init__()
        self.norm_self, self.attend_self = nn.LayerNorm(channels), Attention(channels, channels, heads)
        self.norm_cross, self.attend_cross = nn.LayerNorm(channels), Attention(channels, token_channels, heads)
        self.norm_feed, self.feed = nn.LayerNorm(channels), GatedFeedForward(channels)

    def forward(self, h: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return _transformed(self, h, tokens, mask)


class SpatialTransformer(nn.Module):
    """Pixels as a sequence, passed through `depth` transformer blocks (Rombach et al. 2022).

    The first block's layers are attributes of this module, under the names and in the order that they had before there
    could be several blocks: weights and optimizer states of older checkpoints are loaded by name and order.
    """

    def __init__(
        self,
        channels: Count,
        token_channels: Count,
        heads: Count,
        depth: Count = 1,
        norm_groups: Count | None = None,
    ) -> None:
        super().__init__()
        self.norm = group_norm(channels, 1e-6, norm_groups)
        self.conv_in = nn.Conv2d(channels, channels, 1)
        self.norm_self, self.attend_self = nn.LayerNorm(channels), Attention(channels, channels, heads)
        self.norm_cross, self.attend_cross = nn.LayerNorm(channels), Attention(channels, token_channels, heads)
        self.norm_feed, self.feed = nn.LayerNorm(channels), GatedFeedForward(channels)
        self.further = nn.ModuleList(TransformerBlock(channels, token_channels, heads) for _ in range(depth - 1))
        self.conv_out = zero_module(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.conv_in(self.norm(x).contiguous(memory_format=LAYOUT)).flatten(2).transpose(1, 2)  # (N, HW, C)
        h = _transformed(self, h, tokens, mask)  # (N, HW, C)
        for block in self.further:
            h = block(h, tokens, mask)  # (N, HW, C)
        return x + self.conv_out(h.transpose(1, 2).reshape_as(x))  # (N, C, H, W)


def _transformed(
    layers: TransformerBlock | SpatialTransformer, h: Tensor, tokens: Tensor, mask: Tensor | None
) -> Tensor:
    """One block's layers on pixels (N, HW, C) and tokens (N, L, D) with their mask (N, L): (N, HW, C)."""
    inside = layers.norm_self(h)  # (N, HW, C)
    h = h + layers.attend_self(inside, inside)  # (N, HW, C)
    h = h + layers.attend_cross(layers.norm_cross(h), tokens, mask)  # (N, HW, C)
    return h + layers.feed(layers.norm_feed(h))  # (N, HW, C)
