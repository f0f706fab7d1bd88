"""Small files of others with random weights: CompVis' first stages and TAESD."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config.load import build
from ldm.interop.compvis.first_stage_table import table
from ldm.interop.models import node
from ldm.interop.tables import to_theirs
from ldm.interop.tiny_autoencoder import table as tiny_table

SIZES = {"base_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "latent_channels": 4}


def nodes(codes: int = 0, channels: int = 3, **sizes: Any) -> dict[str, Any]:
    """Of encoder, decoder and, with `codes`, quantizer."""
    both = {"attention_levels": [], "middle_attention": True, "norm_groups": 32} | SIZES | sizes
    params = {
        "encoder": node("autoencoder.networks.Encoder", in_channels=channels, **both, moments=not codes),
        "decoder": node("autoencoder.networks.Decoder", out_channels=channels, **both),
    }
    latent = both["latent_channels"]
    book = node("autoencoder.quantizer.VectorQuantizer", size=codes, channels=latent, commitment=4.0)
    return params | ({"quantizer": book} if codes else {})


def random_weights(params: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Of all parts, by our names; norms differ from their start."""
    torch.manual_seed(seed)
    built = {part: build(made) for part, made in params.items()}
    weights = {f"{part}.{name}": one for part, module in built.items() for name, one in module.state_dict().items()}
    return {name: one + 0.1 * torch.randn(one.shape) if one.ndim == 1 else one for name, one in weights.items()}


def own(quant_convs: bool = True, **sizes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Nodes, and weights by our names; without `quant_convs` ours are identities."""
    params = nodes(**sizes)
    weights = random_weights(params)
    for conv in () if quant_convs else ("encoder.quant_conv", "decoder.post_quant_conv"):
        channels = len(weights[f"{conv}.weight"])
        weights[f"{conv}.weight"] = torch.eye(channels)[:, :, None, None]
        weights[f"{conv}.bias"] = torch.zeros(channels)
    return params, weights


def first_stage(quant_convs: bool = True, **sizes: Any) -> dict[str, Tensor]:
    """The tensors of a CompVis first stage, by their names."""
    params, weights = own(quant_convs, **sizes)
    return to_theirs(table(params, quant_convs), weights)


def discriminator(layers: int = 1, seed: int = 1) -> dict[str, Tensor]:
    """Of the training loss: `loss.discriminator.main...`, with BatchNorm's counts."""
    made = node("autoencoder.discriminator.PatchDiscriminator", channels=8, layers=layers)
    weights = random_weights({"loss.discriminator": made}, seed)
    return {name.replace(".layers.", ".main."): one for name, one in weights.items()}


def tiny(folder: Path, name: str = "taesd", latent_channels: int = 4) -> dict[str, Tensor]:
    """Write the two files of a small TAESD; returns its tensors, `encoder.0.weight`, ..."""
    sizes = {"latent_channels": latent_channels, "channels": 8}
    params = {
        "encoder": node("autoencoder.tiny.TinyEncoder", num_blocks=[1, 2], **sizes),
        "decoder": node("autoencoder.tiny.TinyDecoder", num_blocks=[2, 1], **sizes),
    }
    tensors = to_theirs(tiny_table(params), random_weights(params))
    for half in ("encoder", "decoder"):
        part = {key.removeprefix(f"{half}."): one for key, one in tensors.items() if key.startswith(half)}
        torch.save(part, folder / f"{name}_{half}.pth")
    return tensors
