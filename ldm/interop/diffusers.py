"""Autoencoders of diffusers as they come, unconverted, behind the contract of a first stage (ldm/autoencoder/codec.py).

    data:
      params:
        autoencoder: {target: ldm.interop.diffusers.FirstStage, params: {path: /models/sd-vae-ft-mse}}

The path alone does as well, wherever a first stage is named.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.autoencoder.codec import Codec
from ldm.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class _Kind:
    """What the classes of diffusers differ in.

    Attributes:
        moments: what its `encode` returns -> mean and std, (N,c,h,w) each.
        levels: the key of its description that has an entry for each resolution, each half of the one before.
        deterministic: whether the std is zero.
    """

    moments: Callable[[Any], tuple[Tensor, Tensor]]
    levels: str = "block_out_channels"
    deterministic: bool = True


def _gaussian(output: Any) -> tuple[Tensor, Tensor]:
    return output.latent_dist.mean, output.latent_dist.std


def _latents(output: Any) -> tuple[Tensor, Tensor]:
    return output.latents, torch.zeros_like(output.latents)


def _latent(output: Any) -> tuple[Tensor, Tensor]:
    return output.latent, torch.zeros_like(output.latent)


# A VQModel's latents are those before quantization; its `decode` looks up the codes.
KINDS = {
    "AutoencoderKL": _Kind(_gaussian, deterministic=False),
    "AsymmetricAutoencoderKL": _Kind(_gaussian, "down_block_out_channels", deterministic=False),
    "VQModel": _Kind(_latents),
    "AutoencoderDC": _Kind(_latent, "encoder_block_out_channels"),
    "AutoencoderTiny": _Kind(_latents, "encoder_block_out_channels"),
}
"""By the `_class_name` of a folder's config.json."""


class FirstStage(Codec):
    """An autoencoder of diffusers, in float32. Scale and shift of its latents are left to the cache's statistics.

    Args:
        path: folder with `config.json` and weights, as `save_pretrained` writes it: of a pipeline its part `vae`,
            `vqvae` or the like. Nothing is downloaded.

    Raises:
        ConfigError: diffusers is not installed, or it is a class that is not known here.
        CheckpointError: there is none, or its weights are missing, damaged or of another shape.
    """

    def __init__(self, path: str | Path) -> None:
        folder = Path(path).expanduser()
        described = _description(folder)
        name = described["_class_name"]
        kind = KINDS[name]
        model = _loaded(folder, name)
        settings: Mapping[str, Any] = model.config
        self._check_images(settings, folder)
        architecture = {key: value for key, value in described.items() if key == "_class_name" or key[0] != "_"}
        config = {"target": f"{FirstStage.__module__}.{FirstStage.__qualname__}", "params": {}}
        # The vectors of a codebook may be shorter than what the decoder reads.
        channels = settings["in_channels"], settings.get("vq_embed_dim") or settings["latent_channels"]
        factor = 2 ** (len(settings[kind.levels]) - 1)
        super().__init__(channels, factor, config | {"architecture": architecture}, str(folder))
        self.model = model
        self.kind = kind
        self.freeze()

    @property
    def deterministic(self) -> bool:
        return self.kind.deterministic

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.kind.moments(self.model.encode(images))

    def pictures(self, latents: Tensor) -> Tensor:
        images: Tensor = self.model.decode(latents).sample
        return images

    @staticmethod
    def _check_images(settings: Mapping[str, Any], folder: Path) -> None:
        """ConfigError unless as many channels come out as go in."""
        given, returned = settings["in_channels"], settings.get("out_channels", settings["in_channels"])
        if given != returned:
            raise ConfigError(
                f"{folder / 'config.json'}: out_channels: expected {given}, as in_channels, found {returned}: this is "
                f"no autoencoder of images"
            )


def _description(folder: Path) -> dict[str, Any]:
    """The folder's config.json, of a class that is known."""
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder}: {_why_not(folder)}")
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        name = tree["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}: does not describe a model of diffusers: expected JSON with _class_name ({error!r})"
        ) from error
    if name not in KINDS:
        raise ConfigError(f"{file}: _class_name: expected one of {', '.join(KINDS)}, found {name}")
    found: dict[str, Any] = tree
    return found


def _why_not(folder: Path) -> str:
    if not folder.exists():
        return "no such folder; expected one of diffusers, with config.json and weights"
    if (folder / "model_index.json").is_file():
        parts = sorted(str(file.parent) for file in folder.glob("*/config.json") if file.parent.name[0] == "v")
        return f"a whole pipeline; name the autoencoder in it{': ' if parts else ''}{', '.join(parts)}"
    return "expected a folder of diffusers with config.json and weights; there is no config.json in it"


def _loaded(folder: Path, name: str) -> Any:
    """The model with all of its weights, in float32; diffusers would replace missing ones by random numbers."""
    try:
        import diffusers
    except ImportError as error:
        raise ConfigError(
            f"{folder}: autoencoders of diffusers need the package {error.name}: pip install -e .[interop]"
        ) from error
    kind = getattr(diffusers, name)
    with _quiet(diffusers), torch.device("cpu"):
        try:
            model, info = kind.from_pretrained(
                folder, local_files_only=True, torch_dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:  # diffusers, safetensors and torch have classes of their own
            text = " ".join(str(error).split())
            raise CheckpointError(f"{folder}: cannot be read as {name}: {text[:300]}") from error
    for what in ("missing", "mismatched", "unexpected"):
        if names := sorted(map(str, info[f"{what}_keys"])):
            raise CheckpointError(
                f"{folder}: its weights do not fit its config.json: {len(names)} {what}, such as {names[0]}"
            )
    return model


@contextmanager
def _quiet(diffusers: Any) -> Iterator[None]:
    """Within the block diffusers does not list what is checked here."""
    logging = diffusers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
