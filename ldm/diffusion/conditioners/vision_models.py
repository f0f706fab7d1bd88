"""Vision models of the package transformers, in folders: read from there, never downloaded, never trained.

A process loads each once, and only when it is asked for what it makes or for the hash of its weights. When it is
released its memory is free, and what is known of it stays.
"""

import functools
import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.diffusion.conditioners.frozen import FrozenModel, quiet, reading
from ldm.errors import CheckpointError, ConfigError, DataError
from ldm.runtime.full_precision import full_precision

_WHAT = "vision model"
_PROCESSING = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize"),
    *("image_mean", "image_std"),
)
"""All that decides what a processor makes of an RGB picture."""


class VisionModel(FrozenModel):
    """The vision model in a folder; of a whole CLIP or SigLIP its half for pictures.

    Args:
        folder: with config.json, weights and preprocessor_config.json.
        projected: whether its vector is CLIP's, in the space of texts.

    Raises:
        ConfigError: transformers is not installed, or the model has no such projection.
        CheckpointError: there is none.
    """

    def __init__(self, folder: str, projected: bool) -> None:
        kind, self._config = _described(folder, projected)
        super().__init__(folder, kind, _WHAT)

    @functools.cached_property
    def processor(self) -> Any:
        """Of transformers: pictures -> pixels. CheckpointError if there is none."""
        import transformers

        folder = Path(self.folder)
        beside = folder.with_name(folder.name.replace("image_encoder", "feature_extractor"))
        place = folder if (folder / "preprocessor_config.json").is_file() else beside
        if not (place / "preprocessor_config.json").is_file():
            raise CheckpointError(
                f"{folder}: no preprocessor_config.json, which says how pictures are resized and cropped for this "
                f"model: put the one there that it was trained with"
            )
        with reading(self.folder, _WHAT), quiet():
            return transformers.AutoImageProcessor.from_pretrained(place, local_files_only=True)

    @property
    def processing(self) -> dict[str, Any]:
        """What is done to pictures first, in plain values."""
        settings = self.processor.to_dict()
        return {key: _plain(settings.get(key)) for key in _PROCESSING}

    @property
    def processed(self) -> str:
        """sha256 (hex) of the same."""
        return sha256(json.dumps(self.processing, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of `vector` (D,) and `tokens` (L, D'); known without its weights."""
        pixels = self.pixels(Image.new("RGB", (64, 64)))
        with reading(self.folder, _WHAT), torch.device("meta"), torch.no_grad():
            found = self._parts(self.kind(self._config).eval(), torch.empty_like(pixels, device="meta"))
        return {name: tuple(one.shape) for name, one in found.items()}

    def pixels(self, picture: Image.Image) -> Tensor:
        """(1, 3, H, W) of an RGB picture."""
        found: Tensor = self.processor(images=picture, return_tensors="pt")["pixel_values"]
        return found

    def made(self, picture: Image.Image, device: torch.device) -> dict[str, Tensor]:
        """`vector` (D,) and `tokens` (L, D') of an RGB picture, float32 on `device`.

        Raises:
            DataError: the processor makes another number of patches of it than of others.
        """
        # Not in inference mode, even where the caller is: training could not use tokens that are kept for later.
        with torch.inference_mode(False), torch.no_grad(), full_precision(device.type):
            found = self._parts(self.network.to(device), self.pixels(picture).to(device))
        for name, one in found.items():
            if one.shape != self.shapes[name]:
                raise DataError(
                    f"image: {self.folder} makes {name} {[*one.shape]} of {picture.size[0]}x{picture.size[1]} pixels, "
                    f"and {[*self.shapes[name]]} of a square: its preprocessor_config.json has to crop to one size"
                )
        return found

    def _parts(self, network: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
        output = network(pixel_values=pixels)
        tokens = output.last_hidden_state[0]
        if self.kind.__name__.endswith("WithProjection"):
            return {"vector": output.image_embeds[0], "tokens": tokens}
        # A pooler is a layer that checkpoints may come without, of whose first token a ViT then makes use.
        has_pooler = any("pooler." in name for name, _ in network.named_parameters())
        return {"vector": tokens[0] if has_pooler else output.pooler_output[0], "tokens": tokens}


@functools.cache
def opened(folder: str, projected: bool = False) -> VisionModel:
    """The one VisionModel of a folder in this process."""
    return VisionModel(folder, projected)


def _described(folder: str, projected: bool) -> tuple[Any, Any]:
    """The class of transformers, and the description, of the vision model in a folder."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"vision models need the package {error.name}: pip install -e '.[text]'") from error
    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: no vision model: expected a folder with config.json, its weights and preprocessor_config.json. "
            f"Put the one there that this configuration means, or name another."
        )
    with reading(folder, _WHAT):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    config = (config.to_dict().get("vision_config") and config.vision_config) or config
    if projected:
        if not isinstance(config, transformers.CLIPVisionConfig):
            raise ConfigError(f"PictureEncoder: projected: {folder} is a {config.model_type}; expected CLIP's pictures")
        return transformers.CLIPVisionModelWithProjection, config
    kind = transformers.MODEL_MAPPING.get(type(config), None)
    if kind is None:
        raise ConfigError(f"PictureEncoder: {folder}: transformers has no vision model for {config.model_type}")
    return kind, config


def _plain(setting: Any) -> Any:
    """A processor's setting as numbers, lists and mappings."""
    if isinstance(setting, Mapping):
        return {str(key): _plain(value) for key, value in setting.items() if value is not None}
    return [*setting] if isinstance(setting, list | tuple) else setting
