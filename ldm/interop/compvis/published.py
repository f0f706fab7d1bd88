"""The published models of CompVis' latent-diffusion and of Stable Diffusion: what their files do not say.

Found by the shapes of the UNet's tensors. From models/ldm/*/config.yaml and configs/ in CompVis/latent-diffusion, and
from configs/stable-diffusion in Stability-AI/stablediffusion, in the words of these files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """One model, or several that differ in their weights alone.

    Attributes:
        name: as it is called.
        unet: the parameters of our UNet that its tensors say, as far as they are not the defaults.
        heads: the rest of them: `num_heads` or `num_head_channels`.
        params: of its configuration, `model.params`.
        linear: transformers begin and end with linear layers.
        label_dropout: the share of images it was trained on without their condition, if its null is known; else 0.
        null_class: the row of its class table that stands for no class.
        zero_null: its null condition is zeros.
        condition: what a ready-made condition is, in a sentence.
        misleading_size: the `image_size` of its published YAML, where it was trained at another.
    """

    name: str
    unet: Mapping[str, Any]
    heads: Mapping[str, int]
    params: Mapping[str, Any]
    linear: bool = False
    label_dropout: float = 0.0
    null_class: int | None = None
    zero_null: bool = False
    condition: str = ""
    misleading_size: int | None = None

    def has(self, unet: Mapping[str, Any], linear: bool) -> bool:
        """Whether its tensors have these shapes."""
        return linear == self.linear and dict(unet) == _DEFAULTS | dict(self.unet)


_DEFAULTS = {
    "num_res_blocks": 2,
    "context_dim": None,
    "transformer_depth": 1,
    "spatial_channels": 0,
    "scale_shift": False,
    "resample_in_blocks": False,
    "norm_groups": None,
}


def _unet(in_channels: int, model_channels: int, channel_mult: list[int], levels: list[int], **more: Any) -> Any:
    return {
        "in_channels": in_channels,
        "model_channels": model_channels,
        "channel_mult": channel_mult,
        "attention_levels": levels,
        **more,
    }


def _params(end: float, image_size: int, start: float = 0.0015, **more: Any) -> dict[str, Any]:
    usual = {"loss_type": "l2", "parameterization": "eps", "scale_factor": 1.0, "beta_schedule": "linear"}
    return {"linear_start": start, "linear_end": end, "timesteps": 1000, "image_size": image_size} | usual | more


_MASKED = "spatial: the mask (1 where it is painted anew), then the latent of the masked picture times 0.18215"


def _sd(size: int = 64, **more: Any) -> dict[str, Any]:
    return _params(0.012, size, 0.00085, scale_factor=0.18215, **more)


def _stable_diffusion(
    version: int,
    name: str,
    spatial_channels: int = 0,
    condition: str = "",
    misleading_size: int | None = None,
    **more: Any,
) -> Published:
    """Guidance leaves pictures that it is conditioned on as they are, so that those models have no null here."""
    contexts = {1: 768, 2: 1024}
    return Published(
        f"Stable Diffusion {version}{name}",
        _unet(4, 320, [1, 2, 4, 4], [0, 1, 2], context_dim=contexts[version], spatial_channels=spatial_channels),
        {"num_heads": 8} if version == 1 else {"num_head_channels": 64},
        _sd(**more),
        linear=version == 2,
        label_dropout=0.0 if spatial_channels else 0.1,
        condition=condition,
        misleading_size=misleading_size,
    )


PUBLISHED = (
    Published(
        "celebahq, ffhq, lsun_bedrooms (vq-f4)",
        _unet(3, 224, [1, 2, 3, 4], [1, 2, 3]),
        {"num_head_channels": 32},
        _params(0.0195, 64),
    ),
    Published(
        "lsun_churches (kl-f8)",
        _unet(4, 192, [1, 2, 2, 4, 4], [0, 1, 2, 3], scale_shift=True, resample_in_blocks=True),
        {"num_heads": 8},
        _params(0.0155, 32, loss_type="l1", scale_by_std=True),
    ),
    Published(
        "cin256 (vq-f8)",
        _unet(4, 256, [1, 2, 4], [0, 1, 2], context_dim=512),
        {"num_head_channels": 32},
        _params(0.0195, 32),
    ),
    Published(
        "cin256-v2 (vq-f4)",
        _unet(3, 192, [1, 2, 3, 5], [1, 2, 3], context_dim=512),
        {"num_heads": 1},
        _params(0.0195, 64),
        label_dropout=0.1,
        null_class=1000,
    ),
    Published(
        "text2img256 (vq-f4)",
        _unet(3, 192, [1, 2, 3, 5], [1, 2, 3], context_dim=640),
        {"num_head_channels": 32},
        _params(0.0195, 64),
    ),
    Published(
        "bsr_sr (vq-f4)",
        _unet(3, 160, [1, 2, 2, 4], [3], spatial_channels=3),
        {"num_head_channels": 32},
        _params(0.0155, 64, cond_stage_key="LR_image"),
    ),
    *(
        Published(
            f"semantic_synthesis{4 * size} (vq-f4)",
            _unet(3, 128, [1, 4, 8], [], spatial_channels=3),
            {"num_heads": 8},
            _params(0.0205, size, loss_type="l1", cond_stage_key="segmentation"),
        )
        for size in (64, 128)
    ),
    Published(
        "inpainting_big (vq-f4)",
        _unet(3, 256, [1, 2, 3, 4], [1, 2, 3], spatial_channels=4, resample_in_blocks=True),
        {"num_heads": 8},
        _params(0.0205, 64, loss_type="l1", cond_stage_key="masked_image"),
    ),
    Published(
        "layout2img (vq-f4)",
        _unet(3, 128, [1, 2, 3, 4], [1, 2, 3], context_dim=512, transformer_depth=3),
        {"num_head_channels": 32},
        _params(0.0205, 64, loss_type="l1", cond_stage_key="coordinates_bbox"),
    ),
    Published(
        "txt2img-1p4B (kl-f8)",
        _unet(4, 320, [1, 2, 4, 4], [0, 1, 2], context_dim=1280),
        {"num_heads": 8},
        _sd(32),
        label_dropout=0.1,  # the share is not published; scripts/txt2img.py guides it by the empty text
    ),
    Published(
        "retrieval-augmented 768 (kl-f16)",
        _unet(16, 448, [1, 2, 3, 4], [0, 1, 2], context_dim=768),
        {"num_head_channels": 32},
        _params(0.015, 48, scale_factor=0.22765929),
        label_dropout=0.1,
        zero_null=True,
        condition="tokens: normalized CLIP ViT-L/14 embeddings of the text or picture, then of its neighbors; the null "
        "is zeros, as in its authors' script",
    ),
    _stable_diffusion(1, ""),
    _stable_diffusion(1, " inpainting", 5, _MASKED),
    _stable_diffusion(2, " base"),
    _stable_diffusion(2, "", misleading_size=64, size=96, parameterization="v"),
    _stable_diffusion(2, " inpainting", 5, _MASKED),
    _stable_diffusion(2, " depth", 1, "spatial: the depth map at an eighth of the resolution, in [-1, 1]"),
)
