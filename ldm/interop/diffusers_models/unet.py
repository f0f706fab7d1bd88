"""UNet2DModel and UNet2DConditionModel of diffusers, and our UNet: config.json both ways.

A UNet without context tokens is a UNet2DModel, one with tokens a UNet2DConditionModel. The class table of a ClassVector
is a part of their network. `attention_head_dim` is the width of a head in the one, and the number of heads in the
other, where its name is an old mistake.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ldm.diffusion.networks.unet import UNet
from ldm.diffusion.networks.unet_attention import SelfAttention
from ldm.interop.diffusers_models.config import OTHERWISE, Settings, arguments, groups, one_number, raise_all
from ldm.interop.diffusers_models.unet_settings import DEFAULTS, ONLY
from ldm.interop.models import node, on_meta

_BLOCKS = {"UNet2DModel": ("{}Block2D", "Attn{}Block2D"), "UNet2DConditionModel": ("{}Block2D", "CrossAttn{}Block2D")}
_RESIZING = {"Down": "ResnetDownsampleBlock2D", "Up": "ResnetUpsampleBlock2D"}


def from_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The node of our UNet; a class table of theirs makes its conditioning vector, as wide as the noise level's.

    Args:
        config: config.json; its `_class_name` is one of DEFAULTS.
        where: the file, for messages.

    Raises:
        ConfigError: names every setting that our network cannot express.
    """
    name = config["_class_name"]
    settings = Settings(config, DEFAULTS[name], where)
    settings.only(ONLY[name])
    base, channel_mult = settings.widths()
    settings.only({"time_embedding_dim": (None, 4 * base)})
    attention, resizing = _blocks(settings, name, len(channel_mult))
    own, given = settings.whole("out_channels"), settings.whole("in_channels")
    if given < own:
        settings.refuse("out_channels", f"expected as many as in_channels={given}, or fewer")
    scale_shift = settings.values["resnet_time_scale_shift"] == "scale_shift"
    params = {
        "in_channels": own,
        "model_channels": base,
        "channel_mult": channel_mult,
        "num_res_blocks": _uniform(settings, "layers_per_block", [*range(len(channel_mult))]),
        "attention_levels": attention,
        "spatial_channels": max(0, given - own),
        "scale_shift": scale_shift,
        "resample_in_blocks": resizing,
        "dropout": settings.number("dropout", 0, 1),
        "norm_eps": settings.number("norm_eps", 1e-12, 1),
        "pad_end": settings.values["downsample_padding"] == 0,
        "longest_period": longest_period(base, settings.values["freq_shift"]),
    }
    if settings.values["num_class_embeds"] is not None:
        settings.whole("num_class_embeds")
        params["vector_channels"] = 4 * base
    if name == "UNet2DModel":
        params |= _head_width(settings)
        number = settings.values["norm_num_groups"]
        settings.only({"attn_norm_num_groups": (number,) if scale_shift else (None, number)})
    else:
        deepest = len(channel_mult) - 1
        params["context_dim"] = _uniform(settings, "cross_attention_dim", [*attention, deepest])
        params["transformer_depth"] = _uniform(settings, "transformer_layers_per_block", [*attention, deepest])
        params |= _heads(settings, [base * factor for factor in channel_mult], attention)
    settings.check()
    made = node("diffusion.networks.unet.UNet", **params)
    made["params"] |= settings.norm_groups(made)
    settings.check()
    return made


def _blocks(settings: Settings, name: str, count: int) -> tuple[list[int], bool]:
    """The levels with attention, and whether residual blocks change the resolution."""
    levels, resizes = {}, set()
    for way, key in (("Down", "down_block_types"), ("Up", "up_block_types")):
        plain, attending = (pattern.format(way) for pattern in _BLOCKS[name])
        found = settings.values[key]
        known = {plain, attending, *([_RESIZING[way]] if name == "UNet2DModel" else [])}
        found = [str(one).removeprefix("UNetRes") for one in found] if isinstance(found, list | tuple) else []
        if len(found) != count or not {*found} <= known:
            settings.refuse(key, f"expected {count} of {', '.join(sorted(known))}, as many as block_out_channels")
            return [], False
        in_blocks = settings.values.get("downsample_type" if way == "Down" else "upsample_type") == "resnet"
        # The last block of either way changes no resolution.
        resizes |= {one == _RESIZING[way] or (in_blocks and one == attending) for one in found[:-1]}
        found = found if way == "Down" else found[::-1]
        levels[way] = [level for level, one in enumerate(found) if one == attending]
    if levels["Down"] != levels["Up"]:
        settings.refuse("up_block_types", f"attention at levels {levels['Up']}, on the way down at {levels['Down']}")
    if len(resizes) > 1:
        settings.refuse("down_block_types", "resolution changes in residual blocks at some levels, elsewhere not")
    return levels["Down"], resizes == {True}


def _uniform(settings: Settings, key: str, levels: Sequence[int]) -> int:
    """A setting that is one number or one for each level, the same at these levels."""
    value = settings.values[key]
    if not isinstance(value, list | tuple):
        return settings.whole(key)
    values = settings.wholes(key)
    if len(values) <= max(levels) or len({values[level] for level in levels}) > 1:
        settings.refuse(key, "expected one number, or the same one at all levels with attention")
    return values[-1]


def _head_width(settings: Settings) -> dict[str, int]:
    if settings.values["attention_head_dim"] is None:
        return {"num_heads": 1}
    return {"num_head_channels": settings.whole("attention_head_dim")}


