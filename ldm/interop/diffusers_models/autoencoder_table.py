"""The tensors of diffusers' AutoencoderKL and VQModel, and of our Encoder, Decoder and VectorQuantizer.

Their attention is of linear layers where ours is of convolutions of size 1; the blocks of their decoder are listed in
the order in which they are used, as ours are.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ldm.autoencoder.networks import Attention, Decoder, Downsample, Encoder, ResBlock, Upsample
from ldm.interop.models import on_meta
from ldm.interop.tables import LINEAR_AS_CONV2D, Entry, identity_conv, layer, under

_FORMER = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names of attention's layers before diffusers 0.15, which it still reads."""


def table_of(params: Mapping[str, Any], quant_conv: bool = True, post_quant_conv: bool = True) -> list[Entry]:
    """Of encoder, decoder and quantizer.

    Args:
        quant_conv, post_quant_conv: whether their model has these layers; ours is the identity where it has not.
    """
    encoder, decoder = on_meta(params["encoder"]), on_meta(params["decoder"])
    assert isinstance(encoder, Encoder)
    assert isinstance(decoder, Decoder)
    moments = encoder.outputs * encoder.latent_channels
    return [
        *under([*_side(encoder), *_levels(encoder.levels, "down_blocks", "downsamplers")], "encoder.", "encoder."),
        *(layer("encoder.quant_conv", "quant_conv") if quant_conv else identity_conv("encoder.quant_conv", moments)),
        *under([*_side(decoder), *_levels(decoder.levels, "up_blocks", "upsamplers")], "decoder.", "decoder."),
        *(
            layer("decoder.post_quant_conv", "post_quant_conv")
            if post_quant_conv
            else identity_conv("decoder.post_quant_conv", decoder.latent_channels)
        ),
        *(layer("quantizer.codebook", "quantize.embedding", bias=None) if params.get("quantizer") else []),
    ]


def _side(network: Encoder | Decoder) -> list[Entry]:
    """What the two networks have besides their levels and the convolutions around the latent."""
    entries = [*layer("conv_in", "conv_in"), *layer("norm_out", "conv_norm_out"), *layer("conv_out", "conv_out")]
    first, attention, last = network.middle
    entries += _res_block(first, "middle.0", "mid_block.resnets.0") + _res_block(
        last, "middle.2", "mid_block.resnets.1"
    )
    return entries + (_attention("middle.1", "mid_block.attentions.0") if isinstance(attention, Attention) else [])


def _levels(levels: nn.Module, theirs: str, resize: str) -> list[Entry]:
    entries = []
    for level, layers in levels.named_children():
        blocks = attentions = 0
        for place, made in layers.named_children():
            ours, block = f"levels.{level}.{place}", f"{theirs}.{level}"
            if isinstance(made, ResBlock):
                entries += _res_block(made, ours, f"{block}.resnets.{blocks}")
                blocks += 1
            elif isinstance(made, Attention):
                entries += _attention(ours, f"{block}.attentions.{attentions}")
                attentions += 1
            else:
                assert isinstance(made, Downsample | Upsample)
                entries += layer(f"{ours}.conv", f"{block}.{resize}.0.conv")
    return entries


def _res_block(made: nn.Module, ours: str, theirs: str) -> list[Entry]:
    assert isinstance(made, ResBlock)
    entries = [
        one for name in ("norm1", "conv1", "norm2", "conv2") for one in layer(f"{ours}.{name}", f"{theirs}.{name}")
    ]
    plain = isinstance(made.shortcut, nn.Identity)
    return entries + ([] if plain else layer(f"{ours}.shortcut", f"{theirs}.conv_shortcut"))


def _attention(ours: str, theirs: str) -> list[Entry]:
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
    return [
        *layer(f"{ours}.norm", f"{theirs}.group_norm"),
        *(one for own, name in names.items() for one in layer(f"{ours}.{own}", f"{theirs}.{name}", LINEAR_AS_CONV2D)),
    ]


def present_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names that diffusers has now for attention's layers."""
    renamed = {}
    for name, tensor in tensors.items():
        for former, present in _FORMER.items():
            name = name.replace(former, present) if ".attentions." in name else name
        renamed[name] = tensor
    return renamed
