"""First stages of CompVis' latent-diffusion and taming-transformers, and all that kept their names: KL and VQ.

Stable Diffusion's autoencoder, VA-VAE and FLUX.1's are of this family. The names are those of the encoder's and the
decoder's modules in CompVis/latent-diffusion, ldm/modules/diffusionmodules/model.py; inside a latent diffusion model
they begin with `first_stage_model.`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.interop.models import Family, FirstStage, Origin, Request, node, shapes
from ldm.interop.sources import Source
from ldm.interop.tables import Dropped, Entry, layer, to_ours, under

MARKS = ("encoder.down.0.block.0.norm1.weight", "encoder.mid.block_1.norm1.weight", "decoder.up.0.block.0.norm1.weight")
IN_MODEL = "first_stage_model."
DROPPED = (
    Dropped("loss.perceptual_loss.*", "LPIPS, which is read from its own file"),
    Dropped("loss.*", "the training loss"),
)


def convert(source: Source, request: Request) -> Sequence[FirstStage]:
    """The first stage of a file that holds it alone."""
    return [first_stage(source.tensors, source, request)]


def first_stage(tensors: Mapping[str, Tensor], source: Source, request: Request) -> FirstStage:
    """The first stage of these tensors, whose names begin with `encoder.`, `decoder.`, ..."""
    params = architecture(tensors)
    fitted = to_ours(table(params), tensors, _shapes(params), f"{source.path} (CompVis first stage)", DROPPED)
    origin = Origin("CompVis first stage", dropped=fitted.dropped)
    loss = {"loss": node("autoencoder.losses.AutoencoderLoss", kl_weight=1e-6, learn_logvar=False)}
    weights = fitted.weights | {"loss.logvar": torch.zeros(())}
    return FirstStage(source.path.stem, params | loss, weights, request.resolution or 256, origin)


def architecture(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The nodes of encoder, decoder and quantizer, read off the tensors' shapes."""
    base = tensors["encoder.conv_in.weight"].shape[0]
    levels = _count(tensors, "encoder.down.{}.block.0.conv1.weight")
    sizes = {
        "base_channels": base,
        "channel_mult": [tensors[f"encoder.down.{n}.block.0.conv1.weight"].shape[0] // base for n in range(levels)],
        "num_res_blocks": _count(tensors, "encoder.down.0.block.{}.conv1.weight"),
        "attention_levels": [n for n in range(levels) if f"encoder.down.{n}.attn.0.norm.weight" in tensors],
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "middle_attention": "encoder.mid.attn_1.norm.weight" in tensors,
    }
    codebook = tensors.get("quantize.embedding.weight")
    images = {"in_channels": tensors["encoder.conv_in.weight"].shape[1]}
    params = {
        "encoder": node("autoencoder.networks.Encoder", **images, **sizes, moments=codebook is None),
        "decoder": node("autoencoder.networks.Decoder", out_channels=images["in_channels"], **sizes),
    }
    if codebook is not None:
        size, channels = codebook.shape
        params["quantizer"] = node("autoencoder.quantizer.VectorQuantizer", size=size, channels=channels)
    return params


def table(params: Mapping[str, Any]) -> list[Entry]:
    """Of encoder, decoder and quantizer."""
    sizes = params["encoder"]["params"]
    entries = [
        *under(_encoder(sizes), "encoder.", "encoder."),
        *layer("encoder.quant_conv", "quant_conv"),
        *under(_decoder(sizes), "decoder.", "decoder."),
        *layer("decoder.post_quant_conv", "post_quant_conv"),
    ]
    if "quantizer" in params:
        entries += layer("quantizer.codebook", "quantize.embedding", bias=None)
    return entries


def _encoder(sizes: Mapping[str, Any]) -> list[Entry]:
    widths = [sizes["base_channels"] * factor for factor in sizes["channel_mult"]]
    entries = [*layer("conv_in", "conv_in"), *layer("norm_out", "norm_out"), *layer("conv_out", "conv_out")]
    previous = sizes["base_channels"]
    for level, width in enumerate(widths):
        place = 0
        for block in range(sizes["num_res_blocks"]):
            entries += _res_block(f"levels.{level}.{place}", f"down.{level}.block.{block}", previous != width)
            previous, place = width, place + 1
            if level in sizes["attention_levels"]:
                entries += _attention(f"levels.{level}.{place}", f"down.{level}.attn.{block}")
                place += 1
        if level < len(widths) - 1:
            entries += layer(f"levels.{level}.{place}.conv", f"down.{level}.downsample.conv")
    return entries + _middle(sizes)


def _decoder(sizes: Mapping[str, Any]) -> list[Entry]:
    widths = [sizes["base_channels"] * factor for factor in sizes["channel_mult"]]
    entries = [*layer("conv_in", "conv_in"), *layer("norm_out", "norm_out"), *layer("conv_out", "conv_out")]
    previous = widths[-1]
    for order, level in enumerate(reversed(range(len(widths)))):
        place = 0
        for block in range(sizes["num_res_blocks"] + 1):
            entries += _res_block(f"levels.{order}.{place}", f"up.{level}.block.{block}", previous != widths[level])
            previous, place = widths[level], place + 1
            if level in sizes["attention_levels"]:
                entries += _attention(f"levels.{order}.{place}", f"up.{level}.attn.{block}")
                place += 1
        if level > 0:
            entries += layer(f"levels.{order}.{place}.conv", f"up.{level}.upsample.conv")
    return entries + _middle(sizes)


def _middle(sizes: Mapping[str, Any]) -> list[Entry]:
    attention = _attention("middle.1", "mid.attn_1") if sizes["middle_attention"] else []
    return [
        *_res_block("middle.0", "mid.block_1", False),
        *attention,
        *_res_block("middle.2", "mid.block_2", False),
    ]


def _res_block(ours: str, theirs: str, wider: bool) -> list[Entry]:
    names = ["norm1", "conv1", "norm2", "conv2"]
    entries = [entry for name in names for entry in layer(f"{ours}.{name}", f"{theirs}.{name}")]
    return entries + (layer(f"{ours}.shortcut", f"{theirs}.nin_shortcut") if wider else [])


def _attention(ours: str, theirs: str) -> list[Entry]:
    names = {"norm": "norm", "q": "q", "k": "k", "v": "v", "out": "proj_out"}
    return [entry for own, name in names.items() for entry in layer(f"{ours}.{own}", f"{theirs}.{name}")]


def _shapes(params: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{part}.{name}": shape for part, made in params.items() for name, shape in shapes(made).items()}


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How many names fit the pattern, with numbers from 0 on in its braces."""
    number = 0
    while pattern.format(number) in tensors:
        number += 1
    return number


FAMILY = Family(
    name="CompVis first stage",
    marks=(MARKS,),
    convert=convert,
)
