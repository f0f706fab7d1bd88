"""AutoencoderKL and VQModel of diffusers, and our Encoder, Decoder and VectorQuantizer: both ways."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.autoencoder.networks import Decoder, Encoder
from ldm.autoencoder.quantizer import VectorQuantizer
from ldm.errors import ConfigError
from ldm.interop.compvis import first_stage_training
from ldm.interop.diffusers_models.autoencoder_table import present_names, table_of
from ldm.interop.diffusers_models.config import OTHERWISE, Exported, Settings, apart, arguments, one_number, raise_all
from ldm.interop.models import Family, FirstStage, Origin, Request, node, on_meta, part_shapes
from ldm.interop.sources import Source
from ldm.interop.tables import to_ours, to_theirs

_COMMON = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "sample_size": 32,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "mid_block_add_attention": True,
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "AutoencoderKL": _COMMON
    | {
        "latent_channels": 4,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "force_upcast": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    },
    "VQModel": _COMMON
    | {
        "latent_channels": 3,
        "num_vq_embeddings": 256,
        "vq_embed_dim": None,
        "norm_type": "group",
        "lookup_from_codebook": False,
        "force_upcast": False,
    },
}
"""Every setting of the two classes, with its default."""

_DOWN = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
_UP = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")


def from_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The nodes of encoder, decoder and, of a VQModel, quantizer.

    Args:
        config: config.json; its `_class_name` is one of DEFAULTS.
        where: the file, for messages.

    Raises:
        ConfigError: names every setting that our networks cannot express.
    """
    name = config["_class_name"]
    settings = Settings(config, DEFAULTS[name], where)
    settings.only({"act_fn": ("silu", "swish"), "mid_block_add_attention": (True, False)})
    if name == "VQModel":
        settings.only({"norm_type": ("group",), "vq_embed_dim": (None, settings.values["latent_channels"])})
    _check_scale(settings)
    base, channel_mult = settings.widths()
    sizes = {
        "base_channels": base,
        "channel_mult": channel_mult,
        "latent_channels": settings.whole("latent_channels"),
        "middle_attention": settings.values["mid_block_add_attention"],
    }
    blocks, levels = settings.whole("layers_per_block"), len(channel_mult)
    encoder = node(
        "autoencoder.networks.Encoder",
        in_channels=settings.whole("in_channels"),
        num_res_blocks=blocks,
        attention_levels=settings.levels("down_block_types", *_DOWN, levels),
        moments=name == "AutoencoderKL",
        **sizes,
    )
    decoder = node(
        "autoencoder.networks.Decoder",
        out_channels=settings.whole("out_channels"),
        num_res_blocks=blocks,
        # Theirs are in the order of use, ours counted from the image.
        attention_levels=sorted(levels - 1 - place for place in settings.levels("up_block_types", *_UP, levels)),
        **sizes,
    )
    nodes = {"encoder": encoder, "decoder": decoder}
    if name == "VQModel":
        size = settings.whole("num_vq_embeddings")
        nodes["quantizer"] = node(
            "autoencoder.quantizer.VectorQuantizer",
            size=size,
            channels=sizes["latent_channels"],
            commitment=first_stage_training.COMMITMENT,
        )
    settings.check()
    for part in (encoder, decoder):
        part["params"] |= settings.norm_groups(part)
    settings.check()
    return nodes


def to_config(
    params: Mapping[str, Any],
    resolution: int = 32,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    where: str = "the autoencoder",
) -> tuple[str, dict[str, Any]]:
    """(class, config.json) of our nodes.

    Args:
        params: nodes of encoder, decoder and, if there is one, quantizer.
        resolution: of the images, pixels.
        mean, std: of the latents per channel; None: they are used as they are.
        where: what is exported, for messages.

    Raises:
        ConfigError: names every parameter that diffusers' class cannot express.
    """
    problems = []
    for part, made in (("encoder", Encoder), ("decoder", Decoder), ("quantizer", VectorQuantizer)):
        target = f"{made.__module__}.{made.__name__}"
        if params.get(part) and params[part]["target"] != target:
            problems.append(f"{part}={params[part]['target']}: expected {target}")
    raise_all(where, "diffusers has no class for", problems, OTHERWISE)
    encoder, decoder = (arguments(params[part]) for part in ("encoder", "decoder"))
    for key in ("base_channels", "channel_mult", "num_res_blocks", "latent_channels", "middle_attention"):
        if encoder[key] != decoder[key]:
            problems.append(
                f"{key}: the encoder's {encoder[key]} and the decoder's {decoder[key]} are one in diffusers"
            )
    problems += [
        f"{part}.patch_size={sizes['patch_size']}: diffusers has no patches"
        for part, sizes in (("encoder", encoder), ("decoder", decoder))
        if sizes["patch_size"] != 1
    ]
    if encoder["unit_range"]:
        problems.append("encoder.unit_range=True: False in diffusers")
    widths = [encoder["base_channels"] * factor for factor in encoder["channel_mult"]]
    if widths[0] != encoder["base_channels"]:
        problems.append(f"channel_mult={encoder['channel_mult']}: the first is 1 in diffusers")
    quantizer = arguments(params["quantizer"]) if params.get("quantizer") else None
    name = "AutoencoderKL" if quantizer is None else "VQModel"
    if encoder["moments"] == (name == "VQModel"):
        problems.append(f"encoder.moments={encoder['moments']}: expected moments just where there is no quantizer")
    levels = range(len(widths))
    config = dict(DEFAULTS[name]) | {
        "in_channels": encoder["in_channels"],
        "out_channels": decoder["out_channels"],
        "down_block_types": [_DOWN[level in encoder["attention_levels"]] for level in levels],
        "up_block_types": [_UP[level in decoder["attention_levels"]] for level in reversed(levels)],
        "block_out_channels": widths,
        "layers_per_block": encoder["num_res_blocks"],
        "latent_channels": encoder["latent_channels"],
        "norm_num_groups": one_number(problems, on_meta(params["encoder"]), on_meta(params["decoder"])),
        "sample_size": resolution,
        "mid_block_add_attention": encoder["middle_attention"],
    }
    if quantizer is not None:
        config |= {"num_vq_embeddings": quantizer["size"]}
    channels = encoder["latent_channels"]
    config |= _scale_settings([0.0] * channels if mean is None else mean, [1.0] * channels if std is None else std)
    if unknown := config.keys() - DEFAULTS[name].keys():
        problems.append(
            f"the scale of the latents: {name} has no {', '.join(sorted(unknown))}; give one std, and mean 0"
        )
    raise_all(where, f"diffusers' {name} cannot express", problems, OTHERWISE)
    return name, config


