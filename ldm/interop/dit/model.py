"""Transformers of one line: DiT (facebookresearch/DiT), SiT (willisma/SiT), LightningDiT (hustvl/LightningDiT).

A file is the published flat dictionary, or a training checkpoint with `model`, `ema`, `opt` and what it was trained
with (`args` or `config`). DiT and SiT have the same names and shapes. So the family is taken from the rest of the file,
from `--config`, or from `--family`, and never guessed.

The networks differ from ours in nothing that is computed but for the output's second half, DiT's variance, which has
no place here; SiT and LightningDiT learn that half too if asked (`learn_sigma`), and use it for nothing.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.networks.dit import positions, rotations
from ldm.errors import CheckpointError, ConfigError
from ldm.interop.dit.kinds import KINDS, Kind, kind_of, said
from ldm.interop.dit.table import table
from ldm.interop.models import Denoiser, Family, Origin, Request, node, part_shapes
from ldm.interop.sources import Source
from ldm.interop.tables import Dropped, renamed, to_ours, to_theirs

MARKS = ("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "final_layer.adaLN_modulation.1.weight")
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28}
"""Attention heads of the published widths, S to 1.6B."""
_WRAPPERS = re.compile(r"(?:(?:module|_orig_mod)\.)+")  # of DistributedDataParallel and torch.compile
_VARIANCE = "the variance half of the output layer"
_POSITIONS_MAY_DRIFT = 5e-3  # an average of a constant, and float16
_DROPPED = (
    Dropped("pos_embed", "the table of positions, which is computed"),
    Dropped("feat_rope.*", "the tables of rotations, which are computed"),
)


def convert(source: Source, request: Request) -> Sequence[Denoiser]:
    """The model of a file, with its moving average where the file has one besides."""
    parts = _parts(source)
    first = next(iter(parts.values()))
    kind = kind_of(source, first, request)
    sizes, classes = _architecture(source, first)
    params = {
        "network": node("diffusion.networks.dit.DiT", **sizes),
        "conditioner": node(
            "diffusion.conditioners.classes.ClassVector", num_classes=classes, channels=sizes["hidden_size"], std=0.02
        ),
        "objective": kind.objective(source),
        "label_dropout": 0.1,
    }
    side = sizes["patch_size"] * _side(source, first)
    fitted = {name: _fit(source, kind, params, part) for name, part in parts.items()}
    weights, dropped = fitted.get("model.", next(iter(fitted.values())))
    average = fitted["ema."][0] if len(fitted) > 1 else None
    mean, std = kind.scale(source, request, sizes["in_channels"])
    return [
        Denoiser(
            source.name,
            params,
            weights,
            average,
            mean,
            std,
            (side, side),
            Origin(kind.name, dropped=dropped, notes=_notes(kind, dropped)),
        )
    ]


def theirs(params: Mapping[str, Any], weights: Mapping[str, Tensor], side: int, backward: bool) -> dict[str, Tensor]:
    """A denoiser under DiT's, SiT's or LightningDiT's own names, with the tables of positions that they keep.

    The half of the output that predicts a variance cannot be made, since no such thing was learned: their code takes
    these weights with `learn_sigma=False`.

    Args:
        params: of LatentDiffusion: nodes of a DiT with absolute positions and of a ClassVector.
        weights: `network...`, `conditioner...`.
        side: of the latents.
        backward: t = 1 is data, as in SiT and LightningDiT.
    """
    sizes = params["network"]["params"]
    grid, width = side // sizes["patch_size"], sizes["hidden_size"]
    made = to_theirs(table(sizes, backward), weights)
    made["pos_embed"] = positions(grid, grid, width, torch.device("cpu"))[None]
    if sizes["rope"]:
        angles = rotations(grid, grid, width // sizes["num_heads"], torch.device("cpu"))  # (2, L, head)
        paired = angles.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1)
        made["feat_rope.freqs_cos"], made["feat_rope.freqs_sin"] = paired.contiguous().unbind()
    return made


def _parts(source: Source) -> dict[str, dict[str, Tensor]]:
    """{"model.", "ema.": tensors} of a training checkpoint, {"": tensors} of a file with one set, without wrappers."""
    prefixes = [prefix for prefix in ("model.", "ema.") if any(name.startswith(prefix) for name in source.tensors)]
    parts = {prefix: source.part(prefix) for prefix in prefixes} or {"": {}}
    others = {name: one for name, one in source.tensors.items() if not name.startswith(("model.", "ema."))}
    parts[next(iter(parts))] |= others
    return {
        prefix: renamed(part, lambda name: _WRAPPERS.sub("", name), f"{source.path}{prefix and f', {prefix}'}")
        for prefix, part in parts.items()
    }


def _fit(
    source: Source, kind: Kind, params: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    sizes = params["network"]["params"]
    wanted = part_shapes({part: params[part] for part in ("network", "conditioner")})
    kept, halves = _without_variance(tensors, sizes)
    origin = f"{source.path} ({kind.name})"
    fitted = to_ours(table(sizes, kind.backward), kept, wanted, origin, _DROPPED)
    _check_positions(tensors["pos_embed"], _side(source, tensors), sizes["hidden_size"], origin)
    return fitted.weights, fitted.dropped | ({_VARIANCE: halves} if halves else {})


def _check_positions(found: Tensor, grid: int, width: int, origin: str) -> None:
    expected = positions(grid, grid, width, torch.device("cpu"))[None]
    drift = float((found.float() - expected).abs().max()) if found.shape == expected.shape else float("nan")
    if not drift <= _POSITIONS_MAY_DRIFT:
        raise CheckpointError(
            f"{origin}: pos_embed {[*found.shape]} is not the fixed table {[*expected.shape]} of sines that these "
            f"models have (largest difference {drift:.2g}): its positions were learned, or are another model's"
        )


def _without_variance(tensors: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> tuple[dict[str, Tensor], int]:
    """The output layer's rows (p, p, 2c) without the second c, and how many tensors that halved."""
    names = ("final_layer.linear.weight", "final_layer.linear.bias")
    patch, channels = sizes["patch_size"] ** 2, sizes["in_channels"]
    halved = {
        name: tensors[name].unflatten(0, (patch, 2 * channels))[:, :channels].flatten(0, 1)
        for name in names
        if name in tensors and tensors[name].shape[0] == patch * 2 * channels
    }
    return {**tensors, **halved}, len(halved)


