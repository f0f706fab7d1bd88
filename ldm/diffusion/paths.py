"""Probability paths from data to noise: x_t = alpha(t) x0 + sigma(t) noise, from t = 0 (data) to t = `t_max`.

Times are float32, () or (N,), on any device; results have the same shape.
"""

import math
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.noise_schedules import NoiseSchedule
from ldm.errors import ConfigError
from ldm.ranges import Count, FractionAboveZero, Positive
from ldm.runtime.float64 import double


class ProbabilityPath(Protocol):
    """alpha, sigma and what depends on their times; alpha falls and sigma rises from t = 0 to t = `t_max`."""

    t_max: float
    """The last noise level, where sampling starts."""
    vlb_step: float
    """The size in t of the steps that the variational bound sums over."""
    in_sigma: bool
    """Whether training draws its places as noise levels sigma (noise_levels.py)."""

    def alpha(self, t: Tensor) -> Tensor: ...

    def sigma(self, t: Tensor) -> Tensor: ...

    def time_at(self, ratio: Tensor) -> Tensor:
        """The t at which sigma / alpha is `ratio`; `t_max` for ratios beyond the end of the path."""
        ...

    def to_time(self, place: Tensor) -> Tensor:
        """The time that corresponds to `place`, on the scale that training draws from (noise_levels.py)."""
        ...

    def c_noise(self, t: Tensor) -> Tensor:
        """How t is given to the network."""
        ...

    def c_in(self, t: Tensor) -> Tensor:
        """What the network's input is multiplied by."""
        ...

    def timesteps(self, steps: int) -> Tensor:
        """(steps + 1,) strictly decreasing times on the host, `t_max` first, 0 last: where samplers stop by default."""
        ...


