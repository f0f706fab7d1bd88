"""First stages of CompVis' latent-diffusion and taming-transformers, and all that kept their names: KL and VQ.

Stable Diffusion's autoencoder, VA-VAE and FLUX.1's are of this family. The names are those of the encoder's and the
decoder's modules in CompVis/latent-diffusion, ldm/modules/diffusionmodules/model.py; inside a latent diffusion model
they begin with `first_stage_model.`. The architecture is read off the tensors; a YAML beside the file adds what they do
not say: the resolution, and how it was trained.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.errors import CheckpointError, ConfigError
from ldm.interop import statistics
from ldm.interop.compvis import first_stage_training
from ldm.interop.compvis.first_stage_table import table
from ldm.interop.models import Family, FirstStage, Origin, Request, node, part_shapes
from ldm.interop.sources import Source
from ldm.interop.tables import Dropped, Entry, renamed, to_ours
from ldm.layers import group_norm

NAME = "CompVis first stage"
MARKS = (
    *(f"encoder.{name}.weight" for name in ("conv_in", "down.0.block.0.norm1", "mid.block_1.norm1", "conv_out")),
    *(f"decoder.{name}.weight" for name in ("conv_in", "up.0.block.0.norm1", "mid.block_1.norm1", "conv_out")),
)
PREFIXES = ("", "first_stage_model.", "model.")
"""Of the names: none in a file of its own; inside a latent diffusion model; MAR's."""
DROPPED = (
    Dropped("loss.perceptual_loss.*", "LPIPS, which is read from its own file"),
    Dropped("loss.*", "the training loss, of another kind than ours"),
    Dropped("foundation_model.*", "the vision model that VA-VAE was aligned with"),
    Dropped("linear_proj.*", "the projection to the features of that model"),
    Dropped("colorize", "the colors in which label maps were shown"),
    Dropped("model_ema.decay", "the count of a moving average"),
    Dropped("model_ema.num_updates", "the count of a moving average"),
)
FLUX = {"mean": 0.1159, "std": 1 / 0.3611}
"""Shift and scale of FLUX.1's latents (black-forest-labs/flux, src/flux/util.py)."""
_GROUPS = 32
"""Of every norm in their code."""


def convert(source: Source, request: Request) -> Sequence[FirstStage]:
    """The first stage of a file that holds it alone."""
    prefix = next(one for one in PREFIXES if f"{one}{MARKS[0]}" in source.tensors)
    tensors = renamed(source.tensors, lambda name: name.removeprefix(prefix), str(source.path))
    return [first_stage(tensors, source, request)]


def first_stage(tensors: Mapping[str, Tensor], source: Source, request: Request) -> FirstStage:
    """The first stage of these tensors, whose names begin with `encoder.`, `decoder.`, ...

    Raises:
        CheckpointError: the tensors do not fit, or are of a model that has no counterpart here.
        ConfigError: the description beside them is another model's.
    """
    where = f"{source.path} ({NAME})"
    params = architecture(tensors, where)
    resolution = request.resolution or _resolution(params, source)
    discriminator = _discriminator(tensors, params)
    made = params | ({} if discriminator is None else {"loss.discriminator": discriminator})
    expected = part_shapes(made)
    entries = table(params, quant_convs="quant_conv.weight" in tensors)
    entries += [_in_loss(name) for name in expected if name.startswith("loss.")]
    if "loss.logvar" in tensors:
        entries.append(Entry("loss.logvar", ("loss.logvar",)))
        expected["loss.logvar"] = torch.Size()
    fitted = to_ours(entries, tensors, expected, where, DROPPED)
    weights = {"loss.logvar": torch.zeros(())} | fitted.weights
    trained, notes = first_stage_training.training(
        _described(source, "lossconfig"),
        params["encoder"]["params"],
        resolution,
        discriminator,
        float(weights["loss.logvar"]) if not weights["loss.logvar"].is_meta else 0.0,
        source.described("model", "base_learning_rate") if _alone(source) else None,
        source.rest.get("global_step", 0),
    )
    scale, said = _statistics(params, source, request)
    origin = Origin(NAME, dropped=fitted.dropped, notes=(*notes, *said))
    return FirstStage(source.name, params | trained, weights, resolution, origin, scale)


