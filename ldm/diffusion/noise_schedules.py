"""How fast DDPM's signal fades: betas(steps) -> (steps,) float64, the variances of the individual noising steps."""

import math
from typing import Protocol

import numpy as np

from ldm.errors import ConfigError
from ldm.ranges import FractionAboveZero, NotNegative


class NoiseSchedule(Protocol):
    """The noising steps x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise of DDPM (Ho et al. 2020, eq. 2)."""

    def betas(self, steps: int) -> np.ndarray: ...


class Linear:
    """beta linear in t (Ho et al. 2020)."""

    def __init__(self, start: FractionAboveZero = 1e-4, end: FractionAboveZero = 0.02) -> None:
        self.start, self.end = _rising(start, end)

    def betas(self, steps: int) -> np.ndarray:
        return np.linspace(self.start, self.end, steps)


class SqrtLinear:
    """sqrt(beta) linear in t: the "linear" of latent diffusion's code; 0.0015..0.0195 for its f4 and f8 models."""

    def __init__(self, start: FractionAboveZero = 0.0015, end: FractionAboveZero = 0.0195) -> None:
        self.start, self.end = _rising(start, end)

    def betas(self, steps: int) -> np.ndarray:
        return np.linspace(math.sqrt(self.start), math.sqrt(self.end), steps) ** 2


def _rising(start: float, end: float) -> tuple[float, float]:
    if not start <= end:
        raise ConfigError(f"noise schedule: expected start <= end, found {start:g} and {end:g}")
    return start, end


class Cosine:
    """alpha falls as a quarter period of a cosine (Nichol and Dhariwal 2021, eq. 17)."""

    def __init__(self, offset: NotNegative = 0.008, largest_beta: FractionAboveZero = 0.999) -> None:
        self.offset, self.largest_beta = offset, largest_beta

    def betas(self, steps: int) -> np.ndarray:
        place = (np.arange(steps + 1) / steps + self.offset) / (1 + self.offset)
        squared_alpha = np.cos(place * math.pi / 2) ** 2
        return np.minimum(1 - squared_alpha[1:] / squared_alpha[:-1], self.largest_beta)


class ZeroTerminal:
    """Another schedule, its alphas shifted and rescaled so that no signal is left at the last level.

    Lin et al. 2024, algorithm 1. The first alpha is kept. At the last level the noise carries no information about the
    data, so the network must not predict it: use V or X0.

    Args:
        schedule: the schedule to change.
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule

    def betas(self, steps: int) -> np.ndarray:
        alpha = np.sqrt(np.cumprod(1 - self.schedule.betas(steps)))
        first, last = alpha[0], alpha[-1]
        alpha = (alpha - last) * first / (first - last)
        before = np.concatenate([[1.0], alpha[:-1]])
        return 1 - (alpha / before) ** 2