def _architecture(source: Source, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], int]:
    """DiT's parameters and the number of classes, read off the tensors."""
    width, channels, patch, _ = _shape(source, tensors, MARKS[0], 4)
    swiglu = "blocks.0.mlp.w12.weight" in tensors
    classes = _shape(source, tensors, "y_embedder.embedding_table.weight", 2)[0] - 1  # the last row: no class
    asked = said(source, "num_classes")
    if asked not in (None, classes):
        raise CheckpointError(
            f"{source.path}: its class table has {classes + 1} rows, and it was trained with {asked} classes; expected "
            f"one row more, for no class"
        )
    rows = _shape(source, tensors, f"blocks.0.mlp.{'w12' if swiglu else 'fc1'}.weight", 2)[0]
    sizes = {
        "in_channels": channels,
        "patch_size": patch,
        "hidden_size": width,
        "depth": len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        "num_heads": _heads(source, tensors, width),
        "mlp_ratio": _mlp_ratio(rows // 2, width * 2 / 3) if swiglu else _mlp_ratio(rows, width),
        "rms_norm": "blocks.0.norm1.weight" in tensors,
        "swiglu": swiglu,
        "rope": "feat_rope.freqs_cos" in tensors,
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
        "absolute_positions": True,
    }
    return sizes, classes


def _heads(source: Source, tensors: Mapping[str, Tensor], width: int) -> int:
    """From the width of a head, where a tensor has it; else as said; else as published for this width."""
    for name, dims in (("feat_rope.freqs_cos", 2), ("blocks.0.attn.q_norm.weight", 1)):
        if name in tensors:
            return width // _shape(source, tensors, name, dims)[-1]
    asked = HEADS.get(width) if said(source, "num_heads") is None else said(source, "num_heads")
    if asked is None:
        raise ConfigError(
            f"{source.path}: is {width} wide, which is no published width ({', '.join(map(str, HEADS))}), and the "
            f"number of attention heads is not in the file. Say it in a YAML, `num_heads: N`, with --config FILE"
        )
    if type(asked) is not int or asked < 1 or width % asked:
        raise ConfigError(f"{source.path}: num_heads: expected a divisor of the width {width}, found {asked!r}")
    return asked


def _mlp_ratio(inner: int, width: float) -> float:
    """Of the feed-forward networks: 4, as published, or what gives as many channels inside."""
    return 4.0 if int(4.0 * width) == inner else (inner + 0.5) / width  # half a channel more: it is rounded down


def _side(source: Source, tensors: Mapping[str, Tensor]) -> int:
    """Tokens along a side of the square of latents."""
    tokens = _shape(source, tensors, "pos_embed", 3)[1]
    if (side := round(tokens**0.5)) ** 2 != tokens:
        raise CheckpointError(f"{source.path}: pos_embed has {tokens} positions; expected a square of them")
    return side


def _shape(source: Source, tensors: Mapping[str, Tensor], name: str, dims: int) -> torch.Size:
    """Of a tensor that the architecture is read off; CheckpointError if it is not there, or has other dimensions."""
    if name not in tensors:
        raise CheckpointError(f"{source.path} ({FAMILY.name}): misses {name}")
    shape = tensors[name].shape
    if len(shape) != dims or 0 in shape:
        raise CheckpointError(f"{source.path} ({FAMILY.name}): {name}: expected {dims} dimensions, found {[*shape]}")
    return shape


def _notes(kind: Kind, dropped: Mapping[str, int]) -> list[str]:
    notes = ["No class is the last row of the class table, for classifier-free guidance."]
    if _VARIANCE in dropped:
        notes.append(
            "The outputs for a variance were left out: sampling uses the posterior's variance, and the file cannot "
            "be made again with them."
        )
    if kind.backward:
        notes.append(
            "Time runs the other way here (0 is data): the output is negated and the first timestep layer folded, "
            "exact to rounding in float32."
        )
    return notes


FAMILY = Family(
    name="DiT, SiT or LightningDiT",
    marks=[
        [f"{part}{wrapper}{mark}" for mark in MARKS] for part in ("", "ema.", "model.") for wrapper in ("", "module.")
    ],
    convert=convert,
    takes=("autoencoder", "statistics"),
    kinds=tuple(KINDS),
)
