"""The frozen autoencoder: images to posterior moments, latents to images; what stage 2 and sampling use of stage 1."""

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
from ldm.errors import ConfigError
from ldm.ranges import Count, Resolution
from ldm.runtime.full_precision import full_precision
from ldm.sizes import SizeError, as_size, nearest, spell
from ldm.weights.digest import weight_hash


class Pixels(nn.Module):
    """The encoder of a model without a first stage: the images themselves, as moments of a point mass."""

    down_factor = 1

    def __init__(self, channels: Count) -> None:
        super().__init__()
        self.in_channels = self.latent_channels = channels

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([images, torch.zeros_like(images)], dim=1)  # (N, 2C, H, W)


class Codec(nn.Module):
    """A frozen encoder and decoder: no gradients, always in eval mode.

    Args:
        encoder: images -> moments, or the latents that `quantizer` takes.
        decoder: latents -> images.
        config: {"encoder": node, "decoder": node}, plus a quantizer's, from which they can be rebuilt; {}: pixels.
        resolution: of the images it was trained on, if known: the side of a square, or (height, width).
        statistics: per-channel {"mean": [...], "std": [...]} of the latents, as measured in stage 1, or, of a converted
            model, as others on it are trained with; or None.
        path: where it was loaded from.
        quantizer: replaces latents by their codes before they are decoded; None: the posterior is Gaussian.
    """

    def __init__(
        self,
        encoder: Encoder | TinyEncoder | Pixels,
        decoder: Decoder | TinyDecoder | nn.Identity,
        config: Mapping[str, Any],
        resolution: Resolution | None = None,
        statistics: Mapping[str, Any] | None = None,
        path: str = "",
        quantizer: VectorQuantizer | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.quantizer = quantizer
        self.register_buffer("_place", torch.zeros(()), persistent=False)  # pixels have no other tensor
        self.config = dict(config)
        self.size = None if resolution is None else as_size(resolution)
        self.statistics = statistics
        self.path = path
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, path: Path | str, trust: Sequence[str] = ()) -> "Codec":
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

    @classmethod
    def pixels(cls, channels: int) -> "Codec":
        """No first stage: latents are the images, (N,C,H,W) in [-1, 1], with zero variance."""
        return cls(Pixels(channels), nn.Identity(), {})

    def train(self, mode: bool = True) -> "Codec":
        """Stays in eval mode, whatever the mode of the enclosing module."""
        return super().train(False)

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
            posterior = self._posterior(self.encoder(images))
        return posterior.mean, posterior.std

    def _posterior(self, output: Tensor) -> Posterior:
        if self.quantizer is not None:
            return self.quantizer(output)
        return DiagonalGaussian(output, deterministic=isinstance(self.encoder, Pixels))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(N,c,h,w), not standardized -> images (N,C,H,W) float32 in [-1, 1]; follows the caller's autocast."""
        latents = latents.to(self.device)
        if self.quantizer is not None:
            latents = self.quantizer(latents).mode()
        images: Tensor = self.decoder(latents)
        return images.float().clamp(-1.0, 1.0)

    def latent_shape(self, resolution: Resolution) -> tuple[int, int, int]:
        """(c, h, w) of the latent of an image; SizeError if a side is not divisible by the down factor."""
        (height, width), factor = as_size(resolution), self.encoder.down_factor
        if height % factor or width % factor:
            raise SizeError(
                f"data.params.resolution: expected a multiple of the autoencoder's down factor {factor}, "
                f"found {spell((height, width))}. Use {nearest((height, width), factor)}.",
                factor,
            )
        return self.encoder.latent_channels, height // factor, width // factor

    def weight_hash(self) -> str:
        """sha256 (hex) over names, shapes and bytes of all weights: the same on every device and from any file."""
        # A codebook is hashed under its first name, by which caches identify their autoencoder.
        named = {name.replace("quantizer.", "quantiser.", 1): tensor for name, tensor in self.state_dict().items()}
        return weight_hash(named)