class Smooth(ProbabilityPath, Protocol):
    """A path whose velocity has a closed form (predictions.py: PathVelocity)."""

    def slopes(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """d alpha / dt and d sigma / dt at the time with this alpha and sigma; the same shape."""
        ...


class DiscreteVP:
    """DDPM's path (Ho et al. 2020): alpha^2 + sigma^2 = 1 at `steps` levels, t = 1 .. steps; linear between them.

    Args:
        schedule: how fast the signal fades.
        steps: T, the number of noise levels.
    """

    vlb_step = 1.0
    in_sigma = False

    def __init__(self, schedule: NoiseSchedule, steps: Count = 1000) -> None:
        self.schedule = schedule
        self.steps = steps
        self.t_max = float(steps)
        squared_alpha = np.concatenate([[1.0], np.cumprod(1 - schedule.betas(steps))])  # t = 0..T
        # Not module buffers: those would follow .to(bfloat16), and a bf16 model still needs these in full precision.
        self._tables = {"alpha": np.sqrt(squared_alpha), "sigma": np.sqrt(1 - squared_alpha)}
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    def alpha(self, t: Tensor) -> Tensor:
        return self._look_up("alpha", t)

    def sigma(self, t: Tensor) -> Tensor:
        return self._look_up("sigma", t)

    def time_at(self, ratio: Tensor) -> Tensor:
        alpha, sigma = self._tables["alpha"], self._tables["sigma"]
        wanted = np.minimum(double(ratio).cpu().numpy(), 1e30)
        with np.errstate(divide="ignore"):  # at the last level there may be no signal left
            above = np.searchsorted(sigma / alpha, wanted).clip(1, self.steps)
        # alpha and sigma are linear between two levels, so ratio * alpha - sigma is too; its root is the time.
        low, high = (wanted * alpha[level] - sigma[level] for level in (above - 1, above))
        return torch.as_tensor(above - 1 + (low / (low - high)).clip(0, 1), dtype=torch.float32, device=ratio.device)

    def to_time(self, place: Tensor) -> Tensor:
        return (place * self.steps).floor().add(1).clamp(max=self.steps)

    def c_noise(self, t: Tensor) -> Tensor:
        """DDPM and LDM code counts levels from 0, so published weights work unchanged."""
        return t - 1

    def c_in(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def timesteps(self, steps: int) -> Tensor:
        """Integer times, spaced as evenly as possible.

        Raises:
            ConfigError: unless 1 <= steps <= T.
        """
        if not 1 <= steps <= self.steps:
            raise ConfigError(f"sampling steps: expected 1 to {self.steps} (the objective's levels), got {steps}")
        return torch.tensor([-(-self.steps * left // steps) for left in range(steps, -1, -1)], dtype=torch.float32)

    def _look_up(self, name: str, t: Tensor) -> Tensor:
        key = (name, t.device)
        if key not in self._on_device:
            self._on_device[key] = torch.tensor(self._tables[name], dtype=torch.float32, device=t.device)
        table = self._on_device[key]
        below = t.detach().floor().clamp(0, self.steps - 1).long()
        # take(), because indexing by a scalar tensor would read it back from the device.
        return torch.lerp(table.take(below), table.take(below + 1), (t - below).float())

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out the tables' copies on devices."""
        return {**vars(self), "_on_device": {}}


class VE:
    """EDM's path (Karras et al. 2022): alpha = 1, and t is the standard deviation of the noise itself.

    Args:
        sigma_data: standard deviation of the data, which sets the scale of the network's input.
        sigma_min: the second-to-last sampling level; the last is 0.
        sigma_max: where sampling starts.
        rho: how the levels in between are spaced: the larger, the more of them lie near sigma_min.
    """

    vlb_step = 0.0
    in_sigma = True

    def __init__(
        self, sigma_data: Positive = 1.0, sigma_min: Positive = 0.002, sigma_max: Positive = 80.0, rho: Positive = 7.0
    ) -> None:
        if not sigma_min < sigma_max:
            raise ConfigError(f"path: expected sigma_min < sigma_max, found {sigma_min:g} and {sigma_max:g}")
        self.sigma_data, self.sigma_min, self.rho = sigma_data, sigma_min, rho
        self.t_max = sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def time_at(self, ratio: Tensor) -> Tensor:
        """`ratio` itself: sampling starts at `t_max`, but the path continues beyond it, as churn requires."""
        return ratio

    def to_time(self, place: Tensor) -> Tensor:
        return place

    def c_noise(self, t: Tensor) -> Tensor:
        """ln(t) / 4, as in the paper, scaled to the other paths' range 0..1000, since they share one embedding of t."""
        return 250.0 * t.log()

    def c_in(self, t: Tensor) -> Tensor:
        return (t**2 + self.sigma_data**2).rsqrt()

    def timesteps(self, steps: int) -> Tensor:
        """Even steps in t^(1/rho) from sigma_max to sigma_min, then 0 (eq. 5)."""
        _demand(steps)
        ends = self.t_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        place = torch.arange(steps, dtype=torch.float64) / max(1, steps - 1)
        levels = (ends[0] + place * (ends[1] - ends[0])) ** self.rho
        return torch.cat([levels, torch.zeros(1, dtype=torch.float64)]).float()


class _Continuous:
    """Base of the paths whose t is the fraction of the way from data to noise, 0 to 1.

    Args:
        time_scale: the network is given time_scale * t.
        t_max: where the path ends, 0 < t_max <= 1. Below 1 some signal remains at the end, which noise prediction needs
            on a path to pure noise (Ma et al. 2024, "SiT": 0.999).

    Raises:
        ConfigError: `t_max` out of range.
    """

    vlb_step = 1e-3
    in_sigma = False

    def __init__(self, time_scale: Positive = 1000.0, t_max: FractionAboveZero = 1.0) -> None:
        if not 0 < t_max <= 1:
            raise ConfigError(f"path: t_max: expected more than 0 and at most 1, found {t_max:g}")
        self.time_scale = time_scale
        self.t_max = t_max

    def to_time(self, place: Tensor) -> Tensor:
        # At t = 0 there is nothing to learn, and the signal-to-noise ratio that weights the loss is infinite.
        return (place * self.t_max).clamp(1e-5, self.t_max)

    def c_noise(self, t: Tensor) -> Tensor:
        return self.time_scale * t

    def c_in(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def timesteps(self, steps: int) -> Tensor:
        """Even steps from `t_max` to 0."""
        _demand(steps)
        return torch.linspace(self.t_max, 0, steps + 1)


class Linear(_Continuous):
    """Rectified flow's path (Liu et al. 2023; Lipman et al. 2023): alpha = 1 - t, sigma = t, for 0 <= t <= 1."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def time_at(self, ratio: Tensor) -> Tensor:
        return (1 / (1 + 1 / ratio)).clamp(max=self.t_max)

    def slopes(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(alpha), torch.ones_like(sigma)


class GVP(_Continuous):
    """A quarter of a circle: alpha = cos(pi t / 2), sigma = sin(pi t / 2) (Ma et al. 2024, "SiT": "GVP").

    Its velocity is pi / 2 times v (predictions.py: V).
    """

    def alpha(self, t: Tensor) -> Tensor:
        return (math.pi / 2 * (1 - t)).sin()  # the cosine, but exactly 0 at t = 1

    def sigma(self, t: Tensor) -> Tensor:
        return (math.pi / 2 * t).sin()

    def time_at(self, ratio: Tensor) -> Tensor:
        return (2 / math.pi * ratio.atan()).clamp(max=self.t_max)

    def slopes(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return -math.pi / 2 * sigma, math.pi / 2 * alpha


class VP(_Continuous):
    """The variance-preserving SDE (Song et al. 2021, eq. 33; Ma et al. 2024, "SiT": "VP"): alpha^2 + sigma^2 = 1.

    ln(alpha) = -t beta_min / 2 - t^2 (beta_max - beta_min) / 4. Some signal is left at t = 1: alpha is 0.0066 there.

    Args:
        beta_min, beta_max: the noise rates at t = 0 and t = 1 (SiT's sigma_min and sigma_max).
        time_scale, t_max: as in the other paths.

    Raises:
        ConfigError: unless 0 < beta_min <= beta_max.
    """

    def __init__(
        self,
        beta_min: Positive = 0.1,
        beta_max: Positive = 20.0,
        time_scale: Positive = 1000.0,
        t_max: FractionAboveZero = 1.0,
    ) -> None:
        super().__init__(time_scale, t_max)
        if not 0 < beta_min <= beta_max:
            raise ConfigError(f"path: expected 0 < beta_min <= beta_max, found {beta_min:g} and {beta_max:g}")
        self.beta_min, self.rise = beta_min, beta_max - beta_min

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def time_at(self, ratio: Tensor) -> Tensor:
        faded = torch.log1p(ratio.clamp(max=1e9) ** 2)  # -2 ln(alpha), whose quadratic equation in t this solves
        return (2 * faded / (self.beta_min + (self.beta_min**2 + 2 * self.rise * faded).sqrt())).clamp(max=self.t_max)

    def slopes(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        beta = (self.beta_min**2 - 4 * self.rise * alpha.log()).sqrt()  # beta_min + t (beta_max - beta_min)
        return -beta / 2 * alpha, beta / 2 * alpha**2 / sigma

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -t * (self.beta_min / 2 + t * self.rise / 4)


def _demand(steps: int) -> None:
    if steps < 1:
        raise ConfigError(f"sampling steps: expected 1 or more, got {steps}")
