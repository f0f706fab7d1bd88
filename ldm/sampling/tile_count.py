"""How many tiles of a large picture are denoised, for a progress bar: it may be hours of work."""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.autoencoder.tiling import Report
from ldm.diffusion.objectives import Objective
from ldm.randomness import Draws
from ldm.sampling.samplers import Sampler


def calls(sampler: Sampler, objective: Objective, times: Tensor, device: torch.device) -> int:
    """How often a sampler calls its denoiser on the way along `times`, found by letting it go there with zeros."""
    made = 0

    def nothing(x: Tensor, t: Tensor) -> Tensor:
        nonlocal made
        made += 1
        return torch.zeros_like(x)

    sampler(nothing, objective, torch.zeros(1, 1, 1, 1, device=device), times, draws=Draws(0, [0], 1, device))
    return made


def counted(report: Report, total: int) -> Callable[[int], None]:
    """A function of how many tiles more are denoised, of `total`."""
    done = 0

    def count(tiles: int) -> None:
        nonlocal done
        done += tiles
        report("denoising", done, total)

    return count
