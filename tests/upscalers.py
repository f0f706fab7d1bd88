"""Models of super-resolution as run folders of random weights: one whose layers see few pixels around, and a UNet."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.autoencoder.codec import Codec
from ldm.autoencoder.losses import AutoencoderLoss
from ldm.autoencoder.module import AutoencoderKL
from ldm.config.load import build
from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.module import LatentDiffusion
from ldm.latents.manifest import CacheSpec, Manifest
from ldm.optim.ema import EMA, FixedDecay
from tests.tiny_runs import ADAM, node, save_run


class Local(nn.Module):
    """A network of one convolution: 1 latent position around, no norm, no attention."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels + 3, channels, 3, padding=1)
        self.level = nn.Linear(128, channels)

    def forward(self, x: Tensor, noise_level: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.vector is not None
        return torch.tanh(self.conv(conditioning.beside(x)) + self.level(conditioning.vector)[..., None, None])


def save_tiny_autoencoder(folder: Path) -> Path:
    """An f2 of convolutions alone."""
    torch.manual_seed(0)
    sizes = {"channels": 8, "num_blocks": [1, 1]}
    params = {name: node(f"autoencoder.tiny.Tiny{name.title()}", **sizes) for name in ("encoder", "decoder")}
    module = AutoencoderKL(build(params["encoder"]), build(params["decoder"]), AutoencoderLoss(), ADAM)
    with torch.no_grad():  # gray with much in it, in place of nearly black
        module.decoder.conv_out.weight *= 10
        module.decoder.conv_out.bias.fill_(0.5)
    return save_run(folder, module, {"kind": "autoencoder", "config": {"model": {"params": params}}, "latents": None})


def local() -> dict[str, Any]:
    """The node of `Local`."""
    return {"target": "tests.upscalers.Local", "params": {}}


def unet() -> dict[str, Any]:
    """The node of a UNet that halves the latent once, for small pictures of the latent's size."""
    sizes: dict[str, Any] = {"model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1}
    sizes |= {"attention_levels": [1], "num_heads": 2, "spatial_channels": 3, "vector_channels": 128}
    return node("diffusion.networks.unet.UNet", in_channels=4, **sizes)


def save_upscaler(
    folder: Path, autoencoder: Path, network: dict[str, Any], size: int, factor: int = 4, most: float = 0.5
) -> Path:
    """A model that makes pictures `factor` times as large, trained, it says, on `size` pixels.

    Args:
        most: the highest level of noise on small pictures; 0: none.
    """
    torch.manual_seed(1)
    codec = Codec.load(autoencoder)
    fold = codec.down_factor // factor or 1  # a small picture that is larger than the latent
    network["params"] |= {"spatial_channels": 3 * fold**2} if fold > 1 else {}
    network["params"] |= {"vector_channels": None} if most == 0 else {}
    params = {
        "network": network,
        "conditioner": node("diffusion.conditioners.low_resolution.LowResolution", most=most, fold=fold),
        "objective": node(
            "diffusion.objectives.DDPM",
            schedule=node("diffusion.noise_schedules.SqrtLinear"),
            prediction=node("diffusion.predictions.X0"),
        ),
    }
    parts = [build(params[name], ["tests"]) for name in ("network", "conditioner", "objective")]
    module = LatentDiffusion(*parts, optimizer=ADAM, ema=partial(EMA, profile=FixedDecay()))
    for denoiser in (module.denoiser, module.ema.average):
        for weight in denoiser.parameters():
            if weight.ndim > 1 and not weight.any():
                nn.init.normal_(weight.data, std=0.05)
    plan = CacheSpec(
        shape=codec.latent_shape(size),
        num_items=10,
        source="",
        pixels={"resolution": size, "channels": 3},
        autoencoder=codec.describe() | {"path": str(autoencoder)},
        num_classes=None,
        class_names=None,
    )
    manifest = Manifest(plan, mean=[0.0] * 4, std=[1.0] * 4, broken=[], shards=[])
    return save_run(
        folder,
        module,
        {
            "kind": "diffusion",
            "config": {"model": {"params": params}},
            "latents": manifest.to_dict(),
            "data": {"drawn": {"low_resolution": {"factor": factor}}},
        },
    )
