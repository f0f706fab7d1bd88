"""The frozen autoencoder: images to posterior moments, latents to images; what stage 2 and sampling use of stage 1."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.autoencoder.networks import Decoder, Encoder
from ldm.autoencoder.posterior import DiagonalGaussian, Posterior
from ldm.autoencoder.quantizer import VectorQuantizer
from ldm.autoencoder.tiny import TinyDecoder, TinyEncoder
from ldm.checkpoints import store
from ldm.config.load import build
from ldm.config.tree import current_plain
from ldm.errors import ConfigError, LdmError
from ldm.ranges import Count, Resolution
from ldm.runtime.full_precision import full_precision
from ldm.sizes import SizeError, as_size, nearest, spell
from ldm.weights.digest import weight_hash

_OF_DIFFUSERS = "ldm.interop.diffusers.FirstStage"
"""Named as a configuration names it, since adapters to other libraries come later in the pipeline."""


class Codec(nn.Module, ABC):
    """A frozen first stage, whatever it is made of: no gradients, always in eval mode.

    `moments` and `pictures` are what kinds of it differ in. How they are called, in which precision and range, is the
    same for all.

    Args:
        channels: of the images and of the latents.
        down_factor: image pixels to one latent position, along either side.
        config: from which it can be made again, in plain values: {"target", "params"} of its class, or the nodes of
            the parts that a run folder holds; {}: pixels. Compared between caches. Whatever else decides its latents
            is added under keys of its own. Parameters leave out `path`, which is not compared.
        path: where it was loaded from; "": from nowhere.
        resolution: of the images it was trained on, if known: the side of a square, or (height, width).
        statistics: per-channel {"mean": [...], "std": [...]} of the latents, as measured in stage 1, or, of a converted
            model, as others on it are trained with; or None.
    """

    def __init__(
        self,
        channels: tuple[Count, Count],
        down_factor: Count,
        config: Mapping[str, Any],
        path: str = "",
        resolution: Resolution | None = None,
        statistics: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.latent_channels = channels
        self.down_factor = down_factor
        self.config = dict(config)
        self.path = path
        self.size = None if resolution is None else as_size(resolution)
        self.statistics = statistics
        self.register_buffer("_place", torch.zeros(()), persistent=False)  # pixels have no other tensor

    @staticmethod
    def load(path: Path | str, trust: Sequence[str] = ()) -> "Codec":
        """What a path to a first stage means, on the CPU.

        Args:
            path: run folder of stage 1 (its newest good checkpoint), checkpoint file, or a folder of diffusers.
            trust: packages besides ldm's own that the checkpoint's configuration may name.

        Raises:
            CheckpointError: missing, damaged, or no first stage.
        """
        if any((Path(path).expanduser() / name).is_file() for name in ("config.json", "model_index.json")):
            return Codec.of({"target": _OF_DIFFUSERS, "params": {}}, path, trust)
        return AutoencoderCodec.load_run(path, trust)

    @staticmethod
    def of(config: Mapping[str, Any], path: Path | str, trust: Sequence[str] = ()) -> "Codec":
        """The codec with this `config`, from `path`; of the parts of a run it is whatever the path holds.

        Raises:
            CheckpointError: missing, damaged, or no first stage.
            ConfigError: its class is not trusted, or is no codec.
        """
        config = current_plain(config)
        if "target" not in config:
            return Codec.load(path, trust)
        params = dict(config.get("params") or {}) | ({"path": str(path)} if path else {})
        codec = build({"target": config["target"], "params": params}, trust, key="autoencoder")
        if not isinstance(codec, Codec):
            raise ConfigError(
                f"autoencoder: expected a class of first stages (ldm/autoencoder/codec.py), found {config['target']}"
            )
        return codec

    @staticmethod
    def pixels(channels: int) -> "Codec":
        """No first stage: latents are the images, (N,C,H,W) in [-1, 1], with zero variance."""
        return Pixels(channels)

    @abstractmethod
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N,C,H,W) float32 in [-1, 1] -> the posterior's mean and std, each (N,c,h,w), not standardized."""

    @abstractmethod
    def pictures(self, latents: Tensor) -> Tensor:
        """(N,c,h,w), not standardized -> images (N,C,H,W), about [-1, 1]."""

    @property
    @abstractmethod
    def deterministic(self) -> bool:
        """Whether the posterior is a point mass, its std zero."""

    @property
    def decoders(self) -> Sequence[nn.Module]:
        """The parts that `pictures` computes with, and `moments` does not; empty where that is not known."""
        return ()

    def train(self, mode: bool = True) -> "Codec":
        """Stays in eval mode, whatever the mode of the enclosing module."""
        return super().train(False)

    def freeze(self) -> None:
        """To be called at the end of a constructor, when all modules are there."""
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return self.get_buffer("_place").device

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior moments in true fp32, whatever autocast or TF32 setting surrounds the call.

        Args:
            images: (N,C,H,W) in [-1, 1], on any device.

        Returns:
            mean and std, each (N,c,h,w) float32 on the codec's device, not standardized.
        """
        images = images.to(self.device, torch.float32)
        with full_precision(self.device.type):
            mean, std = self.moments(images)
        return mean.contiguous(), std.contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(N,c,h,w), not standardized -> images (N,C,H,W) float32 in [-1, 1]; follows the caller's autocast."""
        return self.pictures(latents.to(self.device)).float().clamp(-1.0, 1.0).contiguous()

    def latent_shape(self, resolution: Resolution) -> tuple[int, int, int]:
        """(c, h, w) of the latent of an image; SizeError if a side is not divisible by the down factor."""
        (height, width), factor = as_size(resolution), self.down_factor
        if height % factor or width % factor:
            raise SizeError(
                f"data.params.resolution: expected a multiple of the autoencoder's down factor {factor}, "
                f"found {spell((height, width))}. Use {nearest((height, width), factor)}.",
                factor,
            )
        return self.latent_channels, height // factor, width // factor

    def weight_hash(self) -> str:
        """sha256 (hex) over names, shapes and bytes of all weights: the same on every device and from any file."""
        return weight_hash(self.state_dict())

    def describe(self, weights: str | None = None) -> dict[str, Any]:
        """Which first stage this is, as a cache's plan holds it (ldm/latents/manifest.py::CacheSpec).

        Args:
            weights: what `weight_hash` says, where it is known already.
        """
        return {"weights": weights or self.weight_hash(), "config": self.config, "path": self.path}


