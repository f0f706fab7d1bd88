"""Files in the names of CompVis' latent-diffusion: tiny ones of random weights, and the published ones' shapes."""

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config.load import build
from ldm.interop.compvis import first_stage_table as compvis_first_stage_table
from ldm.interop.compvis import unet as compvis_unet
from ldm.interop.compvis.model import average_name
from ldm.interop.models import node
from ldm.interop.sources import Source
from ldm.interop.tables import to_theirs

INVENTORIES = Path(__file__).parent / "inventories" / "compvis"

SIZES = {
    "one level": {"model_channels": 32, "channel_mult": [1], "num_res_blocks": 1},
    "two levels": {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1},
    "three levels": {"model_channels": 64, "channel_mult": [1, 1, 2], "num_res_blocks": 2},
}


@dataclass(frozen=True)
class Kind:
    """What sets the published models apart, at any size.

    Attributes:
        unet: parameters of our UNet.
        yaml: further parameters of UNetModel.
        encoder: {name in `cond_stage_model.`: shape}.
        condition: of one sample; None: unconditional.
        first_stage: whether the latents are of a codebook.
    """

    unet: Mapping[str, Any] = field(default_factory=dict)
    yaml: Mapping[str, Any] = field(default_factory=dict)
    encoder: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    condition: Mapping[str, Any] | None = None
    linear: bool = False
    by_head: bool = True
    codebook: bool = False


def tokens(length: int = 5) -> dict[str, Tensor]:
    return {"tokens": torch.randn(length, 8)}


CROSS = {"context_dim": 8}
BERT = {"transformer.pos_emb.emb.weight": (5, 8), "transformer.token_emb.weight": (9, 8)}
KINDS = {
    "celeba": Kind({"num_head_channels": 32}, codebook=True),
    "lsun_churches": Kind({"num_heads": 4, "scale_shift": True, "resample_in_blocks": True}),
    "new attention order": Kind({"num_heads": 2}, {"use_new_attention_order": True}, by_head=False),
    "cin": Kind({**CROSS, "num_heads": 1}, encoder={"embedding.weight": (4, 8)}, condition={"class_label": 3}),
    "text2img256": Kind({**CROSS, "num_head_channels": 32}, encoder=BERT, condition=tokens()),
    "layout2img": Kind({**CROSS, "num_heads": 2, "transformer_depth": 3}, encoder=BERT, condition=tokens()),
    "rdm768": Kind({**CROSS, "num_head_channels": 32}, condition=tokens(7)),
    "semantic": Kind(
        {"num_heads": 8, "spatial_channels": 2},
        encoder={"channel_mapper.weight": (2, 6, 1, 1)},
        condition={"spatial": torch.randn(2, 8, 8)},
        codebook=True,
    ),
    "inpainting_big": Kind(
        {"num_heads": 8, "spatial_channels": 3, "resample_in_blocks": True}, condition={"spatial": torch.randn(3, 8, 8)}
    ),
    "sd2 without its encoder": Kind({**CROSS, "num_head_channels": 32}, condition=tokens(), linear=True),
}


def unet_params(kind: Kind, size: Mapping[str, Any]) -> dict[str, Any]:
    """Of our UNet: attention at every level but the first, if there are several."""
    levels = len(size["channel_mult"])
    usual = {"in_channels": 2, "attention_levels": [*range(1, levels)] or [0], "norm_groups": 32, "context_dim": None}
    usual |= {"spatial_channels": 0, "scale_shift": False, "resample_in_blocks": False, "transformer_depth": 1}
    params = {**usual, **size, **kind.unet}
    return params | ({"resample_in_blocks": False} if levels == 1 else {})  # there is nothing to resample


def random_weights(made: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    state = build(made).state_dict()
    return {name: torch.randn_like(one) / max(1, one[0].numel()) ** 0.5 for name, one in state.items()}


def tiny(kind: Kind, size: Mapping[str, Any], *, average: bool = True, first_stage: bool = True) -> dict[str, Tensor]:
    """All tensors of a file."""
    params = unet_params(kind, size)
    table = compvis_unet.table(params, linear=kind.linear, by_head=kind.by_head)
    made = node("diffusion.networks.unet.UNet", **params)
    raw = to_theirs(table, random_weights(made, 0))
    file = {f"model.diffusion_model.{name}": one for name, one in raw.items()}
    file |= {"betas": torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64).square().float()}
    file |= {"alphas_cumprod": (1 - file["betas"].double()).cumprod(0).float(), "sqrt_alphas_cumprod": torch.ones(1000)}
    if average:
        file |= {average_name(name): one for name, one in to_theirs(table, random_weights(made, 1)).items()}
        file |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    if first_stage:
        file |= {f"first_stage_model.{name}": one for name, one in tiny_first_stage(kind.codebook).items()}
    return file | {f"cond_stage_model.{name}": torch.randn(shape) for name, shape in kind.encoder.items()}


def tiny_first_stage(codebook: bool) -> dict[str, Tensor]:
    """Of f2, with latents of two channels."""
    sizes = {"base_channels": 32, "channel_mult": [1, 1], "num_res_blocks": 1, "latent_channels": 2}
    sizes |= {"attention_levels": [], "middle_attention": True, "norm_groups": 32}
    params = {
        "encoder": node("autoencoder.networks.Encoder", in_channels=3, **sizes, moments=not codebook),
        "decoder": node("autoencoder.networks.Decoder", out_channels=3, **sizes),
    }
    if codebook:
        params["quantizer"] = node("autoencoder.quantizer.VectorQuantizer", size=16, channels=2)
    weights = {f"{part}.{name}": one for part, made in params.items() for name, one in random_weights(made, 2).items()}
    return to_theirs(compvis_first_stage_table.table(params), weights)


def yaml_of(kind: Kind, size: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The YAML that belongs to a tiny file."""
    params = unet_params(kind, size)
    theirs = {
        "in_channels": params["in_channels"] + params["spatial_channels"],
        "out_channels": params["in_channels"],
        "model_channels": params["model_channels"],
        "channel_mult": params["channel_mult"],
        "num_res_blocks": params["num_res_blocks"],
        "attention_resolutions": [2**level for level in params["attention_levels"]] + [64],
        "use_scale_shift_norm": params["scale_shift"],
        "resblock_updown": params["resample_in_blocks"],
        **{key: params[key] for key in ("num_heads", "num_head_channels") if key in params},
        **kind.yaml,
    }
    unet = {"target": "nowhere.to.be.Imported", "params": theirs}
    own = {"linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 1000, "image_size": 8, "unet_config": unet}
    return {"model": {"target": "nowhere.LatentDiffusion", "params": own | more}}


def source(file: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Source:
    return Source(Path("model.ckpt"), file, config=config or {})


def inventory(name: str) -> dict[str, Tensor]:
    """The tensors of a published file on the meta device; the scale of latents, where it is in the file, is 0.5."""
    listed = json.loads(gzip.decompress((INVENTORIES / f"{name}.json.gz").read_bytes()))
    found = {tensor: torch.empty(shape, device="meta") for tensor, shape in listed.items() if shape != [1000]}
    return found | ({"scale_factor": torch.tensor(0.5)} if "scale_factor" in found else {})
