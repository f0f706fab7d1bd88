"""The diffusion transformer (Peebles and Xie 2023, "DiT") and its modern form (Yao et al. 2025, "LightningDiT").

A latent is cut into patches, each a token; the noise level and the conditioning vector shift, scale and gate every
block (adaLN-Zero). The modern form changes four things, each with its own switch: RMSNorm, SwiGLU, rotary positions,
normalized queries and keys. LightningDiT's published weights use the first three, plus positional embeddings added to
the tokens (`absolute_positions`). Published sizes (hidden_size, depth, num_heads): S 384, 12, 6; B 768, 12, 12; L 1024,
24, 16; XL 1152, 28, 16; the conditioner's class vector has `hidden_size` channels.

Tokens of a text, or of anything else, come in by one of two ways. Each block attends to them after its self-attention,
without norm or modulation (Chen et al. 2023, "PixArt-alpha"); or they go through all blocks before the image's own, in
one sequence with them (Bao et al. 2023, "U-ViT"; Qin et al. 2025, "Lumina-Image 2.0"). Then they have no positions, as
in FLUX.1 and Stable Diffusion 3: an encoder's tokens hold their order themselves, and padding moves nothing. Either way
two layers bring them to the network's width first, as in PixArt-alpha.
"""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.networks.dit_blocks import Block, CrossAttention, FeedForward, SelfAttention, SwiGLU
from ldm.errors import ConfigError
from ldm.layers import run_block, timestep_embedding, zero_module
from ldm.ranges import Count, CountOrZero, Positive
from ldm.sizes import SizeError

_FREQUENCIES = 256
"""Width of the noise level's embedding, as published."""


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
        context_dim: width of conditioning tokens, which each block attends to; None: no tokens.
        tokens_in_sequence: they are a part of the sequence instead.

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
        context_dim: Count | None = None,
        tokens_in_sequence: bool = False,
    ) -> None:
        super().__init__()
        if hidden_size % (4 * num_heads):
            raise ConfigError(f"DiT: hidden_size={hidden_size} must be divisible by 4 x num_heads={num_heads}")
        if absolute_positions is False and not rope:
            raise ConfigError("DiT: tokens have no positions; turn on rope or absolute_positions")
        if tokens_in_sequence and context_dim is None:
            raise ConfigError(
                "DiT: tokens_in_sequence=True, context_dim=None: set context_dim, the width of the tokens"
            )
        self.in_channels, self.patch_size, self.hidden_size = in_channels, patch_size, hidden_size
        self.spatial_channels, self.rope, self.checkpointing = spatial_channels, rope, checkpointing
        self.vector_channels = vector_channels
        self.context_dim, self.tokens_in_sequence = context_dim, tokens_in_sequence
        self.absolute_positions = not rope if absolute_positions is None else absolute_positions
        self.head_channels = hidden_size // num_heads
        make_norm = (
            partial(nn.RMSNorm, eps=1e-6) if rms_norm else partial(nn.LayerNorm, eps=1e-6, elementwise_affine=False)
        )
        make_feed = SwiGLU if swiglu else FeedForward
        self.embed = nn.Sequential(nn.Linear(_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.embed_vector = None if vector_channels is None else nn.Linear(vector_channels, hidden_size)
        self.embed_tokens = None
        if context_dim is not None:
            self.embed_tokens = nn.Sequential(
                nn.Linear(context_dim, hidden_size), nn.GELU(approximate="tanh"), nn.Linear(hidden_size, hidden_size)
            )
        cross = context_dim is not None and not tokens_in_sequence
        self.patches = nn.Linear((in_channels + spatial_channels) * patch_size**2, hidden_size)
        self.layers = nn.ModuleList(
            Block(
                hidden_size,
                SelfAttention(hidden_size, num_heads, qk_norm),
                make_feed(hidden_size, mlp_ratio),
                make_norm,
                CrossAttention(hidden_size, num_heads, qk_norm) if cross else None,
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
        for embedding in (self.embed, self.embed_tokens):
            for layer in embedding or ():
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.02)
        # Every block starts as the identity, and the network's output as zero.
        for module in self.modules():
            if isinstance(module, Block):
                zero_module(module.modulation)
            elif isinstance(module, CrossAttention):
                zero_module(module.out)
        zero_module(self.modulation_out)
        zero_module(self.out)

    def forward(self, x: Tensor, noise_level: Tensor, conditioning: Conditioning) -> Tensor:
        self._check(x, conditioning)
        x = conditioning.beside(x)  # (N, in_channels + spatial_channels, H, W)
        p = self.patch_size
        rows, columns = x.shape[2] // p, x.shape[3] // p
        emb = self.embed(timestep_embedding(noise_level, _FREQUENCIES))  # (N, C)
        if conditioning.vector is not None:
            vector = conditioning.vector  # (N, vector_channels or C)
            emb = emb + (vector if self.embed_vector is None else self.embed_vector(vector))  # (N, C)
        emb = F.silu(emb)  # (N, C), activated here once for all blocks
        h = self.patches(rearrange(x, "n c (h p) (w q) -> n (h w) (c p q)", p=p, q=p))  # (N, L, C)
        rotation = None
        if self.rope:
            rotation = rotations(rows, columns, self.head_channels, x.device)  # (2, L, C / heads)
        if self.absolute_positions:
            h = h + positions(rows, columns, self.hidden_size, x.device)  # (N, L, C)
        mask, tokens, token_mask = None, conditioning.clean_tokens(), conditioning.token_mask
        if self.embed_tokens is not None:
            tokens = self.embed_tokens(tokens)  # (N, M, C)
        if tokens is not None and self.tokens_in_sequence:
            h, rotation, mask = in_sequence(tokens, h, rotation, token_mask)  # (N, M + L, C)
            tokens = token_mask = None
        for block in self.layers:
            h = self._run(block, h, emb, rotation, mask, tokens, token_mask)  # (N, L or M + L, C)
        h = h[:, -rows * columns :]  # (N, L, C)
        shift, scale = self.modulation_out(emb)[:, None].chunk(2, dim=-1)  # 2 x (N, 1, C)
        h = self.out(self.norm_out(h) * (1 + scale) + shift)  # (N, L, in_channels p p)
        return rearrange(h, "n (h w) (c p q) -> n c (h p) (w q)", h=rows, p=p, q=p)  # (N, in_channels, H, W)

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
        found = None if conditioning.tokens is None else conditioning.tokens.shape[-1]
        if found != self.context_dim:
            reads = "reads no tokens, context_dim" if self.context_dim is None else "context_dim"
            raise ConfigError(
                f"DiT: {reads}={self.context_dim}, but the conditioner's tokens slot has width {found}: "
                "write it there, or use another conditioner, such as ClassVector"
            )
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


def in_sequence(
    tokens: Tensor, image: Tensor, rotation: Tensor | None, token_mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Tokens (N, M, C) before an image's (N, L, C), with the rotation, where the tokens stand still, and the mask."""
    if rotation is not None:
        still = rotation.new_ones(tokens.shape[1], rotation.shape[2])  # (M, C / heads)
        rotation = torch.cat([torch.stack([still, 0 * still]), rotation], dim=1)  # (2, M + L, C / heads)
    mask = None if token_mask is None else torch.cat([token_mask, token_mask.new_ones(image.shape[:2])], dim=1)
    return torch.cat([tokens, image], dim=1), rotation, mask  # (N, M + L, ...)


def _places(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column index of each position, row by row: each (rows * columns,) float32."""
    y, x = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    return y.flatten().float(), x.flatten().float()