class Pixels(Codec):
    """A model without a first stage: the images themselves, as a point mass."""

    deterministic = True

    def __init__(self, channels: Count) -> None:
        super().__init__((channels, channels), 1, {})
        self.freeze()

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, torch.zeros_like(images)

    def pictures(self, latents: Tensor) -> Tensor:
        return latents


class AutoencoderCodec(Codec):
    """An autoencoder of stage 1.

    Args:
        encoder: images -> moments, or the latents that `quantizer` takes.
        decoder: latents -> images.
        config: {"encoder": node, "decoder": node}, plus a quantizer's.
        quantizer: replaces latents by their codes before they are decoded; None: the posterior is Gaussian.
        resolution, statistics, path: as in Codec.
    """

    def __init__(
        self,
        encoder: Encoder | TinyEncoder,
        decoder: Decoder | TinyDecoder,
        config: Mapping[str, Any],
        resolution: Resolution | None = None,
        statistics: Mapping[str, Any] | None = None,
        path: str = "",
        quantizer: VectorQuantizer | None = None,
    ) -> None:
        channels = encoder.in_channels, encoder.latent_channels
        super().__init__(channels, encoder.down_factor, config, path, resolution, statistics)
        self.encoder = encoder
        self.decoder = decoder
        self.quantizer = quantizer
        self.freeze()

    @classmethod
    def load_run(cls, path: Path | str, trust: Sequence[str] = ()) -> "AutoencoderCodec":
        """The codec of a stage-1 checkpoint, on the CPU; builds only its encoder, decoder and quantizer.

        Args:
            path: run folder (its newest good checkpoint) or checkpoint file.
            trust: packages besides ldm's own that the checkpoint's configuration may name.

        Raises:
            CheckpointError: missing, damaged, or not from stage 1.
        """
        verified = store.verify(Path(path))
        state, file = store.load(verified), verified.path
        record = store.facts(state, "autoencoder", file)
        params = current_plain(record["config"], str(file))["model"]["params"]
        config = {name: params[name] for name in ("encoder", "decoder", "quantizer") if params.get(name)}
        try:
            parts = {name: build(node, trust, key=f"model.params.{name}") for name, node in config.items()}
        except ConfigError as error:
            raise ConfigError(f"{file}: in the configuration stored there: {error}") from error
        for name, network in parts.items():
            store.fill(network, state["state_dict"], name, file)
        resolution = record["config"].get("data", {}).get("params", {}).get("resolution")
        about = config, resolution, record.get("latents"), str(file)
        return cls(parts["encoder"], parts["decoder"], *about, parts.get("quantizer"))

    @property
    def deterministic(self) -> bool:
        return self.quantizer is not None

    @property
    def decoders(self) -> Sequence[nn.Module]:
        return (self.decoder,)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        output = self.encoder(images)
        posterior: Posterior = DiagonalGaussian(output) if self.quantizer is None else self.quantizer(output)
        return posterior.mean, posterior.std

    def pictures(self, latents: Tensor) -> Tensor:
        if self.quantizer is not None:
            latents = self.quantizer(latents).mode()
        images: Tensor = self.decoder(latents)
        return images

    def weight_hash(self) -> str:
        # A codebook is hashed under its first name, by which caches identify their autoencoder.
        named = {name.replace("quantizer.", "quantiser.", 1): tensor for name, tensor in self.state_dict().items()}
        return weight_hash(named)

    def describe(self, weights: str | None = None) -> dict[str, Any]:
        # The encoder alone determines the latents: codes are chosen when they are decoded.
        return super().describe(weights) | {"encoder": weight_hash(self.encoder.state_dict())}


def with_encoder(described: Mapping[str, Any], trust: Sequence[str] = ()) -> dict[str, Any]:
    """How a cache's plan describes an autoencoder, with the hash of its encoder.

    Plans from before there was one get it here if the autoencoder is where it was, and still the same.
    """
    known = dict(described)
    if "encoder" in known or not known.get("path") or not known["config"] or "target" in known["config"]:
        return known
    try:
        found = Codec.load(known["path"], trust).describe()
    except LdmError:
        return known
    return found | known if found["weights"] == known["weights"] else known
