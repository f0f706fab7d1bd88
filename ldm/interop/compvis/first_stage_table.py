"""The table of CompVis' first stages: their tensors' names beside ours, for any architecture."""

from collections.abc import Mapping
from typing import Any

from ldm.interop.tables import Entry, identity_conv, layer, under


def table(params: Mapping[str, Any], quant_convs: bool = True) -> list[Entry]:
    """Of encoder, decoder and quantizer.

    Args:
        quant_convs: whether theirs have the 1x1 convolutions around the latent; without them, as in FLUX.1, ours are
            identities.
    """
    encoder, decoder = params["encoder"]["params"], params["decoder"]["params"]
    latent = encoder["latent_channels"]
    moments = latent * (2 if encoder["moments"] else 1)
    around = {"encoder.quant_conv": ("quant_conv", moments), "decoder.post_quant_conv": ("post_quant_conv", latent)}
    entries = [*under(_encoder(encoder), "encoder.", "encoder."), *under(_decoder(decoder), "decoder.", "decoder.")]
    for ours, (theirs, channels) in around.items():
        entries += layer(ours, theirs) if quant_convs else identity_conv(ours, channels)
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
