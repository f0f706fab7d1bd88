"""The diffusion transformer (Peebles and Xie 2023, "DiT") and its modern form (Yao et al. 2025, "LightningDiT").

A latent is cut into patches, each a token; the noise level and the conditioning vector shift, scale and gate every
block (adaLN-Zero). The modern form changes four things, each with its own switch: RMSNorm, SwiGLU, rotary positions,
normalized queries and keys. LightningDiT's published weights use the first three, plus positional embeddings added to
the tokens (`absolute_positions`). Published sizes (hidden_size, depth, num_heads): S 384, 12, 6; B 768, 12, 12; L 1024,
24, 16; XL 1152, 28, 16; the conditioner's class vector has `hidden_size` channels.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.diffusion.conditioners.base import Conditioning
from ldm.errors import ConfigError
from ldm.layers import attend, run_block, timestep_embedding, zero_module
from ldm.ranges import Count, CountOrZero, Positive
from ldm.sizes import SizeError

_FREQUENCIES = 256
"""Width of the noise level's embedding, as published."""


class SelfAttention(nn.Module):
    """Self-attention over tokens (N, L, C); `rotation` (2, L, C / heads) rotates queries and keys by position."""

    def __init__(self, channels: Count, heads: Count, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.norm_q = nn.RMSNorm(channels // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(channels // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "n l (three h d) -> three n h l d", three=3, h=self.heads)
        q, k = self.norm_q(q), self.norm_k(k)  # each (N, heads, L, C / heads)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)  # each (N, heads, L, C / heads)
        h = attend(q, k, v)  # (N, heads, L, C / heads)
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
    """Attention, then a feed-forward network, each normalized, shifted, scaled and gated by `emb` (N, C)."""

    def __init__(
        self, channels: Count, attention: nn.Module, feed: nn.Module, make_norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.norm_attention = make_norm(channels)
        self.attention = attention
        self.norm_feed = make_norm(channels)
        self.feed = feed
        self.modulation = zero_module(nn.Linear(channels, 6 * channels))

    def forward(self, x: Tensor, emb: Tensor, rotation: Tensor | None) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulation(emb)[:, None].chunk(6, dim=-1)  # (N, 1, C)
        h = self.attention(self.norm_attention(x) * (1 + scale_a) + shift_a, rotation)  # (N, L, C)
        x = x + gate_a * h  # (N, L, C)
        h = self.feed(self.norm_feed(x) * (1 + scale_f) + shift_f)  # (N, L, C)
        return x + gate_f * h  # (N, L, C)


class DiT(nn.Module):
    """net(x (N,C,H,W), noise_level (N,), conditioning) -> (N,C,H,W), deterministic in its inputs.

    Height and width must be divisible by `patch_size`.

    Args:
        in_channels: channels of x, and of the output.
        patch_size: side of the patches that become tokens.
        hidden_size: width; also that of the conditioning vector, if `vector_channels` is None.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the feed-forward networks in units of `hidden_size`.
        spatial_channels: channels of the conditioning image, concatenated to x.
        rms_norm: RMSNorm with a learned scale instead of LayerNorm without.
        swiglu: gated feed-forward networks.
        rope: rotary position embedding of queries and keys (Su et al. 2021, along both axes).
        qk_norm: RMSNorm of queries and keys (Dehghani et al. 2023), which keeps long training stable.
        checkpointing: recompute activations in the backward pass instead of storing them.
        absolute_positions: add fixed sinusoidal position embeddings to the tokens; None: only if `rope` is off.
        vector_channels: width of a conditioning vector that a linear layer brings to `hidden_size`, such as that of
            several conditioners (Joint); None: the vector, if there is one, is added as it is.

    Raises:
        ConfigError: parameters that contradict one another, or an input that does not fit them.
    """

    def __init__(
        self,
        in_channels: Count,
        patch_size: Count,
        hidden_size: Count,
        depth: Count,
        num_heads: Count,
        mlp_ratio: Positive = 4.0,
        spatial_channels: CountOrZero = 0,
        rms_norm: bool = False,
        swiglu: bool = False,
        rope: bool = False,
        qk_norm: bool = False,
        checkpointing: bool = False,
        absolute_positions: bool | None = None,
        vector_channels: Count | None = None,
    ) -> None:
        super().__init__()
        if hidden_size % (4 * num_heads):
            raise ConfigError(f"DiT: hidden_size={hidden_size} must be divisible by 4 x num_heads={num_heads}")
        if absolute_positions is False and not rope:
            raise ConfigError("DiT: tokens have no positions; turn on rope or absolute_positions")
        self.in_channels, self.patch_size, self.hidden_size = in_channels, patch_size, hidden_size
        self.spatial_channels, self.rope, self.checkpointing = spatial_channels, rope, checkpointing
        self.vector_channels = vector_channels
        self.absolute_positions = not rope if absolute_positions is None else absolute_positions
        self.head_channels = hidden_size // num_heads
        make_norm = (
            partial(nn.RMSNorm, eps=1e-6) if rms_norm else partial(nn.LayerNorm, eps=1e-6, elementwise_affine=False)
        )
        make_feed = SwiGLU if swiglu else FeedForward
        self.embed = nn.Sequential(nn.Linear(_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.embed_vector = None if vector_channels is None else nn.Linear(vector_channels, hidden_size)
        self.patches = nn.Linear((in_channels + spatial_channels) * patch_size**2, hidden_size)
        self.layers = nn.ModuleList(
            Block(
                hidden_size,
                SelfAttention(hidden_size, num_heads, qk_norm),
                make_feed(hidden_size, mlp_ratio),
                make_norm,
            )
            for _ in range(depth)
        )
        self.norm_out = make_norm(hidden_size)
        self.modulation_out = nn.Linear(hidden_size, 2 * hidden_size)
        self.out = nn.Linear(hidden_size, in_channels * patch_size**2)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, weight in self.embed.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(weight, std=0.02)
        # Every block starts as the identity, and the network's output as zero.
        for module in self.modules():
            if isinstance(module, Block):
                zero_module(module.modulation)
        zero_module(self.modulation_out)
        zero_module(self.out)

    def forward(self, x: Tensor, noise_level: Tensor, conditioning: Conditioning) -> Tensor:
        self._check(x, conditioning)
        if conditioning.spatial is not None:
            x = torch.cat([x, conditioning.spatial], dim=1)  # (N, in_channels + spatial_channels, H, W)
        p = self.patch_size
        rows, columns = x.shape[2] // p, x.shape[3] // p
        emb = self.embed(timestep_embedding(noise_level, _FREQUENCIES))  # (N, C)
        if conditioning.vector is not None:
            vector = conditioning.vector  # (N, vector_channels or C)
            emb = emb + (vector if self.embed_vector is None else self.embed_vector(vector))  # (N, C)
        emb = F.silu(emb)  # (N, C), activated here once for all blocks
        tokens = self.patches(rearrange(x, "n c (h p) (w q) -> n (h w) (c p q)", p=p, q=p))  # (N, L, C)
        rotation = None
        if self.rope:
            rotation = rotations(rows, columns, self.head_channels, x.device)  # (2, L, C / heads)
        if self.absolute_positions:
            tokens = tokens + positions(rows, columns, self.hidden_size, x.device)  # (N, L, C)
        for block in self.layers:
            tokens = self._run(block, tokens, emb, rotation)  # (N, L, C)
        shift, scale = self.modulation_out(emb)[:, None].chunk(2, dim=-1)  # 2 x (N, 1, C)
        tokens = self.out(self.norm_out(tokens) * (1 + scale) + shift)  # (N, L, in_channels p p)
        return rearrange(tokens, "n (h w) (c p q) -> n c (h p) (w q)", h=rows, p=p, q=p)  # (N, in_channels, H, W)

    def blocks(self) -> list[nn.Module]:
        """The parts that hold nearly all of the weights and run one after another, for sharding."""
        return [*self.layers]

    def _run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        return run_block(block, *inputs, recompute=self.checkpointing)

    def _check(self, x: Tensor, conditioning: Conditioning) -> None:
        """Shapes only: costs nothing and never waits for the device."""
        if x.shape[1] != self.in_channels or x.shape[2] % self.patch_size or x.shape[3] % self.patch_size:
            raise SizeError(
                f"DiT: expects a latent of {self.in_channels} channels (in_channels) with sides divisible by "
                f"{self.patch_size} (patch_size), got {[*x.shape[1:]]}: change the network or the data",
                self.patch_size,
            )
        if conditioning.tokens is not None:
            raise ConfigError("DiT: reads no tokens; use a conditioner that fills the vector (ClassVector), or a UNet")
        found = None if conditioning.vector is None else conditioning.vector.shape[-1]
        if self.vector_channels is not None and found != self.vector_channels:
            raise ConfigError(
                f"DiT: vector_channels={self.vector_channels}, but the conditioner's vector slot has width {found}"
            )
        if self.vector_channels is None and found not in (None, self.hidden_size):
            raise ConfigError(
                f"DiT: hidden_size={self.hidden_size}, but the conditioner's vector slot has width {found}; set "
                f"vector_channels={found}, or change the conditioner"
            )
        width = 0 if conditioning.spatial is None else conditioning.spatial.shape[1]
        if width != self.spatial_channels:
            raise ConfigError(
                f"DiT: spatial_channels={self.spatial_channels}, but the conditioner's spatial slot has width {width}"
            )


def positions(rows: int, columns: int, channels: int, device: torch.device) -> Tensor:
    """Fixed position embeddings of a grid: (rows * columns, channels) float32; columns first, then rows.

    Each half holds sines, then cosines, at frequencies from 1 down to 1 / 10,000.
    """
    y, x = _places(rows, columns, device)
    quarter = channels // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, device=device) / quarter)  # (channels / 4,)
    parts = [place[:, None] * frequencies for place in (x, y)]  # each (L, channels / 4)
    return torch.cat([wave(part) for part in parts for wave in (torch.sin, torch.cos)], dim=1)  # (L, channels)


def rotations(rows: int, columns: int, channels: int, device: torch.device) -> Tensor:
    """Cosines and sines of the rotation angles of a head's channel pairs: (2, rows * columns, channels) float32.

    Half of the pairs encode the row, the other half the column (axial); pairs are (i, i + channels / 2).
    """
    y, x = _places(rows, columns, device)
    quarter = channels // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, device=device) / quarter)  # (channels / 4,)
    angles = torch.cat([y[:, None] * frequencies, x[:, None] * frequencies], dim=1)  # (L, channels / 2)
    angles = torch.cat([angles, angles], dim=1)  # (L, channels)
    return torch.stack([angles.cos(), angles.sin()])  # (2, L, channels)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates each pair of channels (i, i + D / 2) of (N, heads, L, D) by its angle; computed in float32."""
    cosine, sine = rotation  # each (L, D)
    first, second = x.float().chunk(2, dim=-1)  # 2 x (N, heads, L, D / 2)
    return (x * cosine + torch.cat([-second, first], dim=-1) * sine).to(x.dtype)  # (N, heads, L, D)


def _places(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column index of each position, row by row: each (rows * columns,) float32."""
    y, x = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    return y.flatten().float(), x.flatten().float()
