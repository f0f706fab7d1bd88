"""What a denoiser is trained on: how data becomes noise, what the network predicts, how errors are weighted.

t runs the same way everywhere: t = 0 is data, `t_max` the last noise level. A noisy latent is x_t = alpha(t) x0 +
sigma(t) noise; samplers use only alpha, sigma, t_max, time_at, denoise and timesteps of an objective. An objective is a
path (paths.py), a prediction (predictions.py), a weighting of errors (weightings.py) and a distribution of noise levels
(noise_levels.py). Four common combinations have names: DDPM, EDM, Flow and Interpolant.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.noise_levels import LogNormal, NoiseLevels, Uniform
from ldm.diffusion.noise_schedules import NoiseSchedule
from ldm.diffusion.paths import VE, DiscreteVP, Linear, ProbabilityPath, Smooth
from ldm.diffusion.predictions import EDMPreconditioned, Eps, PathVelocity, Prediction, Velocity
from ldm.diffusion.weightings import VLB, Distance, Level, Plain, Squared, Weighting, weighted
from ldm.errors import ConfigError
from ldm.randomness import Draws
from ldm.ranges import Count, NotNegative, Positive

SHORTEST = 0.01
"""The length below which an output's direction counts less: a network begins at zero, where it has none, and where the
gradient of one would be as large as the inverse of this."""


class Network(Protocol):
    """net(x (N,C,H,W), noise_level (N,), conditioning) -> the shape of x."""

    def __call__(self, x: Tensor, noise_level: Tensor, conditioning: Conditioning) -> Tensor: ...


def rowwise(values: Tensor, like: Tensor) -> Tensor:
    """() or (N,) values reshaped to broadcast over the rows of `like` (N, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _mean(errors: Tensor, weights: Tensor | None) -> Tensor:
    """Mean of (N, ...) over all but the batch dimension, each error times its weight: (N,)."""
    return (errors if weights is None else errors * weights).flatten(1).mean(1)


class Objective(nn.Module):
    """Any combination of path, prediction, weighting and distribution of noise levels.

    It is a module so that a weighting's parameters are registered; it has none itself.

    Args:
        path: how data becomes noise.
        prediction: what the network's output means.
        weighting: errors -> losses.
        levels: which noise levels training visits.
        direction_weight: weight of 1 - cosine(output, target) over the channels, added to the loss (Yao et al. 2025,
            "LightningDiT"); meant for `Velocity`.
        distance: how an error is measured (default: squared; latent diffusion's l1: `Absolute`).
    """

    def __init__(
        self,
        path: ProbabilityPath,
        prediction: Prediction,
        weighting: Weighting,
        levels: NoiseLevels,
        direction_weight: NotNegative = 0.0,
        distance: Distance | None = None,
    ) -> None:
        super().__init__()
        bound = isinstance(weighted(weighting), VLB)
        if bound and path.vlb_step == 0:
            raise ConfigError("objective: the variational bound sums over steps of t, which this path does not have")
        if bound and distance is not None and not isinstance(distance, Squared):
            raise ConfigError(
                f"objective distance: the variational bound requires squared errors, found {type(distance).__name__}; "
                f"leave it out or choose another weighting"
            )
        if isinstance(prediction, Eps) and float(path.alpha(torch.tensor(path.t_max, device="cpu"))) == 0:
            raise ConfigError(
                "objective: expected a prediction that tells data from pure noise, such as V or Velocity, found Eps; "
                "at the end of this path, where sampling starts, no signal is left"
            )
        if levels.in_sigma != path.in_sigma:
            wanted = "noise levels sigma, such as LogNormal" if path.in_sigma else "places in [0, 1], such as Uniform"
            raise ConfigError(
                f"objective levels: {type(path).__name__} expects a distribution of {wanted}; "
                f"found {type(levels).__name__}"
            )
        self.path = path
        self.prediction = prediction
        self.weighting = weighting
        self.levels = levels
        self.direction_weight = direction_weight
        self.distance = distance or Squared()

    @property
    def t_max(self) -> float:
        """The last noise level, where sampling starts."""
        return self.path.t_max

    def alpha(self, t: Tensor) -> Tensor:
        """The signal's factor at 0 <= t <= t_max, float32 of t's shape, () or (N,)."""
        return self.path.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        """The noise's factor at 0 <= t <= t_max, float32 of t's shape, () or (N,)."""
        return self.path.sigma(t)

    def time_at(self, ratio: Tensor) -> Tensor:
        """The t at which sigma / alpha is `ratio`; on the host."""
        return self.path.time_at(ratio)

    def timesteps(self, steps: int) -> Tensor:
        """(steps + 1,) strictly decreasing times on the host: the last noise level first, data (0) last.

        Raises:
            ConfigError: an invalid number of steps.
        """
        return self.path.timesteps(steps)

    def loss(
        self, net: Network, x0: Tensor, conditioning: Conditioning, draws: Draws, weights: Tensor | None = None
    ) -> Tensor:
        """Weighted error of the prediction at the sampled noise levels, mean over all but the batch dimension: (N,).

        Args:
            net: the network.
            x0: (N, C, H, W), data.
            conditioning: of its rows.
            draws: their randomness.
            weights: (N, 1, H, W), by which the error of each pixel counts; None: all alike.
        """
        t = self.path.to_time(self.levels(draws.stratified("timestep")))  # (N,)
        noise = draws.normal("noise", x0.shape[1:])
        alpha, sigma = self.alpha(t), self.sigma(t)
        a, s = rowwise(alpha, x0), rowwise(sigma, x0)
        output = self._output(net, a * x0 + s * noise, t, conditioning)
        target = self.prediction.target(x0, noise, a, s)
        error = _mean(self.distance(output, target), weights)
        before = self._snr((t - self.path.vlb_step).clamp(min=0))
        loss = self.weighting(error, Level(self._snr(t), before, self.prediction.x0_error_scale(alpha, sigma)))
        if self.direction_weight > 0:
            angle = 1 - F.cosine_similarity(output, target, dim=1, eps=SHORTEST)[:, None]  # (N, 1, H, W)
            loss = loss + self.direction_weight * _mean(angle, weights)
        return loss

    def denoise(self, net: Network, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's estimate of x0, float32, from x (N, ...) at t, () or (N,), 0 < t <= t_max."""
        t = t.to(x.device, non_blocking=True).expand(len(x))
        output = self._output(net, x, t, conditioning)
        return self.prediction.x0(output, x, rowwise(self.alpha(t), x), rowwise(self.sigma(t), x))

    def _output(self, net: Network, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return net(rowwise(self.path.c_in(t), x) * x, self.path.c_noise(t), conditioning).float()

    def _snr(self, t: Tensor) -> Tensor:
        return (self.alpha(t) / self.sigma(t)).square()


class DDPM(Objective):
    """Denoising diffusion with `steps` discrete levels (Ho et al. 2020); variance-preserving: alpha^2 + sigma^2 = 1.

    Args:
        schedule: how fast the signal fades.
        prediction: what the network's output means (default: the noise).
        weighting: errors -> losses (default: unweighted).
        levels: which noise levels training visits (default: uniform).
        steps: T, the number of noise levels.
        direction_weight, distance: see Objective.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: Prediction | None = None,
        weighting: Weighting | None = None,
        levels: NoiseLevels | None = None,
        steps: Count = 1000,
        direction_weight: NotNegative = 0.0,
        distance: Distance | None = None,
    ) -> None:
        path = DiscreteVP(schedule, steps)
        prediction, weighting, levels = prediction or Eps(), weighting or Plain(), levels or Uniform()
        super().__init__(path, prediction, weighting, levels, direction_weight, distance)


class EDM(Objective):
    """Karras et al. 2022: preconditioned, with log-normal noise levels; the loss's weights are in the prediction.

    Args:
        levels: which noise levels training visits (default: the paper's).
        weighting: squared errors of the preconditioned output -> losses (default: unweighted; EDM2: `Uncertainty`).
        sigma_data: standard deviation of the data; latents from a cache are standardized: 1.
        sigma_min, sigma_max, rho: spacing of the sampling levels (paths.py: VE).
        distance: see Objective.
    """

    def __init__(
        self,
        levels: NoiseLevels | None = None,
        weighting: Weighting | None = None,
        sigma_data: Positive = 1.0,
        sigma_min: Positive = 0.002,
        sigma_max: Positive = 80.0,
        rho: Positive = 7.0,
        distance: Distance | None = None,
    ) -> None:
        path = VE(sigma_data, sigma_min, sigma_max, rho)
        prediction, weighting, levels = EDMPreconditioned(sigma_data), weighting or Plain(), levels or LogNormal()
        super().__init__(path, prediction, weighting, levels, distance=distance)


class Flow(Objective):
    """Rectified flow, the linear interpolant with velocity prediction (Liu et al. 2023; Ma et al. 2024, "SiT").

    Args:
        prediction: what the network's output means (default: the velocity).
        weighting: errors -> losses (default: unweighted).
        levels: which noise levels training visits (default: uniform).
        direction_weight, distance: see Objective.
        time_scale: the network is given time_scale * t.
    """

    def __init__(
        self,
        prediction: Prediction | None = None,
        weighting: Weighting | None = None,
        levels: NoiseLevels | None = None,
        direction_weight: NotNegative = 0.0,
        time_scale: Positive = 1000.0,
        distance: Distance | None = None,
    ) -> None:
        prediction, weighting, levels = prediction or Velocity(), weighting or Plain(), levels or Uniform()
        super().__init__(Linear(time_scale), prediction, weighting, levels, direction_weight, distance)


class Interpolant(Objective):
    """Any smooth path with its velocity (Albergo et al. 2023): "SiT" (Ma et al. 2024) with its paths VP and GVP.

    Args:
        path: how data becomes noise.
        prediction: what the network's output means (default: the path's velocity).
        weighting: errors -> losses (default: unweighted).
        levels: which noise levels training visits (default: uniform).
        direction_weight, distance: see Objective.
    """

    def __init__(
        self,
        path: Smooth,
        prediction: Prediction | None = None,
        weighting: Weighting | None = None,
        levels: NoiseLevels | None = None,
        direction_weight: NotNegative = 0.0,
        distance: Distance | None = None,
    ) -> None:
        prediction, weighting, levels = prediction or PathVelocity(path), weighting or Plain(), levels or Uniform()
        super().__init__(path, prediction, weighting, levels, direction_weight, distance)
