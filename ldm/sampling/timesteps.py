"""The timesteps of a sampler: schedule(objective, steps) -> (steps + 1,) strictly decreasing times on the host, from
the objective's last noise level to 0. (Only `CompVis` starts and ends slightly inside that range.)"""

from typing import Protocol

import torch
from torch import Tensor

from ldm.diffusion.noise_levels import shifted
from ldm.diffusion.objectives import Objective
from ldm.diffusion.paths import DiscreteVP
from ldm.errors import ConfigError
from ldm.ranges import Positive


class TimestepSchedule(Protocol):
    """Raises ConfigError for an invalid number of steps."""

    def __call__(self, objective: Objective, steps: int) -> Tensor: ...


class Default:
    """The objective's own: evenly spaced integer times for DDPM, Karras' for EDM, evenly spaced times for flows."""

    def __call__(self, objective: Objective, steps: int) -> Tensor:
        return objective.timesteps(steps)


class Power:
    """t proportional to (place)^power: 1 is uniform, 2 quadratic (Song et al. 2021, appendix D.2: finer near data)."""

    def __init__(self, power: Positive) -> None:
        self.power = power

    def __call__(self, objective: Objective, steps: int) -> Tensor:
        objective.timesteps(steps)  # refuses what cannot be
        return _times(objective, torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** self.power)


class Shift:
    """Even places, shifted toward noise for large latents: s place / (1 + (s - 1) place) (Esser et al. 2024)."""

    def __init__(self, shift: Positive) -> None:
        self.shift = shift

    def __call__(self, objective: Objective, steps: int) -> Tensor:
        objective.timesteps(steps)
        return _times(objective, shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), self.shift))


class Karras:
    """Even steps in ratio^(1/rho), with ratio = sigma / alpha (Karras et al. 2022, eq. 5), for any objective.

    Args:
        ratio_min: the second-to-last; the last is 0.
        ratio_max: the second, if the objective starts from pure noise; otherwise its last level comes first.
        rho: the larger, the more steps lie near the data.
    """

    def __init__(self, ratio_min: Positive = 0.002, ratio_max: Positive = 80.0, rho: Positive = 7.0) -> None:
        if not ratio_min < ratio_max:
            raise ConfigError(f"timesteps: expected ratio_min < ratio_max, found {ratio_min:g} and {ratio_max:g}")
        self.ratio_min, self.ratio_max, self.rho = ratio_min, ratio_max, rho

    def __call__(self, objective: Objective, steps: int) -> Tensor:
        objective.timesteps(steps)
        last = torch.tensor(objective.t_max)
        largest = min(self.ratio_max, float(objective.sigma(last) / objective.alpha(last)))
        ends = largest ** (1 / self.rho), self.ratio_min ** (1 / self.rho)
        place = torch.arange(steps, dtype=torch.float64) / max(1, steps - 1)
        ratios = (ends[0] + place * (ends[1] - ends[0])) ** self.rho
        times = objective.time_at(ratios.float())
        times[0] = last
        return _checked(torch.cat([times, torch.zeros(1)]))


class CompVis:
    """The times of latent diffusion's own DDIM sampler: every (T / steps)th level from the second on, then the first.

    For T = 1000 and 50 steps it is 982, 962, ..., 22, 2, 1, whereas `Default` has 1000, 980, ..., 20, 0: the original
    starts from pure noise at a level that should still hold some signal, and leaves the noise of the first level in the
    image. Choose it to reproduce published samples number for number.
    """

    def __call__(self, objective: Objective, steps: int) -> Tensor:
        """Raises ConfigError for an objective without discrete levels, or steps that do not divide their number."""
        if not isinstance(objective.path, DiscreteVP):
            raise ConfigError(
                f"timesteps: CompVis needs discrete levels (DDPM), which {type(objective.path).__name__} lacks; "
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
                f"sampling steps: the schedule CompVis expects a proper divisor of {levels}; found {steps}, "
                f"of which the original {fate}. Near it are {' and '.join(map(str, near))}."
            )
        return torch.tensor([*range(levels - stride + 2, 1, -stride), 1], dtype=torch.float32)


def _times(objective: Objective, places: Tensor) -> Tensor:
    return _checked((places * objective.t_max).float())


def _checked(times: Tensor) -> Tensor:
    if not bool((times.diff() < 0).all()):
        raise ConfigError(
            f"sampling steps: {len(times) - 1} steps are too many for this schedule; two of its times are equal"
        )
    return times