def scale(config: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the latents per channel, as the models of this autoencoder's latents have them."""
    settings = dict(DEFAULTS[config["_class_name"]]) | dict(config)
    channels, factor = settings["latent_channels"], settings["scaling_factor"]
    mean = settings.get("latents_mean") or [settings.get("shift_factor") or 0.0] * channels
    std = settings.get("latents_std") or [1.0] * channels
    return [float(one) for one in mean], [float(one) / factor for one in std]


def _check_scale(settings: Settings) -> None:
    """The settings that `scale` reads are numbers, one for each channel where they are lists."""
    settings.number("scaling_factor", 1e-6, 1e6)
    for key in ("latents_mean", "latents_std", "shift_factor"):
        value: Any = settings.values.get(key)
        given: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
        count = 1 if key == "shift_factor" else settings.values["latent_channels"]
        least = 1e-6 if key == "latents_std" else -1e6
        fits = len(given) == count and all(type(one) in (int, float) and least <= one <= 1e6 for one in given)
        if value is not None and not fits:
            settings.refuse(key, f"expected {count} finite numbers" + (" above 0" if key == "latents_std" else ""))


def _scale_settings(mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """The inverse of `scale`."""
    if len({*mean}) > 1 or len({*std}) > 1:
        return {"scaling_factor": 1.0, "latents_mean": [*mean], "latents_std": [*std]}
    factor = float(f"{1 / std[0]:.12g}")  # 0.18215, not 0.18215000000000003
    factor = factor if 1 / factor == std[0] else 1 / std[0]
    return {"scaling_factor": factor} | ({"shift_factor": mean[0]} if mean[0] else {})


def exported(
    params: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    resolution: int = 32,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    where: str = "the autoencoder",
) -> Exported:
    """An autoencoder of ours as a model of diffusers; see `to_config`.

    Args:
        weights: `encoder...`, `decoder...`, `quantizer...`; others (the loss's) are left out.
    """
    name, config = to_config(params, resolution, mean, std, where)
    table = table_of(params)
    own = {entry.ours for entry in table}
    return Exported(name, config, apart(to_theirs(table, {key: one for key, one in weights.items() if key in own})))


def convert(source: Source, request: Request) -> Sequence[FirstStage]:
    """The autoencoder of a folder."""
    return [first_stage(source.tensors, source.config, source, request)]


def first_stage(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], source: Source, request: Request, part: str = ""
) -> FirstStage:
    """The autoencoder of these tensors and this config.json.

    Args:
        part: its folder in a pipeline; "": it is the source's only model.
    """
    where = str(source.path / part / "config.json")
    params = from_config(config, where)
    expected = part_shapes(params)
    present = [config.get(f"use_{name}", True) for name in ("quant_conv", "post_quant_conv")]
    origin = f"{source.path / part} (diffusers' {config['_class_name']})"
    fitted = to_ours(table_of(params, *present), present_names(tensors), expected, origin)
    size = request.resolution or _resolution(config, where)
    trained, notes = first_stage_training.training({}, params["encoder"]["params"], size, None, 0.0)
    mean, std = scale(config)
    return FirstStage(
        name=source.name,
        params=params | trained,
        weights=fitted.weights | {"loss.logvar": torch.zeros(())},
        resolution=size,
        origin=Origin(FAMILY.name, dropped=fitted.dropped, notes=notes),
        statistics={"mean": mean, "std": std},
    )


def _resolution(config: Mapping[str, Any], where: str) -> int:
    size = config.get("sample_size", DEFAULTS[config["_class_name"]]["sample_size"])
    side = max(size) if isinstance(size, list) and size else size
    if type(side) is int and side > 0:
        return side
    raise ConfigError(f"{where}: sample_size={size!r}: expected the side of the images; say it: --resolution PIXELS")


FAMILY = Family(
    name="diffusers first stage",
    marks=(("class AutoencoderKL",), ("class VQModel",)),
    convert=convert,
    takes=("resolution",),
)
