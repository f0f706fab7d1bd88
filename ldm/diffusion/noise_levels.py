"""Which noise levels training visits: maps stratified uniforms (N,) in [0, 1) to (N,) places on the objective's scale.

For DDPM and flows a place is the fraction of the way from data (0) to noise (1); for EDM it is the standard deviation
of the noise itself.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from ldm.ranges import Count, Finite, Positive
from ldm.runtime.float64 import double


class NoiseLevels(Protocol):
    """The quantile function of a distribution of noise levels."""

    in_sigma: bool
    """Whether a place is the standard deviation of the noise rather than a fraction of the way."""

    def __call__(self, uniform: Tensor) -> Tensor: ...


class Uniform:
    """The uniform distribution."""

    in_sigma = False

    def __call__(self, uniform: Tensor) -> Tensor:
        return uniform


class LogitNormal:
    """logit(place) is normal: favors the middle (Esser et al. 2024, "Scaling Rectified Flow Transformers", eq. 19)."""

    in_sigma = False

    def __init__(self, mean: Finite = 0.0, std: Positive = 1.0) -> None:
        self.mean, self.std = mean, std

    def __call__(self, uniform: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * _normal(uniform))


class LogNormal:
    """ln(sigma) is normal (Karras et al. 2022, "EDM", whose values are the defaults; EDM2: -0.4 and 1.0)."""

    in_sigma = True

    def __init__(self, mean: Finite = -1.2, std: Positive = 1.2) -> None:
        self.mean, self.std = mean, std

    def __call__(self, uniform: Tensor) -> Tensor:
        return torch.exp(self.mean + self.std * _normal(uniform))


class Shifted:
    """Another distribution of places, shifted toward noise: larger latents need more of it to hide the same content.

    place -> s place / (1 + (s - 1) place) with s = sqrt(dimensions / 4096) (Esser et al. 2024, eq. 23; Ma et al. 2025).
    On a straight path that multiplies sigma / alpha by s, so a place that is itself a sigma becomes s sigma.

    Args:
        dimensions: number of values in one latent, c h w.
        levels: the distribution to shift.
    """

    def __init__(self, dimensions: Count, levels: NoiseLevels) -> None:
        self.shift = math.sqrt(dimensions / 4096)
        self.levels = levels
        self.in_sigma = levels.in_sigma

    def __call__(self, uniform: Tensor) -> Tensor:
        place = self.levels(uniform)
        return self.shift * place if self.in_sigma else shifted(place, self.shift)


def shifted(place: Tensor, shift: float) -> Tensor:
    """place in [0, 1] -> shift place / (1 + (shift - 1) place), which keeps 0 and 1."""
    return shift * place / (1 + (shift - 1) * place)


def _normal(uniform: Tensor) -> Tensor:
    """The standard normal's quantile; at most 5.3 standard deviations from the middle, so that all stays finite."""
    return torch.special.ndtri(double(uniform).clamp(5e-8, 1 - 5e-8)).to(uniform.dtype).to(uniform.device)
