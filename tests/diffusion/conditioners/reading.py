"""A denoiser that sees nothing but noise, so that it can only succeed by reading its condition."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.conditioners.base import Conditioner
from ldm.diffusion.networks.unet import UNet
from ldm.diffusion.objectives import Flow, Network
from ldm.normals import GeneratorPerRow
from ldm.randomness import Draws

Batch = dict[str, Any]


def unet(channels: int, **slots: int) -> UNet:
    """Of one level, which takes seconds."""
    return UNet(channels, 16, channel_mult=[1], num_res_blocks=1, attention_levels=[], num_heads=1, **slots)


def errors(
    network: Network,
    conditioner: Conditioner,
    make: Callable[[torch.Generator], Batch],
    steps: int = 250,
    where: Callable[[Batch], Tensor] = lambda batch: torch.ones(()),
    lr: float = 1e-2,
) -> tuple[float, float]:
    """Mean square errors of what it makes of pure noise, in units of the latents' variance: told, told of another row.

    Args:
        make: the rows of a batch, whose `latent` is a function of its other values.
        where: (N, 1, h, w), 1 where the error counts.
    """
    objective, random = Flow(), torch.Generator().manual_seed(0)
    both = torch.nn.ModuleList([network, conditioner]).train()
    optimizer = torch.optim.Adam(both.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1)
    for step in range(steps + 1):
        batch = make(random)
        n = len(batch["latent"])
        # So few steps suffice with some noise alone, whatever makes it: with this they do.
        batch["draws"] = Draws(0, range(step * n, step * n + n), n, normals=GeneratorPerRow())
        if step == steps:
            break
        optimizer.zero_grad()
        objective.loss(network, batch["latent"], conditioner(batch), batch["draws"]).mean().backward()
        optimizer.step()
        schedule.step()
    both.eval()
    x0, counts = batch["latent"], where(batch).expand_as(batch["latent"])
    noise = torch.randn(x0.shape, generator=random)
    wrong = {key: value.roll(1, 0) if isinstance(value, Tensor) else value for key, value in batch.items()}
    found = []
    with torch.no_grad():
        for told in (batch, wrong):
            made = objective.denoise(network, noise, torch.tensor(1.0), conditioner(told))
            found.append(float(((made - x0).square() * counts).sum() / counts.sum() / x0.var()))
    return found[0], found[1]
