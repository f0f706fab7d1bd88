"""Where the steps of a sampler lie: f(objective, steps, shape, ...) -> (steps + 1,) times.

The times are on the host and decrease strictly, from the objective's last noise level to 0 (only `compvis` starts and
ends slightly inside that range); `shape` (c,h,w) is that of the latents.

Every public function of this file is a schedule: `--schedule` finds it by its name, with its other parameters as
settings (`--schedule karras rho=5`), and a configuration names it as `{target: ldm.sampling.timesteps.karras,
partial: true}`. All raise ConfigError for an invalid number of steps.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from ldm.diffusion.noise_levels import shifted as shifted_toward_noise
from ldm.diffusion.objectives import Objective
from ldm.diffusion.paths import DiscreteVP
from ldm.errors import ConfigError
from ldm.ranges import Positive

Shape = tuple[int, int, int]


class TimestepSchedule(Protocol):
    """Raises ConfigError for an invalid number of steps."""

    def __call__(self, objective: Objective, steps: int, shape: Shape) -> Tensor: ...


def default(objective: Objective, steps: int, shape: Shape) -> Tensor:
    """The objective's own: evenly spaced integer times for DDPM, Karras' for EDM, evenly spaced times for flows."""
    return objective.timesteps(steps)


def uniform(objective: Objective, steps: int, shape: Shape) -> Tensor:
    """Evenly spaced times."""
    return _times(objective, _places(objective, steps))


def quadratic(objective: Objective, steps: int, shape: Shape) -> Tensor:
    """Times proportional to the square of their place, finer near the data (Song et al. 2021, appendix D.2)."""
    return _times(objective, _places(objective, steps) ** 2)


def shifted(objective: Objective, steps: int, shape: Shape, shift: Positive | None = None) -> Tensor:
    """Even places, shifted toward noise for large latents: s place / (1 + (s - 1) place) (Esser et al. 2024).

    Args:
        shift: s, above 1 toward noise; None: sqrt(c h w / 4096), which is 1 for the latents of 256-pixel images of the
            published f8 autoencoders.
    """
    if shift is None:
        shift = math.sqrt(math.prod(shape) / 4096)
    return _times(objective, shifted_toward_noise(_places(objective, steps), shift))


def karras(
    objective: Objective,
    steps: int,
    shape: Shape,
    ratio_min: Positive = 0.002,
    ratio_max: Positive = 80.0,
    rho: Positive = 7.0,
) -> Tensor:
    """Even steps in ratio^(1/rho), with ratio = sigma / alpha (Karras et al. 2022, eq. 5), for any objective.

    Args:
        ratio_min: the second-to-last, or that of the first of an objective's discrete levels, below which its network
            was not trained; the last is 0.
        ratio_max: where the steps begin, or the objective's last level, if that has a lower one; an objective whose
            last level has a higher one, such as pure noise, begins there instead.
        rho: the larger, the more steps lie near the data.
    """
    if not ratio_min < ratio_max:
        raise ConfigError(f"timesteps: expected ratio_min < ratio_max, found {ratio_min:g} and {ratio_max:g}")
    objective.timesteps(steps)  # refuses an invalid number
    if isinstance(objective.path, DiscreteVP):
        first = torch.tensor(1.0)
        ratio_min = max(ratio_min, float(objective.sigma(first) / objective.alpha(first)))
    last = torch.tensor(objective.t_max)
    largest = min(ratio_max, float(objective.sigma(last) / objective.alpha(last)))
    if not ratio_min < largest:
        raise ConfigError(
            f"timesteps: expected ratio_min below {largest:g}, the largest ratio of this objective, found {ratio_min:g}"
        )
    ends = largest ** (1 / rho), ratio_min ** (1 / rho)
    place = torch.arange(steps, dtype=torch.float64) / max(1, steps - 1)
    ratios = (ends[0] + place * (ends[1] - ends[0])) ** rho
    times = objective.time_at(ratios.float())
    times[0] = last
    return _checked(torch.cat([times, torch.zeros(1)]))


def compvis(objective: Objective, steps: int, shape: Shape) -> Tensor:
    """The times of latent diffusion's own DDIM sampler: every (T / steps)th level from the second on, then the first.

    For T = 1000 and 50 steps it is 982, 962, ..., 22, 2, 1, whereas `default` has 1000, 980, ..., 20, 0: the original
    starts from pure noise at a level that should still hold some signal, and leaves the noise of the first level in the
    image. Choose it to reproduce published samples number for number.

    Raises:
        ConfigError: the objective has no discrete levels, or the steps do not divide their number.
    """
    if not isinstance(objective.path, DiscreteVP):
        raise ConfigError(
            f"timesteps: compvis needs discrete levels (DDPM), which {type(objective.path).__name__} lacks; "
            f"choose another"
        )
    levels = objective.path.steps
    objective.timesteps(steps)  # refuses what cannot be
    stride = levels // steps
    if levels % steps or stride == 1:
        theirs = range(1, levels + 1, stride)  # levels counted from 0
        fate = f"makes {len(theirs)}" if theirs[-1] < levels else f"fails at level {levels} of 0 to {levels - 1}"
        divisors = [number for number in range(1, levels) if levels % number == 0]
        near = sorted(sorted(divisors, key=lambda number: abs(number - steps))[:2])
        raise ConfigError(
            f"sampling steps: the schedule compvis expects a proper divisor of {levels}; found {steps}, "
            f"of which the original {fate}. Near it are {' and '.join(map(str, near))}."
        )
    return torch.tensor([*range(levels - stride + 2, 1, -stride), 1], dtype=torch.float32)


def _places(objective: Objective, steps: int) -> Tensor:
    """(steps + 1,) evenly spaced fp64 numbers from 1 to 0."""
    objective.timesteps(steps)  # refuses an invalid number
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def _times(objective: Objective, places: Tensor) -> Tensor:
    """(steps + 1,) times at `places` from 1 to 0; of discrete levels none below the first, but the last, 0."""
    times = places * objective.t_max
    if isinstance(objective.path, DiscreteVP) and times[-2] < 1:
        times[:-1] = 1 + (objective.t_max - 1) * (places[:-1] - places[-2]) / (1 - places[-2])
    return _checked(times.float())


def _checked(times: Tensor) -> Tensor:
    if not bool((times.diff() < 0).all()):
        raise ConfigError(
            f"sampling steps: {len(times) - 1} steps are too many for this schedule; two of its times are equal"
        )
    return times
