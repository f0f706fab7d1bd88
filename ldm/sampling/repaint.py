"""Inpainting that goes back and forth, so that what is new agrees with what is kept (Lugmayr et al. 2022, "RePaint").

A model that was trained without masks knows what is kept only as far as it shows through the noise: at high noise it
decides alone. Going back to more noise and down again lets it decide anew beside its own, better, surroundings.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.objectives import Objective
from ldm.errors import ConfigError
from ldm.randomness import Draws, keys
from ldm.sampling.guidance import Denoiser
from ldm.sampling.samplers import Sampler


@dataclass(frozen=True)
class RePaint:
    """A sampler that takes each `jump` steps of another one `resamplings` times, adding the noise of them in between.

    As in the paper the first of these stretches, from noise alone, is taken once, and all others as often as said: a
    call of the network for every step of each. A sampler that remembers its former steps begins anew with each stretch,
    and what it does by the number of steps (`s_churn` of heun) goes by those of a stretch.

    Args:
        sampler: of samplers.py.
        resamplings: 1: `sampler` itself.
        jump: steps, fewer than there are.

    Raises:
        ConfigError: none of either; when it is called, no more steps than `jump`.
    """

    sampler: Sampler
    resamplings: int = 10
    jump: int = 10

    def __post_init__(self) -> None:
        for name in ("resamplings", "jump"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected 1 or more, found {getattr(self, name)}")

    def require(self, steps: int) -> None:
        """ConfigError unless there are more steps than `jump`."""
        if self.resamplings > 1 and self.jump >= steps:
            raise ConfigError(
                f"jump {self.jump}: expected fewer than the {steps} steps that are taken, since the first stretch of "
                f"them, from noise alone, is taken once; use more steps, or a smaller jump"
            )

    @torch.no_grad()
    def __call__(self, denoise: Denoiser, objective: Objective, x: Tensor, times: Tensor, *, draws: Draws) -> Tensor:
        if self.resamplings == 1:
            return self.sampler(denoise, objective, x, times, draws=draws)
        steps, taken = len(times) - 1, 0
        self.require(steps)
        # The first stretch has what is left over, so that the last, to the data, is a whole one.
        for end in range(steps % self.jump or self.jump, steps + 1, self.jump):
            stretch = times[max(0, end - self.jump) : end + 1]
            for again in range(self.resamplings if end > self.jump else 1):
                fresh = _apart(draws, taken)
                if again:
                    noise = fresh.normal("back", x.shape[1:])
                    x = noisier(objective, x, stretch[-1], stretch[0], noise)
                x = self.sampler(denoise, objective, x, stretch, draws=fresh)
                taken += 1
        return x


def noisier(objective: Objective, x: Tensor, s: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """From time s back to t > s: a sample of q(x_t | x_s), of any path (() times on the host)."""
    kept = objective.alpha(t) / objective.alpha(s)
    added = objective.sigma(t) ** 2 - (kept * objective.sigma(s)) ** 2
    return kept * x + added.clamp(min=0).sqrt() * noise


def _apart(draws: Draws, number: int) -> Draws:
    """Draws of the same rows, independent for each `number`."""
    seed = int(keys(draws.seed, "resampling", number)[0])
    return Draws(seed, draws.numbers, draws.batch_size, draws.device, draws.first, draws.normals)
