"""EDM2's networks (NVlabs/edm2), XXS to XXL, of latents and of pixels, conditional and not.

The published files are pickles that carry source code, which is never run here. `scripts/edm2_to_safetensors.py` makes
of one, where their code is, a `.safetensors` with the tensors' own names and a JSON beside it with all else.

EDM2 gives Stable Diffusion's autoencoder pictures in [0, 1], not [-1, 1], and takes such from it. So a model of latents
becomes two runs: `--autoencoder` fitted to that range, and the model.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange

from ldm.diffusion.networks.edm2 import HEAD_CHANNELS
from ldm.errors import CheckpointError, ConfigError
from ldm.interop import statistics, unit_range
from ldm.interop.models import Denoiser, Family, Origin, Request, node, part_shapes, shapes
from ldm.interop.sources import Source, number
from ldm.interop.tables import SAME, Change, Dropped, Entry, each, to_ours

MARKS = ("unet.emb_fourier.freqs", "unet.emb_noise.weight", "unet.out_conv.weight", "unet.out_gain")
RAW_MEAN, RAW_STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)
"""Of Stable Diffusion's latents of pictures in [0, 1], as their encoder assumes."""
SIGMA_DATA = 0.5
"""The standard deviation that they scale latents to."""

_NETWORK = "diffusion.networks.edm2.MagnitudePreservingUNet"
_DROPPED = (Dropped("logvar_*", "the uncertainty learned for the training loss, of features that ours does not have"),)
_NAMES = {
    "frequencies": "emb_fourier.freqs",
    "phases": "emb_fourier.phases",
    "embed.weight": "emb_noise.weight",
    "embed_vector.weight": "emb_label.weight",
    "conv_out.weight": "out_conv.weight",
    "gain_out": "out_gain",
}
_IN_BLOCK = {
    "shortcut.weight": "conv_skip.weight",
    "conv_in.weight": "conv_res0.weight",
    "embedding.weight": "emb_linear.weight",
    "gain": "emb_gain",
    "conv_out.weight": "conv_res1.weight",
    "qkv.weight": "attn_qkv.weight",
    "out.weight": "attn_proj.weight",
}
# Settings that their tensors do not show, and what ours computes.
_FIXED = {"label_balance": 0.5, "concat_balance": 0.5, "res_balance": 0.3, "attn_balance": 0.3, "clip_act": 256}
_FIXED |= {"channels_per_head": HEAD_CHANNELS}
_SCALAR = each(lambda tensor: tensor.reshape(1), lambda tensor: tensor[0])


def convert(source: Source, request: Request) -> Sequence[Denoiser]:
    """The model of a file; of one of latents also the autoencoder that it takes them from, fitted to its range."""
    for key, must in _FIXED.items():
        if (found := source.config.get(key, must)) != must:
            raise ConfigError(f"{source.path}: {key} in its description: expected {must}, as published, found {found}")
    side, sizes = _architecture(source)
    classes, pixels = sizes["vector_channels"], sizes["in_channels"] == 3
    levels = (-0.8, 1.6) if pixels else (-0.4, 1.0)
    params: dict[str, Any] = {
        "network": node(_NETWORK, **sizes),
        "conditioner": node("diffusion.conditioners.base.Unconditional")
        if classes is None
        else node("diffusion.conditioners.classes.ClassOneHot", num_classes=classes),
        "objective": node(
            "diffusion.objectives.EDM",
            levels=node(
                "diffusion.noise_levels.LogNormal",
                mean=_number(source, "P_mean", levels[0]),
                std=_number(source, "P_std", levels[1], 0),
            ),
            sigma_data=_number(source, "sigma_data", SIGMA_DATA, 0),
        ),
        "label_dropout": 0.0,
    }
    wanted = part_shapes({"network": params["network"]})
    fitted = to_ours(table(sizes, side), source.tensors, wanted, f"{source.path} (EDM2)", _DROPPED)
    mean, std = _scale(source, request, sizes["in_channels"])
    if pixels and request.autoencoder is not None:
        raise ConfigError(f"{source.path}: denoises pixels, so it takes no autoencoder; leave out --autoencoder")
    first_stage = None if pixels else unit_range.fitted(request.autoencoder)
    origin = Origin("EDM2", dropped=fitted.dropped, notes=_notes(source, pixels, first_stage is not None))
    name, size = source.name, (side, side)
    return [Denoiser(name, params, fitted.weights, None, mean, std, size, origin, first_stage, pixels=pixels)]


def table(sizes: Mapping[str, Any], side: int) -> list[Entry]:
    """Of a MagnitudePreservingUNet of these parameters on latents of this side, which is part of their names."""
    blocks = _blocks(len(sizes["channel_mult"]), sizes["num_res_blocks"], side)
    names = _NAMES | {"conv_in.weight": f"enc.{side}x{side}_conv.weight"}
    entries = []
    for ours, shape in shapes(node(_NETWORK, **sizes)).items():
        part, name = ".".join(ours.split(".")[:2]), ".".join(ours.split(".")[2:])
        theirs = f"{blocks[part]}.{_IN_BLOCK[name]}" if part in blocks else names[ours]
        entries.append(Entry(f"network.{ours}", (f"unet.{theirs}",), _change(theirs, shape)))
    return entries