def _heads(settings: Settings, widths: Sequence[int], attention: Sequence[int]) -> dict[str, int]:
    """Of a UNet2DConditionModel, whose `attention_head_dim` is the number of heads, one or one for each level."""
    if not isinstance(settings.values["attention_head_dim"], list | tuple):
        return {"num_heads": settings.whole("attention_head_dim")}
    heads = settings.wholes("attention_head_dim")
    used = [*attention, len(widths) - 1]
    if len(heads) != len(widths) or any(widths[level] % heads[level] for level in used):
        settings.refuse("attention_head_dim", f"expected {len(widths)} numbers that divide the widths {[*widths]}")
        return {"num_heads": 1}
    if len({heads[level] for level in used}) == 1:
        return {"num_heads": heads[-1]}
    if len({widths[level] // heads[level] for level in used}) > 1:
        settings.refuse("attention_head_dim", "expected heads of one width, or as many at every level")
    return {"num_head_channels": widths[-1] // heads[-1]}


def longest_period(channels: int, freq_shift: int) -> float:
    """Of our waves P^(-k / half) the P that makes them theirs, 10000^(-k / (half - freq_shift)); half=channels/2."""
    half = channels // 2
    return 10_000.0 ** (half / max(1, half - freq_shift)) if freq_shift else 10_000.0


def to_config(
    network: Mapping[str, Any],
    num_class_embeds: int | None = None,
    sample_size: int | Sequence[int] | None = None,
    where: str = "the network",
) -> tuple[str, dict[str, Any]]:
    """(class, config.json) of our UNet's node.

    Args:
        network: the node.
        num_class_embeds: rows of the class table, which then is a part of theirs; None: there is none.
        sample_size: side of the latents, or (height, width).
        where: what is exported, for messages.

    Raises:
        ConfigError: names every parameter that diffusers' class cannot express.
    """
    sizes, made = arguments(network), on_meta(network)
    assert isinstance(made, UNet)
    name = "UNet2DModel" if sizes["context_dim"] is None else "UNet2DConditionModel"
    problems: list[str] = []
    widths = [sizes["model_channels"] * factor for factor in sizes["channel_mult"]]
    if widths[0] != sizes["model_channels"]:
        problems.append(f"channel_mult={sizes['channel_mult']}: the first is 1 in diffusers")
    if sizes["resample_in_blocks"] and name == "UNet2DConditionModel":
        problems.append("resample_in_blocks=True: not with cross-attention in diffusers")
    period = sizes["longest_period"]
    if not any(longest_period(widths[0], shift) == period for shift in (0, 1)):
        problems.append(f"longest_period={period:g}: 10000 in diffusers")
    plain, attending = _BLOCKS[name]
    in_blocks = sizes["resample_in_blocks"] and len(widths) > 1

    def names(way: str) -> list[str]:
        other = _RESIZING[way] if in_blocks else plain.format(way)
        return [attending.format(way) if level in sizes["attention_levels"] else other for level in range(len(widths))]

    config = dict(DEFAULTS[name]) | {
        "sample_size": sample_size if sample_size is None or isinstance(sample_size, int) else [*sample_size],
        "in_channels": sizes["in_channels"] + sizes["spatial_channels"],
        "out_channels": sizes["in_channels"],
        "down_block_types": names("Down"),
        "up_block_types": names("Up")[::-1],
        "block_out_channels": widths,
        "layers_per_block": sizes["num_res_blocks"],
        "dropout": sizes["dropout"],
        "norm_eps": sizes["norm_eps"],
        "downsample_padding": 0 if sizes["pad_end"] else 1,
        "freq_shift": int(period != longest_period(widths[0], 0)),
        "norm_num_groups": one_number(problems, made),
        "resnet_time_scale_shift": "scale_shift" if sizes["scale_shift"] else "default",
        "num_class_embeds": num_class_embeds,
    }
    config |= _of_model(sizes, made, problems) if name == "UNet2DModel" else _of_condition_model(sizes, widths)
    raise_all(where, f"diffusers' {name} cannot express", problems, OTHERWISE)
    return name, config


def _of_model(sizes: Mapping[str, Any], made: nn.Module, problems: list[str]) -> dict[str, Any]:
    """The settings that only UNet2DModel has."""
    kind = "resnet" if sizes["resample_in_blocks"] and len(sizes["channel_mult"]) > 1 else "conv"
    norms = next(iter(groups(made).values())) if sizes["scale_shift"] else None
    config = {"downsample_type": kind, "upsample_type": kind, "attn_norm_num_groups": norms}
    return config | {"attention_head_dim": _one_width(made, problems)}


def _of_condition_model(sizes: Mapping[str, Any], widths: Sequence[int]) -> dict[str, Any]:
    """The settings that only UNet2DConditionModel has."""
    heads = [sizes["num_heads"] or max(1, width // sizes["num_head_channels"]) for width in widths]
    config = {"attention_head_dim": heads if len({*heads}) > 1 else heads[0]}
    return config | {
        "cross_attention_dim": sizes["context_dim"],
        "transformer_layers_per_block": sizes["transformer_depth"],
    }


def _one_width(made: nn.Module, problems: list[str]) -> int | None:
    """The width of every attention head; None: each attention has one head, as wide as it is."""
    heads = {(one.heads, one.norm.num_channels) for one in made.modules() if isinstance(one, SelfAttention)}
    if {number for number, _ in heads} == {1}:
        return None
    widths = {channels // number for number, channels in heads}
    if len(widths) > 1:
        problems.append(f"num_heads: one width for all in diffusers, ours are {sorted(widths)}: set num_head_channels")
    return widths.pop()
