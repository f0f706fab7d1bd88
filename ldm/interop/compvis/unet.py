"""The UNet of CompVis' latent-diffusion and of Stable Diffusion 1 and 2: its architecture from its tensors, its table.

The names are those of `UNetModel` in CompVis/latent-diffusion, ldm/modules/diffusionmodules/openaimodel.py, without a
prefix: `input_blocks.4.1.proj_in.weight`. Block I of theirs, part J, is chain I - 1, layer J of ours on the way down
(their block 0 is our first convolution), and chain I, layer J on the way up.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.errors import CheckpointError
from ldm.interop.tables import CONV1D_AS_CONV2D, LINEAR_AS_CONV2D, SAME, Change, Entry, each, layer, under
from ldm.layers import group_norm

GROUPS = 32
"""Of every GroupNorm of theirs, whatever the width; ours has as many from 128 channels on."""


def architecture(tensors: Mapping[str, Tensor], origin: str) -> dict[str, Any]:
    """The parameters of our UNet that shapes say: all but the heads, dropout and what only training needs.

    Raises:
        CheckpointError: no UNet that ours can be, such as one with another number of blocks at each level.
    """

    def shape(name: str) -> torch.Size:
        if (found := tensors.get(f"{name}.weight")) is None or found.ndim < 2:
            raise CheckpointError(f"{origin}: in its UNet there is no {name}.weight. Is the file whole?")
        return found.shape

    blocks = _count(tensors, "output_blocks.{}.0.in_layers.0.weight")
    ups = [block for block in range(blocks) if _up(tensors, block)]
    levels = len(ups) + 1
    per_level = blocks // levels
    if ups != [per_level * (level + 1) - 1 for level in range(levels - 1)] or blocks % levels or per_level < 2:
        raise CheckpointError(
            f"{origin}: expected as many residual blocks at each level of the UNet, found {blocks} blocks on the way "
            f"up, with upsampling after {', '.join(map(str, ups)) or 'none'}"
        )
    model_channels = shape("time_embed.0")[1]
    firsts = [per_level * (levels - 1 - level) for level in range(levels)]  # on the way up, from full resolution on
    widths = [shape(f"output_blocks.{first}.0.out_layers.3")[0] for first in firsts]
    norms = (model_channels, *widths)
    if wrong := [width for width in norms if not width or width % GROUPS]:
        raise CheckpointError(f"{origin}: expected widths in steps of {GROUPS}, found {wrong[0]}")
    latent_channels = shape("out.2")[0]
    attends = any(".transformer_blocks." in name for name in tensors)
    return {
        "in_channels": latent_channels,
        "model_channels": model_channels,
        "channel_mult": [width // model_channels for width in widths],
        "num_res_blocks": per_level - 1,
        "attention_levels": [n for n, first in enumerate(firsts) if f"output_blocks.{first}.1.norm.weight" in tensors],
        "context_dim": shape("middle_block.1.transformer_blocks.0.attn2.to_k")[1] if attends else None,
        "transformer_depth": max(1, _count(tensors, "middle_block.1.transformer_blocks.{}.norm1.weight")),
        "spatial_channels": shape("input_blocks.0.0")[1] - latent_channels,
        "scale_shift": shape("middle_block.0.emb_layers.1")[0] == 2 * widths[-1],
        "resample_in_blocks": any(_up(tensors, block) == "in_layers.0" for block in ups),
        "norm_groups": GROUPS if any(group_norm(width).num_groups != GROUPS for width in norms) else None,
    }


def is_linear(tensors: Mapping[str, Tensor]) -> bool:
    """Whether transformers begin and end with linear layers instead of convolutions: Stable Diffusion 2."""
    projection = tensors.get("middle_block.1.proj_in.weight")
    return projection is not None and projection.ndim == 2


def table(params: Mapping[str, Any], *, linear: bool, by_head: bool) -> list[Entry]:
    """Of the UNet with these parameters.

    Args:
        linear: `is_linear`.
        by_head: rows of q, k and v lie together for each head in plain attention, as unless
            `use_new_attention_order`.
    """
    base = params["model_channels"]
    widths = [base * factor for factor in params["channel_mult"]]

    def attention(ours: str, theirs: str, width: int) -> list[Entry]:
        if params["context_dim"] is not None:
            return under(_transformer(params["transformer_depth"], linear), f"{ours}.", f"{theirs}.")
        heads = params.get("num_heads") or width // params["num_head_channels"]
        return under(_self_attention(heads, by_head), f"{ours}.", f"{theirs}.")

    entries = [
        *layer("embed.0", "time_embed.0"),
        *layer("embed.2", "time_embed.2"),
        *layer("conv_in", "input_blocks.0.0"),
        *_res_block("middle.0", "middle_block.0", False),
        *attention("middle.1", "middle_block.1", widths[-1]),
        *_res_block("middle.2", "middle_block.2", False),
        *layer("norm_out", "out.0"),
        *layer("conv_out", "out.2"),
    ]
    previous, block, skips = base, 0, [base]
    for level, width in enumerate(widths):
        for _ in range(params["num_res_blocks"]):
            ours, theirs = f"down.{block}", f"input_blocks.{block + 1}"
            entries += _res_block(f"{ours}.0", f"{theirs}.0", previous != width)
            if level in params["attention_levels"]:
                entries += attention(f"{ours}.1", f"{theirs}.1", width)
            previous, block = width, block + 1
            skips.append(width)
        if level < len(widths) - 1:
            entries += _resampling(params, f"down.{block}.0", f"input_blocks.{block + 1}.0", "op")
            block += 1
            skips.append(width)
    block = 0
    for level, width in reversed([*enumerate(widths)]):
        for place in range(params["num_res_blocks"] + 1):
            ours, theirs, part = f"up.{block}", f"output_blocks.{block}", 1
            entries += _res_block(f"{ours}.0", f"{theirs}.0", previous + skips.pop() != width)
            if level in params["attention_levels"]:
                entries += attention(f"{ours}.1", f"{theirs}.1", width)
                part = 2
            if level > 0 and place == params["num_res_blocks"]:
                entries += _resampling(params, f"{ours}.{part}", f"{theirs}.{part}", "conv")
            previous, block = width, block + 1
    return entries


def _resampling(params: Mapping[str, Any], ours: str, theirs: str, name: str) -> list[Entry]:
    if params["resample_in_blocks"]:
        return _res_block(ours, theirs, False)
    return layer(f"{ours}.conv", f"{theirs}.{name}")


def _res_block(ours: str, theirs: str, wider: bool) -> list[Entry]:
    names = {
        "norm_in": "in_layers.0",
        "conv_in": "in_layers.2",
        "embedding": "emb_layers.1",
        "norm_out": "out_layers.0",
        "conv_out": "out_layers.3",
    } | ({"shortcut": "skip_connection"} if wider else {})
    return [entry for own, name in names.items() for entry in layer(f"{ours}.{own}", f"{theirs}.{name}")]


def _self_attention(heads: int, by_head: bool) -> list[Entry]:
    weight, bias = (_by_head(heads, axes) if by_head else axes for axes in (CONV1D_AS_CONV2D, SAME))
    return [*layer("norm", "norm"), *layer("qkv", "qkv", weight, bias), *layer("out", "proj_out", CONV1D_AS_CONV2D)]


def _by_head(heads: int, axes: Change) -> Change:
    """Their rows (heads, 3, d) -> ours (3, heads, d), and the change of axes."""

    def ours(rows: Tensor) -> Tensor:
        return axes.ours([rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)])

    def theirs(rows: Tensor) -> Tensor:
        (changed,) = axes.theirs(rows)
        return changed.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)

    return each(ours, theirs)


def _transformer(depth: int, linear: bool) -> list[Entry]:
    projection = LINEAR_AS_CONV2D if linear else SAME
    entries = [
        *layer("norm", "norm"),
        *layer("conv_in", "proj_in", projection),
        *layer("conv_out", "proj_out", projection),
    ]
    for block in range(depth):
        ours = "" if block == 0 else f"further.{block - 1}."
        entries += under(_transformer_block(), ours, f"transformer_blocks.{block}.")
    return entries


def _transformer_block() -> list[Entry]:
    entries = [
        *layer("norm_self", "norm1"),
        *layer("norm_cross", "norm2"),
        *layer("norm_feed", "norm3"),
        *layer("feed.fc1", "ff.net.0.proj"),
        *layer("feed.fc2", "ff.net.2"),
    ]
    for ours, theirs in {"attend_self": "attn1", "attend_cross": "attn2"}.items():
        for own, name in {"query": "to_q", "key": "to_k", "value": "to_v"}.items():
            entries += layer(f"{ours}.{own}", f"{theirs}.{name}", bias=None)
        entries += layer(f"{ours}.out", f"{theirs}.to_out.0")
    return entries


def _up(tensors: Mapping[str, Tensor], block: int) -> str:
    """What doubles the resolution at the end of an output block: `conv`, or the first layer of a residual block; ""."""
    for part in (1, 2):
        for name in ("conv", "in_layers.0"):
            if f"output_blocks.{block}.{part}.{name}.weight" in tensors:
                return name
    return ""


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How many names fit the pattern, with numbers from 0 on in its braces."""
    number = 0
    while pattern.format(number) in tensors:
        number += 1
    return number