def _blocks(levels: int, count: int, side: int) -> dict[str, str]:
    """{our block: theirs}: down and up in the order in which they run."""
    places = [f"{side >> level}x{side >> level}" for level in range(levels)]
    down = [name for n, place in enumerate(places) for name in _level(f"enc.{place}", "down" if n else None, count)]
    up = [
        name
        for n, place in reversed([*enumerate(places)])
        for name in _level(f"dec.{place}", "up" if n < levels - 1 else None, count + 1)
    ]
    middle = [f"dec.{places[-1]}_in{n}" for n in range(2)]
    parts = {"down": down, "middle": middle, "up": up}
    return {f"{part}.{n}": name for part, names in parts.items() for n, name in enumerate(names)}


def _level(place: str, resize: str | None, count: int) -> list[str]:
    first = [] if resize is None else [f"{place}_{resize}"]
    return first + [f"{place}_block{n}" for n in range(count)]


def _change(name: str, shape: torch.Size) -> Change:
    if name.endswith("gain"):
        return _SCALAR
    return _heads(min(HEAD_CHANNELS, shape[1])) if name.endswith("attn_qkv.weight") else SAME


def _heads(channels: int) -> Change:
    """Rows (head, channel, 3) of queries, keys and values as (3, head, channel)."""
    return each(
        lambda rows: rearrange(rows, "(h d three) ... -> (three h d) ...", three=3, d=channels),
        lambda rows: rearrange(rows, "(three h d) ... -> (h d three) ...", three=3, d=channels),
    )


def _architecture(source: Source) -> tuple[int, dict[str, Any]]:
    """The side of the latents, and the network's parameters, read off the tensors."""
    tensors = source.tensors
    first = [found for name in tensors if (found := re.fullmatch(r"unet\.enc\.(\d+)x\1_conv\.weight", name))]
    if len(first) != 1 or tensors[first[0][0]].ndim != 4 or 0 in tensors[first[0][0]].shape:
        raise CheckpointError(f"{source.path} (EDM2): misses its first convolution, unet.enc.<side>x<side>_conv.weight")
    side, (width, channels, *_) = int(first[0][1]), tensors[first[0][0]].shape
    widths: list[int] = []
    while (name := f"{_place(side, len(widths))}_block0.conv_res0.weight") in tensors:
        widths.append(tensors[name].shape[0])
    blocks = 0
    while f"{_place(side, 0)}_block{blocks}.conv_res0.weight" in tensors:
        blocks += 1
    label = tensors.get("unet.emb_label.weight")
    return side, {
        "in_channels": channels - 1,
        "model_channels": width,
        "channel_mult": [one // width for one in widths],
        "num_res_blocks": blocks,
        "attention_levels": [
            level for level in range(len(widths)) if f"{_place(side, level)}_block0.attn_qkv.weight" in tensors
        ],
        "vector_channels": None if label is None else label.shape[-1],
        "dropout": _number(source, "dropout", 0.0),
    }


def _place(side: int, level: int) -> str:
    return f"unet.enc.{side >> level}x{side >> level}"


def _scale(source: Source, request: Request, channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation such that (latent - mean) / std is what the network was trained on."""
    if request.statistics is not None:
        return statistics.read(request.statistics, channels)
    scale, bias = source.config.get("encoder_scale"), source.config.get("encoder_bias")
    if scale is not None or bias is not None:  # theirs: latent * scale + bias
        try:
            std = [1 / one for one in scale or ()]
            mean = [-one * width for one, width in zip(bias or (), std, strict=True)]
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise ConfigError(
                f"{source.path}: its JSON's encoder_scale and encoder_bias: expected a number each for {channels} "
                f"channels, found {scale} and {bias}"
            ) from error
        statistics.check(mean, std, channels, f"{source.path}: encoder_scale and encoder_bias of its JSON")
        return mean, std
    if channels == 3:
        return [0.0] * 3, [1.0] * 3
    if channels == 4:
        return [*RAW_MEAN], [one / SIGMA_DATA for one in RAW_STD]
    raise ConfigError(
        f"{source.path}: takes latents of {channels} channels, not Stable Diffusion's 4, so their scale is not known. "
        f"Give their mean and standard deviation: --statistics FILE"
    )


def _number(source: Source, key: str, default: float, least: float = -math.inf) -> float:
    return number(source.config.get(key, default), f"{source.path}: {key} in its description", least)


def _notes(source: Source, pixels: bool, refitted: bool) -> list[str]:
    notes = ["It was trained without dropped classes: guide it by another network (--guide), such as a smaller EDM2."]
    if (std := source.config.get("ema_std")) is not None:
        notes.append(f"The weights are an average of relative width {std}; those of the last step are not in the file.")
    if refitted:
        notes.append(
            "Its autoencoder is a run of its own: the one that was given, fitted to pictures in [0, 1], which EDM2 "
            "trains on. Use that run with other EDM2 models of latents, too."
        )
    return notes


FAMILY = Family(name="EDM2", marks=(MARKS,), convert=convert, takes=("autoencoder", "statistics"))
