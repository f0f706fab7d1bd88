"""The first stage of an exported model: which model of diffusers it becomes, and where the latents' scale goes.

The denoiser's latents are standardized, the decoder's are not. One factor for all channels is `scaling_factor`, which
every pipeline of the library knows. A mean and std per channel are folded into the autoencoder for a pipeline of the
library, and otherwise left to ours (carried_pipeline.py), so that the autoencoder stays as it was.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm.autoencoder.codec import AutoencoderCodec, Codec, Pixels
from ldm.errors import ConfigError
from ldm.interop.diffusers import FirstStage
from ldm.interop.diffusers_models import autoencoder
from ldm.interop.diffusers_models.config import Exported
from ldm.interop.diffusers_models.regular import Regular, of_one_number, without_patches
from ldm.latents.manifest import Manifest
from ldm.runtime.float64 import double

WHERE = "--to diffusers"


@dataclass(frozen=True)
class Stage:
    """A first stage for a folder.

    Attributes:
        made: model of the library, still to be made or at hand; None: there is none, the denoiser makes images.
        kind: its class; "": none.
        norm_groups, patch_size: what our pipeline does for it (regular.py).
    """

    made: Exported | Any | None = None
    kind: str = ""
    norm_groups: Mapping[str, int] = field(default_factory=dict)
    patch_size: int = 1


def first_stage(codec: Codec, manifest: Manifest, fold: bool) -> Stage:
    """What becomes of a codec.

    Args:
        manifest: of the latents: their scale.
        fold: put it into the autoencoder if it is more than one factor.

    Raises:
        ConfigError: no class of the library is the same function.
    """
    if isinstance(codec, Pixels):
        return Stage()
    if isinstance(codec, FirstStage):
        return Stage(codec.model, type(codec.model).__name__)
    if not isinstance(codec, AutoencoderCodec):
        raise ConfigError(f"{WHERE}: the first stage, {type(codec).__name__}, has no counterpart")
    regular = without_patches(of_one_number(codec.config))
    alike = is_scaled_alike(manifest)
    if fold and not alike:
        made = exported(codec, regular, None, folded(codec.state_dict(), manifest))
    else:
        known = codec.quantizer is None or alike  # a VQModel has one factor alone
        made = exported(codec, regular, {"mean": manifest.mean, "std": manifest.std} if known else None)
    return Stage(made, made.class_name, regular.norm_groups, regular.patch_size)


def exported(
    codec: AutoencoderCodec,
    regular: Regular,
    scale: Mapping[str, Any] | None,
    weights: Mapping[str, Tensor] | None = None,
) -> Exported:
    """A codec as AutoencoderKL or VQModel; see autoencoder.py."""
    height, width = codec.size or (256, 256)
    return autoencoder.exported(
        regular.nodes,
        codec.state_dict() if weights is None else weights,
        max(height, width) // regular.patch_size,
        None if scale is None else scale["mean"],
        None if scale is None else scale["std"],
        WHERE,
    )


def library_scales(codec: Codec, manifest: Manifest) -> bool:
    """Whether a pipeline of the library brings latents to the scale of this first stage, if need be by folding."""
    alike = is_scaled_alike(manifest)
    if isinstance(codec, Pixels):
        return alike and manifest.std[0] == 1
    if isinstance(codec, FirstStage):
        return alike and (list(manifest.mean), list(manifest.std)) == autoencoder.scale(
            {**codec.model.config, "_class_name": type(codec.model).__name__}
        )
    # Of a codebook, latents that are scaled by channel have other nearest codes: no fold is exact.
    return isinstance(codec, AutoencoderCodec) and (codec.quantizer is None or alike)


def is_scaled_alike(manifest: Manifest) -> bool:
    """Whether one factor takes the decoder's latents to the denoiser's."""
    return {*manifest.mean} == {0.0} and len({*manifest.std}) == 1


def folded(weights: Mapping[str, Tensor], manifest: Manifest) -> dict[str, Tensor]:
    """The first stage of standardized latents: its last and first 1x1 convolutions take over mean and std, exactly.

    The log-variance that the encoder gives, too, becomes that of the standardized latents.
    """
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (manifest.mean, manifest.std))
    made = {name: double(tensor) for name, tensor in weights.items() if "quant_conv." in name}
    weight, bias = made["decoder.post_quant_conv.weight"], made["decoder.post_quant_conv.bias"]
    made["decoder.post_quant_conv.bias"] = bias + weight[:, :, 0, 0] @ mean
    made["decoder.post_quant_conv.weight"] = weight * std[:, None, None]
    scale = torch.cat([std, torch.ones_like(std)])
    shift = torch.cat([mean / std, 2 * std.log()])
    made["encoder.quant_conv.weight"] = made["encoder.quant_conv.weight"] / scale[:, None, None, None]
    made["encoder.quant_conv.bias"] = made["encoder.quant_conv.bias"] / scale - shift
    return {**weights, **{name: tensor.float() for name, tensor in made.items()}}
