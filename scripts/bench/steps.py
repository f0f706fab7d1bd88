"""The time of a training step of ours beside diffusers' networks of the same size in the usual loop.

The same LPIPS (random VGG16), discriminator, optimizer and batch, in turn, so that a busy machine slows both. The usual
autoencoder step is VQGAN's: one forward for the generator and its adaptive adversarial weight, another for the
discriminator.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.autoencoder.discriminator import PatchDiscriminator
from ldm.autoencoder.losses import AutoencoderLoss
from ldm.autoencoder.lpips import LPIPS
from ldm.autoencoder.networks import Decoder, Encoder
from ldm.autoencoder.posterior import DiagonalGaussian
from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.networks.unet import UNet
from ldm.diffusion.noise_schedules import SqrtLinear
from ldm.diffusion.objectives import DDPM
from ldm.evaluation.report import markdown
from ldm.randomness import Draws
from ldm.runtime.precision import computes_bf16
from scripts.bench.hardware import hardware

Step = Callable[[], None]
Optimizer = partial(torch.optim.AdamW, lr=1e-4, betas=(0.5, 0.9), fused=True)


@dataclass(frozen=True)
class Size:
    """Of the networks compared. The autoencoder is of the kl-f4 kind, the UNet has attention at its last level."""

    resolution: int = 64
    images: int = 8
    autoencoder: int = 64
    latents: int = 64
    unet: int = 96
    multipliers: tuple[int, ...] = (1, 2, 4)
    blocks: int = 2


TINY = Size(resolution=32, images=2, autoencoder=32, latents=2, unet=32, multipliers=(1, 2), blocks=1)


class Contestant(NamedTuple):
    parameters: int
    step: Step


def count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def our_autoencoder(size: Size, images: Tensor, perceptual: nn.Module) -> Contestant:
    """One forward and one backward for both optimizers (ldm/autoencoder/losses.py)."""
    encoder = Encoder(3, size.autoencoder, size.multipliers, size.blocks, latent_channels=4).to(images.device)
    decoder = Decoder(3, size.autoencoder, size.multipliers, size.blocks, latent_channels=4).to(images.device)
    critic = PatchDiscriminator()
    loss = AutoencoderLoss(perceptual, discriminator=critic, disc_start=0).to(images.device)
    generator = Optimizer([*encoder.parameters(), *decoder.parameters(), loss.logvar])
    discriminator = Optimizer(critic.parameters())

    def step() -> None:
        posterior = DiagonalGaussian(encoder(images).float())
        reconstruction = decoder(posterior.sample(torch.randn_like(posterior.mean)))
        total, _ = loss(images, reconstruction, posterior, decoder.last_layer, 0)
        total.backward()
        for optimizer in (discriminator, generator):
            optimizer.step()
            optimizer.zero_grad()

    return Contestant(count(encoder, decoder), step)


def usual_autoencoder(size: Size, images: Tensor, perceptual: nn.Module) -> Contestant:
    """diffusers' AutoencoderKL in the two passes of the usual code."""
    levels = len(size.multipliers)
    model: Any = diffusers.AutoencoderKL(
        block_out_channels=[size.autoencoder * multiplier for multiplier in size.multipliers],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=size.blocks,
        latent_channels=4,
        norm_num_groups=min(32, size.autoencoder // 4),
    )
    model.to(images.device)
    critic = PatchDiscriminator().to(images.device)
    logvar = nn.Parameter(torch.zeros((), device=images.device))
    generator, discriminator = Optimizer([*model.parameters(), logvar]), Optimizer(critic.parameters())
    last = model.decoder.conv_out.weight

    def forward() -> tuple[Tensor, Any]:
        posterior = model.encode(images).latent_dist
        return model.decode(posterior.sample()).sample, posterior

    def step() -> None:
        critic.requires_grad_(False)
        reconstruction, posterior = forward()
        error = (images - reconstruction).abs() + perceptual(images, reconstruction)[:, None, None, None]
        nll = (error / logvar.exp() + logvar).sum() / len(images)
        fooled = -critic(reconstruction).mean()
        ours, theirs = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (nll, fooled))
        weight = (ours / (theirs + 1e-4)).clamp(0, 1e4).detach()
        (nll + 1e-6 * posterior.kl().mean() + 0.5 * weight * fooled).backward()
        generator.step()
        generator.zero_grad()
        critic.requires_grad_(True)
        reconstruction, _ = forward()
        real, fake = critic(images), critic(reconstruction.detach())
        (0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())).backward()
        discriminator.step()
        discriminator.zero_grad()

    return Contestant(count(model), step)