def architecture(tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """The nodes of encoder, decoder and quantizer, read off the tensors' shapes.

    Raises:
        CheckpointError: what tells it is missing, or it is of a kind that has no counterpart here.
    """
    if missing := [
        name for name in MARKS if name not in tensors or tensors[name].ndim < 1 or not tensors[name].numel()
    ]:
        raise CheckpointError(f"{where}: missing or empty: {', '.join(missing)}. Is the file whole?")
    base = len(tensors["encoder.conv_in.weight"])
    latent = _inputs(tensors["decoder.conv_in.weight"])
    codebook = tensors.get("quantize.embedding.weight")
    outputs = len(tensors["encoder.conv_out.weight"])
    if codebook is None and outputs != 2 * latent:
        raise CheckpointError(
            f"{where}: its encoder ends in {outputs} channels for {latent} of the latent, so a codebook should follow, "
            f"and quantize.embedding.weight is missing. Other quantizers (such as taming's Gumbel) are not known here."
        )
    encoder, decoder = (_sizes(tensors, part, base, latent) for part in ("encoder.down", "decoder.up"))
    decoder["num_res_blocks"] -= 1  # the file has one block more in each level of the decoder than the parameter says
    images = _inputs(tensors["encoder.conv_in.weight"]), len(tensors["decoder.conv_out.weight"])
    moments = codebook is None
    params = {
        "encoder": node("autoencoder.networks.Encoder", in_channels=images[0], **encoder, moments=moments),
        "decoder": node("autoencoder.networks.Decoder", out_channels=images[1], **decoder),
    }
    if codebook is not None:
        size, commitment = len(codebook), first_stage_training.COMMITMENT
        book = node("autoencoder.quantizer.VectorQuantizer", size=size, channels=latent, commitment=commitment)
        params["quantizer"] = book
    return params


def _sizes(tensors: Mapping[str, Tensor], part: str, base: int, latent: int) -> dict[str, Any]:
    """Of the levels `encoder.down` or `decoder.up`."""
    levels = range(_count(tensors, f"{part}.{{}}.block.0.conv1.weight"))
    middle = f"{part.partition('.')[0]}.mid.attn_1.norm.weight"
    mult = [max(1, len(tensors[f"{part}.{level}.block.0.conv1.weight"]) // base) for level in levels]
    sizes = {
        "base_channels": base,
        "channel_mult": mult,
        "num_res_blocks": max(1, _count(tensors, f"{part}.0.block.{{}}.conv1.weight")),
        "attention_levels": [level for level in levels if f"{part}.{level}.attn.0.norm.weight" in tensors],
        "latent_channels": latent,
        "middle_attention": middle in tensors,
    }
    widths = [base, *(base * factor for factor in mult)]
    fewer = any(group_norm(width).num_groups != _GROUPS for width in widths)
    # Ours has fewer groups in narrow networks.
    return sizes | ({"norm_groups": _GROUPS} if fewer and not any(width % _GROUPS for width in widths) else {})


def _in_loss(ours: str) -> Entry:
    """Of the discriminator, whose layers have the same numbers."""
    return Entry(ours, (ours.replace(".layers.", ".main.", 1),))


def _discriminator(tensors: Mapping[str, Tensor], params: Mapping[str, Any]) -> dict[str, Any] | None:
    """The node of the one in the file; None: there is none, or one that ours is not (ActNorm, conditional)."""
    first = tensors.get("loss.discriminator.main.0.weight")
    images = params["encoder"]["params"]["in_channels"]
    if first is None or first.ndim != 4 or first.shape[1] != images or not first.numel():
        return None
    layers = _count(tensors, "loss.discriminator.main.{}.running_mean", start=3, step=3)
    if not layers:
        return None
    sizes = {"in_channels": images, "channels": len(first), "layers": layers}
    return node("autoencoder.discriminator.PatchDiscriminator", **sizes)


def _alone(source: Source) -> bool:
    """Whether the description is that of a first stage, and not of a model with one."""
    return source.described("model", "params", "first_stage_config") is None


def _described(source: Source, name: str) -> Mapping[str, Any]:
    """`ddconfig` or `params` of `lossconfig`, as the description says; {}: it says nothing."""
    model = ("model",) if _alone(source) else ("model", "params", "first_stage_config")
    found = source.described(*model, "params", name, *(("params",) if name == "lossconfig" else ()))
    return found if isinstance(found, Mapping) else {}


def _resolution(params: Mapping[str, Any], source: Source) -> int:
    """Of the images, as the description says; 256: it says nothing. All else that it says must be so."""
    described = _described(source, "ddconfig")
    encoder = params["encoder"]["params"]
    own = {
        "ch": encoder["base_channels"],
        "ch_mult": encoder["channel_mult"],
        "num_res_blocks": encoder["num_res_blocks"],
        "z_channels": encoder["latent_channels"],
        "in_channels": encoder["in_channels"],
        "tanh_out": False,
    }
    wrong = [
        f"{key} {described[key]} ({value} here)" for key, value in own.items() if described.get(key, value) != value
    ]
    if wrong:
        raise ConfigError(
            f"{source.path}: the YAML of another model: its ddconfig says {', '.join(wrong)}. Name the right one: "
            f"--config FILE"
        )
    resolution = described.get("resolution", 256)
    if not isinstance(resolution, int) or resolution < 1:
        raise ConfigError(f"{source.path}: ddconfig.resolution: expected pixels, found {resolution!r}")
    return resolution


def _statistics(
    params: Mapping[str, Any], source: Source, request: Request
) -> tuple[dict[str, list[float]] | None, list[str]]:
    """Those that are asked for, or the scale factor of a description, or FLUX.1's; and what to say of them."""
    channels = params["encoder"]["params"]["latent_channels"]
    if request.statistics is not None:
        mean, std = statistics.read(request.statistics, channels)
        return {"mean": mean, "std": std}, []
    if "quantizer" in params:
        return {"mean": [0.0] * channels, "std": [1.0] * channels}, []
    factor = first_stage_training.number(source.described("model", "params", "scale_factor"), 0)
    if factor > 0 and not source.described("model", "params", "scale_by_std"):
        return {"mean": [0.0] * channels, "std": [1 / factor] * channels}, []
    if channels == 16 and MARKS[0] in source.tensors and "quant_conv.weight" not in source.tensors:
        return {name: [value] * channels for name, value in FLUX.items()}, [
            "Its latents' shift and scale are taken to be FLUX.1's; --statistics FILE says those of another, such as "
            "Stable Diffusion 3's.",
            "It has no convolutions around the latent: ours are identities, and once they are trained, it cannot go "
            "out in its own names any more.",
        ]
    known = " (Stable Diffusion 1 and 2: mean 0, std 1 / 0.18215; XL: 1 / 0.13025)" if channels == 4 else ""
    return None, [f"Nothing says how models on it scale its latents: --statistics FILE does{known}."]


def _inputs(weight: Tensor) -> int:
    return weight.shape[1] if weight.ndim > 1 else 1


def _count(tensors: Mapping[str, Tensor], pattern: str, start: int = 0, step: int = 1) -> int:
    """How many names fit the pattern, with numbers from `start` on in its braces."""
    number = 0
    while pattern.format(start + step * number) in tensors:
        number += 1
    return number


FAMILY = Family(
    name=NAME,
    marks=[[f"{prefix}{mark}" for mark in MARKS] for prefix in PREFIXES],
    convert=convert,
    takes=("resolution", "statistics"),
)
