"""What CompVis' models read beside the latent: maps of classes, pictures with a hole, small pictures."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.interop.compvis.conditioned import Conditioned, given
from ldm.interop.compvis.description import Description, part
from ldm.interop.models import node
from ldm.interop.tables import Entry, each

_PROJECTION = "channel_mapper.weight"
_RESCALED = {"method": "bilinear", "multiplier": 0.5, "bias": False}
"""What our map is as well, of the parameters of a `SpatialRescaler`; these are its defaults."""
_BLACK = -1.0


def picture(
    description: Description, encoder: Mapping[str, Tensor], unet: Mapping[str, Any], size: int, factor: int
) -> Conditioned:
    """The conditioner of the channels beside the latent; ready-made ones where nothing says what they are.

    Args:
        encoder: `cond_stage_model.`, without that prefix.
        unet: the parameters of ours.
        size: the side of the latents.
        factor: pixels to one of the latents.
    """
    key = description.condition_key()
    found = None
    if key == "segmentation":
        found = _map(description, encoder)
    elif key == "masked_image":
        found = _masked(encoder, unet)
    elif key == "LR_image":
        found = _small(encoder, unet, factor)
    return given("spatial", [unet["spatial_channels"], size, size], description) if found is None else found


def _map(description: Description, encoder: Mapping[str, Tensor]) -> Conditioned | None:
    """A `SpatialRescaler` with a projection: halved bilinearly, which is the average of squares of pixels."""
    settings = part(description.params, "cond_stage_config")
    if [*encoder] != [_PROJECTION] or any(settings.get(key, one) != one for key, one in _RESCALED.items()):
        return None
    channels, classes = encoder[_PROJECTION].shape[:2]
    return Conditioned(
        node("diffusion.conditioners.maps.SemanticMap", map_classes=classes, channels=channels),
        table=[Entry("table.weight", (_PROJECTION,), each(_rows, _projection))],
        shapes={"table.weight": torch.Size((classes, channels))},
        data={"aligned": {"map": node("latents.aligned.Map", num_classes=classes)}},
        notes=["The classes of its maps are numbers of its own data, which no file of this kind names."],
    )


def _rows(weight: Tensor) -> Tensor:
    """A 1x1 convolution (channels, classes, 1, 1) -> a row for each class."""
    return weight[:, :, 0, 0].T


def _projection(rows: Tensor) -> Tensor:
    return rows.T[:, :, None, None]


def _masked(encoder: Mapping[str, Tensor], unet: Mapping[str, Any]) -> Conditioned | None:
    """The latent of the picture whose hole is black, then the mask from -1 to 1: scripts/inpaint.py."""
    channels = unet["in_channels"]
    if encoder or unet["spatial_channels"] != channels + 1:
        return None
    masks = node("latents.masked.MaskedLatents", masks=node("data.masks.Masks"), variants=4, fill=_BLACK)
    return Conditioned(
        node("diffusion.conditioners.inpainting.MaskedPicture", channels=channels, outside=-1.0),
        data={"masked": masks},
    )


def _small(encoder: Mapping[str, Tensor], unet: Mapping[str, Any], factor: int) -> Conditioned | None:
    """The small picture in [-1, 1] as it is, of the latent's size."""
    if encoder:
        return None
    return Conditioned(
        node("diffusion.conditioners.low_resolution.LowResolution", channels=unet["spatial_channels"], most=0.0),
        data={
            "aligned": {"image": node("latents.aligned.Pixels")},
            "drawn": {"low_resolution": node("data.degradation.LightDegradation", factor=factor)},
        },
    )
