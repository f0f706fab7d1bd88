"""The tensors of facebookresearch/DiT, willisma/SiT and hustvl/LightningDiT, whose names agree.

Three things are arranged differently. A patch's outputs are pixel by pixel there, channel by channel here. SiT and
LightningDiT run time the other way, t = 1 is data. LightningDiT's rotary positions turn neighboring channels of a
head, (2i, 2i + 1), ours those half a head apart, (i, i + d / 2).
"""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ldm.interop.tables import SAME, Change, Entry, each, layer
from ldm.runtime.float64 import double


def table(sizes: Mapping[str, Any], backward: bool) -> list[Entry]:
    """Of a network of these parameters (ldm/diffusion/networks/dit.py) and its class table.

    Args:
        sizes: of DiT; all that differ from the defaults.
        backward: t runs from noise (0) to data (1) there. The network's output is then negated, and its first timestep
            layer `folded`, whose numbers change in their last bits; all else is exact.
    """
    turned = _heads(sizes["num_heads"]) if sizes["rope"] else SAME
    out = _patch_outputs(sizes["patch_size"], -1 if backward else 1)
    entries = [
        *layer("network.patches", "x_embedder.proj", _patch_inputs(sizes["patch_size"])),
        *layer("network.embed.0", "t_embedder.mlp.0", each(folded, folded) if backward else SAME),
        *layer("network.embed.2", "t_embedder.mlp.2"),
        *layer("conditioner.table", "y_embedder.embedding_table", bias=None),
        *layer("network.modulation_out", "final_layer.adaLN_modulation.1"),
        *layer("network.out", "final_layer.linear", out, out),
    ]
    if sizes["rms_norm"]:
        entries += layer("network.norm_out", "final_layer.norm_final", bias=None)
    for block in range(sizes["depth"]):
        entries += _block(f"network.layers.{block}", f"blocks.{block}", sizes, turned)
    return entries


def _block(ours: str, theirs: str, sizes: Mapping[str, Any], turned: Change) -> list[Entry]:
    rows = _of_queries_and_keys(turned)
    feed = ("w12", "w3") if sizes["swiglu"] else ("fc1", "fc2")
    entries = [
        *layer(f"{ours}.attention.qkv", f"{theirs}.attn.qkv", rows, rows),
        *layer(f"{ours}.attention.out", f"{theirs}.attn.proj"),
        *layer(f"{ours}.feed.fc1", f"{theirs}.mlp.{feed[0]}"),
        *layer(f"{ours}.feed.fc2", f"{theirs}.mlp.{feed[1]}"),
        *layer(f"{ours}.modulation", f"{theirs}.adaLN_modulation.1"),
    ]
    if sizes["rms_norm"]:
        entries += layer(f"{ours}.norm_attention", f"{theirs}.norm1", bias=None)
        entries += layer(f"{ours}.norm_feed", f"{theirs}.norm2", bias=None)
    if sizes["qk_norm"]:
        one = _heads(1) if sizes["rope"] else SAME
        for which in "qk":
            entries += layer(f"{ours}.attention.norm_{which}", f"{theirs}.attn.{which}_norm", one, bias=None)
    return entries


def folded(weight: Tensor) -> Tensor:
    """The first timestep layer (C, 256) for 1 - t in place of t; its own inverse but for rounding, computed in float64.

    With W = [A | B] on [cos(t f) | sin(t f)], the angles' difference gives [A cos f + B sin f | A sin f - B cos f].
    """
    a, b = double(weight).chunk(2, dim=1)
    half = a.shape[1]
    f = 10_000.0 ** (-double(torch.arange(half, device=weight.device)) / half)
    return torch.cat([a * f.cos() + b * f.sin(), a * f.sin() - b * f.cos()], dim=1).float()


def _patch_inputs(side: int) -> Change:
    """A convolution (D, c, p, p) as a linear layer (D, c p p)."""
    return each(
        lambda weight: rearrange(weight, "d c p q -> d (c p q)"),
        lambda weight: rearrange(weight, "d (c p q) -> d c p q", p=side, q=side),
    )


def _patch_outputs(side: int, sign: int) -> Change:
    """Rows (p, p, c) as (c, p, p), times `sign`."""
    return each(
        lambda rows: sign * rearrange(rows, "(p q c) ... -> (c p q) ...", p=side, q=side),
        lambda rows: sign * rearrange(rows, "(c p q) ... -> (p q c) ...", p=side, q=side),
    )


def _heads(heads: int) -> Change:
    """Rows (head, pair, 2) as (head, 2, pair)."""
    return each(
        lambda rows: rearrange(rows, "(h pair two) ... -> (h two pair) ...", h=heads, two=2),
        lambda rows: rearrange(rows, "(h two pair) ... -> (h pair two) ...", h=heads, two=2),
    )


def _of_queries_and_keys(turned: Change) -> Change:
    """That change of the first two thirds of the rows; values are not turned."""

    def ours(rows: Tensor) -> Tensor:
        q, k, v = rows.chunk(3)
        return torch.cat([turned.ours([q]), turned.ours([k]), v])

    def theirs(rows: Tensor) -> Tensor:
        q, k, v = rows.chunk(3)
        return torch.cat([*turned.theirs(q), *turned.theirs(k), v])

    return each(ours, theirs)
