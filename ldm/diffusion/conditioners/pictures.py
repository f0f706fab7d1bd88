"""Pictures as conditions, read by a trained vision model of the package transformers that stays as it is.

As in models that are conditioned on another picture's style or content (Ramesh et al. 2022, "unCLIP"; Ye et al. 2023,
"IP-Adapter"), or learn from features of their own (Pernias et al. 2023, "Wuerstchen"). `PictureEncoder` is the vision
model as a feature, which a cache may keep; `FeaturePicture` is the conditioner that reads it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ldm.data.decoding import over_white
from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.conditioners.features import Part, columns, held, meta_columns
from ldm.diffusion.conditioners.frozen import as_state, may_lack_hash, require_same
from ldm.diffusion.conditioners.vision_models import VisionModel, opened
from ldm.errors import ConfigError, DataError
from ldm.images import picture, to_uint8

_TYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class PictureEncoder:
    """A trained vision model as a feature of pictures: a pooled `vector`, and `tokens`, one for each patch and more.

    Each picture is encoded on its own, in true float32, as the model's own processor resizes and crops it. Its width
    and the number of tokens are the model's.

    Args:
        encoder: folder with `config.json`, weights and `preprocessor_config.json` of a CLIP, SigLIP, DINOv2 or another
            ViT; where it is the `image_encoder` of a pipeline of diffusers, the last may lie in `feature_extractor`
            beside it. Nothing is downloaded.
        vector: whether there is a vector: what the model itself makes of all tokens, or its first token.
        tokens: whether there are tokens, those of the model's last layer.
        projected: the vector in the space that CLIP's pictures share with its texts.
        dtype: of what is made, and stored.

    Raises:
        ConfigError: transformers is not installed, or nothing is asked for.
        CheckpointError: there is no such model in that folder.
    """

    encoder: str | Path
    vector: bool = True
    tokens: bool = False
    projected: bool = False
    dtype: Literal["float16", "float32"] = "float16"

    def __post_init__(self) -> None:
        if not self.vector and not self.tokens:
            raise ConfigError("PictureEncoder: expected vector, tokens, or both, found neither")

    @property
    def model(self) -> VisionModel:
        return opened(str(self.encoder), self.projected)

    @property
    def reads(self) -> str:
        return "image"

    @property
    def parts(self) -> Mapping[str, Part]:
        shapes = self.model.shapes
        return {name: Part(shapes[name], _TYPES[self.dtype]) for name in self._names}

    def describe(self) -> dict[str, Any]:
        settings = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "encoder"}
        return {"weights": self.model.weights, "processor": self.model.processing, **settings}

    def encode(self, value: Any, device: torch.device) -> dict[str, Tensor]:
        """The parts of a picture: PIL; (H,W,C) of whole numbers 0 ... 255; or a tensor (C,H,W) in [-1, 1].

        Raises:
            DataError: it is none of these, or neither gray nor RGB.
        """
        made = self.model.made(as_rgb(value), device)
        return {name: made[name].to("cpu", _TYPES[self.dtype]) for name in self._names}

    def release(self) -> None:
        self.model.release()

    @property
    def _names(self) -> list[str]:
        return [name for name, wanted in (("vector", self.vector), ("tokens", self.tokens)) if wanted]


def as_rgb(value: Any) -> Image.Image:
    """A picture of a data set, a batch or a condition as RGB, transparency over white; DataError if it is none."""
    if isinstance(value, Image.Image):
        if value.mode.startswith(("I", "F")):
            raise DataError(f"image: expected pixels of 8 bits, gray or RGB, found mode {value.mode!r}")
        return over_white(value).convert("RGB")
    if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3:
        value = to_uint8(value).permute(1, 2, 0)
    pixels = np.asarray(value.cpu() if isinstance(value, Tensor) else value)
    if pixels.ndim != 3 or pixels.dtype.kind not in "iu" or pixels.shape[2] not in (1, 3, 4):
        raise DataError(f"image: expected a picture, gray or RGB, found {pixels.dtype} {pixels.shape}")
    if pixels.size and not 0 <= pixels.min() <= pixels.max() <= 255:
        raise DataError(f"image: expected pixels of 0 to 255, found {pixels.min()} to {pixels.max()}")
    return over_white(picture(pixels.astype(np.uint8))).convert("RGB")


class FeaturePicture(nn.Module):
    """A picture as a feature: its vector, its tokens, or both; null: zeros, as in unCLIP and IP-Adapter.

    Where a batch has the feature's columns, because a cache keeps them, they are read, and the model's memory is given
    back; otherwise pictures are encoded on the device.

    Args:
        feature: the vision model; with a cache of it, `${data.params.features.picture}`.
        name: of the feature there, with which its columns in a batch begin.
    """

    def __init__(self, feature: PictureEncoder, name: str = "picture") -> None:
        super().__init__()
        self.feature = feature
        self.name = name
        self.register_buffer("_place", torch.zeros(()), persistent=False)  # where the model is; nothing else is held
        self.register_load_state_dict_pre_hook(may_lack_hash)

    @property
    def keys(self) -> Sequence[str]:
        return (self.feature.reads,)

    def forward(self, batch: Mapping[str, Any]) -> Conditioning:
        if held(self.feature, self.name, batch):
            self.feature.release()
        elif self.feature.reads not in batch:
            raise ConfigError(
                f"FeaturePicture: a batch holds neither pictures nor {self.name}.*: name the feature in "
                f"data.params.features.{self.name}, so that the cache keeps it"
            )
        return self._conditioning(columns(self.feature, self.name, batch, self._device))

    def null(self, n: int) -> Conditioning:
        made = meta_columns(self.feature, self.name, n)
        return self._conditioning({name: torch.zeros_like(one, device=self._device) for name, one in made.items()})

    def get_extra_state(self) -> Tensor:
        """The hashes of the model's weights and processor, (64,) uint8; of a model without values zeros."""
        if self._device.type == "meta":
            return torch.zeros(64, dtype=torch.uint8, device="meta")
        return as_state(self.feature.model.weights + self.feature.model.processed)

    def set_extra_state(self, state: Tensor | None) -> None:
        """CheckpointError if the model in the folder is another one than that of a checkpoint; None: not known."""
        if state is not None and not state.is_meta and self._device.type != "meta":
            model = self.feature.model
            found = {"weights": model.weights, "processor": model.processed}
            require_same(model.folder, "vision model", found, state)

    @property
    def _device(self) -> torch.device:
        return self.get_buffer("_place").device

    def _conditioning(self, found: Mapping[str, Tensor]) -> Conditioning:
        slots = {name: found.get(f"{self.name}.{name}") for name in ("vector", "tokens")}
        return Conditioning(**{name: None if one is None else one.float() for name, one in slots.items()})
