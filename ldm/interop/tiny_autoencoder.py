"""TAESD and its kin (taesdxl, taesd3, taef1): the author's two files, or a folder of diffusers' AutoencoderTiny.

Their names are places in a sequence, `1.conv.0.weight`. The author's decoder begins with a tanh, which has no weights,
and diffusers' does not count it.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ldm.errors import CheckpointError
from ldm.interop.compvis.first_stage_training import perceptual
from ldm.interop.models import Family, FirstStage, Origin, Request, node, part_shapes
from ldm.interop.sources import Source, number
from ldm.interop.tables import Entry, layer, to_ours, under

NAME = "TAESD"
_CLASS = "AutoencoderTiny"
_PAIR = ("encoder.0.weight", "encoder.1.conv.0.weight", "decoder.1.weight", "decoder.3.conv.0.weight")
_LONE_ENCODER = ("0.weight", "1.conv.0.weight", "2.weight")
_LONE_DECODER = ("1.weight", "3.conv.0.weight")


def convert(source: Source, request: Request) -> Sequence[FirstStage]:
    """The autoencoder of both files.

    Raises:
        CheckpointError: one of them is missing, or the tensors do not fit.
    """
    where, diffusers = f"{source.path} ({NAME})", source.config.get("_class_name") == _CLASS
    if not (diffusers or {*_PAIR} <= source.tensors.keys()):
        raise CheckpointError(
            f"{where}: one half of an autoencoder. Expected both files in one folder, with names that end in _encoder "
            f"and _decoder, such as taesd_encoder.pth and taesd_decoder.pth"
        )
    if diffusers and source.config.get("act_fn", "relu") != "relu":
        raise CheckpointError(f"{where}: config.json: act_fn: expected relu, found {source.config['act_fn']}")
    params = architecture(source.tensors, where, diffusers)
    expected = part_shapes(params)
    fitted = to_ours(table(params, diffusers), source.tensors, expected, where)
    terms, notes = perceptual(params["encoder"]["params"]["in_channels"], 1.0)
    # Nothing is drawn, so there is nothing to regularize.
    loss = node("autoencoder.losses.AutoencoderLoss", kl_weight=0.0, learn_logvar=False, **terms)
    channels = params["encoder"]["params"]["latent_channels"]
    shift = number(source.config.get("shift_factor") or 0.0, f"{where}: shift_factor")
    factor = number(source.config.get("scaling_factor", 1.0), f"{where}: scaling_factor", 0)
    notes = [
        "Its latents are scaled already, as models of the large autoencoder see them.",
        "Its training, by the large autoencoder, has no counterpart here: it goes on as any other autoencoder.",
        *notes,
    ]
    return [
        FirstStage(
            name=source.name.removesuffix("_encoder").removesuffix("_decoder"),
            params=params | {"loss": loss},
            weights=fitted.weights | {"loss.logvar": torch.zeros(())},
            resolution=request.resolution or 256,
            origin=Origin(NAME, notes=notes),
            statistics={"mean": [shift] * channels, "std": [1 / factor] * channels},
        )
    ]


def architecture(tensors: Mapping[str, Tensor], where: str, diffusers: bool = False) -> dict[str, Any]:
    """The nodes of encoder and decoder, read off the tensors' names and shapes."""
    encoder, decoder = (_Half(tensors, prefix, where) for prefix in _prefixes(diffusers))
    down = {"in_channels": encoder.first[1], "latent_channels": encoder.last[0], "channels": encoder.first[0]}
    up = {"out_channels": decoder.last[0], "latent_channels": decoder.first[1], "channels": decoder.first[0]}
    return {
        "encoder": node("autoencoder.tiny.TinyEncoder", **down, num_blocks=encoder.num_blocks),
        "decoder": node("autoencoder.tiny.TinyDecoder", **up, num_blocks=decoder.num_blocks),
    }


class _Half:
    """What the tensors of one half tell: (out, in) channels of its first and last layers, and blocks of each level."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, where: str) -> None:
        found = [re.fullmatch(rf"{re.escape(prefix)}(\d+)\.(conv\.\d+\.)?(weight|bias)", name) for name in tensors]
        is_block = {int(one[1]): one[2] is not None for one in found if one}
        places = sorted(is_block)
        self.num_blocks = [len([*run]) for block, run in groupby(places, is_block.__getitem__) if block]
        ends = [tensors.get(f"{prefix}{place}.weight") for place in (places[:1] + places[-1:])]
        if not self.num_blocks or any(one is None or one.ndim != 4 or not one.numel() for one in ends):
            raise CheckpointError(f"{where}: no blocks between two convolutions under {prefix}; is the file whole?")
        self.first, self.last = (tuple(one.shape[:2]) for one in ends if one is not None)


def table(params: Mapping[str, Any], diffusers: bool = False) -> list[Entry]:
    """Of encoder and decoder.

    Args:
        diffusers: in the names of AutoencoderTiny.
    """
    entries = []
    for part, prefix in zip(("encoder", "decoder"), _prefixes(diffusers), strict=True):
        start = 1 if part == "decoder" and not diffusers else 0
        entries += under(_half(params[part]["params"]["num_blocks"], start, part == "decoder"), f"{part}.", prefix)
    return entries


def _prefixes(diffusers: bool) -> tuple[str, str]:
    return ("encoder.layers.", "decoder.layers.") if diffusers else ("encoder.", "decoder.")


def _half(num_blocks: Sequence[int], place: int, decoder: bool) -> list[Entry]:
    """Of encoder or decoder, whose first convolution is at `place`."""
    entries = layer("conv_in", f"{place}")
    place += 2 if decoder else 1  # a ReLU follows the decoder's
    for level, count in enumerate(num_blocks):
        inside = 0
        if level and not decoder:
            entries += layer(f"levels.{level}.0", f"{place}", bias=None)
            place, inside = place + 1, 1
        for _ in range(count):
            for conv in range(3):
                entries += layer(f"levels.{level}.{inside}.conv{conv + 1}", f"{place}.conv.{2 * conv}")
            place, inside = place + 1, inside + 1
        if decoder and level < len(num_blocks) - 1:
            entries += layer(f"levels.{level}.{inside + 1}", f"{place + 1}", bias=None)  # after the upsampling
            place += 2
    return [*entries, *layer("conv_out", f"{place}")]


FAMILY = Family(
    name=NAME, marks=(_PAIR, (f"class {_CLASS}",), _LONE_ENCODER, _LONE_DECODER), convert=convert, takes=("resolution",)
)