def our_unet(size: Size, latents: Tensor) -> Contestant:
    last = len(size.multipliers) - 1
    network = UNet(4, size.unet, size.multipliers, size.blocks, attention_levels=[last], num_heads=4).to(latents.device)
    objective, optimizer = DDPM(SqrtLinear()), Optimizer(network.parameters())
    draws = Draws(0, range(len(latents)), len(latents), latents.device)

    def step() -> None:
        objective.loss(network, latents, Conditioning(), draws).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return Contestant(count(network), step)


def usual_unet(size: Size, latents: Tensor) -> Contestant:
    plain = len(size.multipliers) - 1
    network: Any = diffusers.UNet2DModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=[size.unet * multiplier for multiplier in size.multipliers],
        layers_per_block=size.blocks,
        down_block_types=["DownBlock2D"] * plain + ["AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D"] + ["UpBlock2D"] * plain,
        attention_head_dim=size.unet * size.multipliers[-1] // 4,
        norm_num_groups=min(32, size.unet // 4),
    )
    network.to(latents.device)
    scheduler: Any = diffusers.DDPMScheduler()
    optimizer = Optimizer(network.parameters())

    def step() -> None:
        noise = torch.randn_like(latents)
        t = torch.randint(0, 1000, (len(latents),), device=latents.device)
        F.mse_loss(network(scheduler.add_noise(latents, noise, t), t).sample.float(), noise).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Contestant(count(network), step)


def seconds(contestants: Sequence[Contestant], device: str, bf16: bool, repeats: int) -> list[list[float]]:
    """Of each contestant's steps, taken in turn; the first two of each are not counted."""
    taken: list[list[float]] = [[] for _ in contestants]
    for _ in range(repeats + 2):
        for contestant, times in zip(contestants, taken, strict=True):
            start = time.perf_counter()
            with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bf16):
                contestant.step()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return [times[2:] for times in taken]


def steps(options: Any) -> str:
    """The table of `bench steps`."""
    size, device = TINY if options.tiny else Size(), options.device
    images = torch.rand(size.images, 3, size.resolution, size.resolution, device=device) * 2 - 1
    latents = torch.randn(size.latents, 4, size.resolution // 4, size.resolution // 4, device=device)
    perceptual = LPIPS().to(device)
    autoencoders = [make(size, images, perceptual) for make in (our_autoencoder, usual_autoencoder)]
    unets = [make(size, latents) for make in (our_unet, usual_unet)]
    pairs = {
        f"autoencoder, {size.images} x {size.resolution} px": autoencoders,
        f"UNet, {size.latents} x {latents.shape[-1]} px": unets,
    }
    rows = []
    native, reason = computes_bf16(device.split(":")[0])
    for name, pair in pairs.items():
        for bf16 in (False, True) if native else (False,):
            times = seconds(pair, device, bf16, options.repeats)
            ratio = statistics.median(times[1]) / statistics.median(times[0])
            sizes = " / ".join(f"{contestant.parameters / 1e6:.2f}" for contestant in pair)
            rows.append([name, "bf16" if bf16 else "fp32", *map(spread, times), f"{ratio:.2f}", sizes])
    header = ["step", "precision", "ldm, ms (min to max)", "diffusers, ms (min to max)", "ratio", "parameters, M"]
    left_out = "" if native else f"; without bf16: {reason}"
    return f"{hardware(device)}; medians of {options.repeats}{left_out}\n\n{markdown(header, rows)}"


def spread(times: Sequence[float]) -> str:
    return f"{statistics.median(times) * 1e3:.0f} ({min(times) * 1e3:.0f} to {max(times) * 1e3:.0f})"
