"""What a denoiser is trained on: how data becomes noise, what the network predicts, how errors are weighed.

t runs one way everywhere: t = 0 is data, t = T (`steps`) the last noise level. A noisy latent is
x_t = alpha(t) x0 + sigma(t) noise; samplers know an objective by alpha, sigma, denoise and grid alone.
"""

import math
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ldm.diffusion.conditioning import Conditioning
from ldm.errors import ConfigError
from ldm.randomness import Draws


class Network(Protocol):
    """net(x (N,C,H,W), noise_level (N,), conditioning) -> the shape of x."""

    def __call__(self, x: Tensor, noise_level: Tensor, conditioning: Conditioning) -> Tensor: ...


class Objective(Protocol):
    """What training and samplers need; times are float32, () or (N,)."""

    def alpha(self, t: Tensor) -> Tensor: ...

    def sigma(self, t: Tensor) -> Tensor: ...

    def loss(self, net: Network, x0: Tensor, conditioning: Conditioning, draws: Draws) -> Tensor:
        """(N,) losses of a batch."""
        ...

    def denoise(self, net: Network, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's estimate of x0, float32, the shape of x."""
        ...

    def grid(self, steps: int) -> Tensor:
        """(steps + 1,) strictly decreasing times on the host: the last noise level first, data (0) last."""
        ...


def rowwise(values: Tensor, like: Tensor) -> Tensor:
    """() or (N,) values in a shape that multiplies the rows of `like` (N, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


# How fast the signal fades: betas(steps) -> (steps,) float64, the variances of the single noising steps.


class NoiseSchedule(Protocol):
    """The single steps x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise of DDPM (Ho et al. 2020, eq. 2)."""

    def betas(self, steps: int) -> np.ndarray: ...


class Linear:
    """beta linear in t (Ho et al. 2020)."""

    def __init__(self, start: float = 1e-4, end: float = 0.02) -> None:
        self.start, self.end = start, end

    def betas(self, steps: int) -> np.ndarray:
        return np.linspace(self.start, self.end, steps)


class SqrtLinear:
    """sqrt(beta) linear in t: the "linear" of latent diffusion's code; 0.0015..0.0195 for its f4 and f8 models."""

    def __init__(self, start: float = 0.0015, end: float = 0.0195) -> None:
        self.start, self.end = start, end

    def betas(self, steps: int) -> np.ndarray:
        return np.linspace(math.sqrt(self.start), math.sqrt(self.end), steps) ** 2


class Cosine:
    """alpha falls as a quarter of a cosine (Nichol and Dhariwal 2021, eq. 17)."""

    def __init__(self, offset: float = 0.008, largest_beta: float = 0.999) -> None:
        self.offset, self.largest_beta = offset, largest_beta

    def betas(self, steps: int) -> np.ndarray:
        place = (np.arange(steps + 1) / steps + self.offset) / (1 + self.offset)
        squared_alpha = np.cos(place * math.pi / 2) ** 2
        return np.minimum(1 - squared_alpha[1:] / squared_alpha[:-1], self.largest_beta)


# What the network's output means.


class Prediction(Protocol):
    """The training target, and the way back from the output to x0; alpha and sigma multiply rows."""

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...

    def x0(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...


class Eps:
    """The noise (Ho et al. 2020)."""

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise

    def x0(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x - sigma * output) / alpha


class X0:
    """The data."""

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x0

    def x0(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return output


class V:
    """v = alpha noise - sigma x0 (Salimans and Ho 2022); the way back needs alpha^2 + sigma^2 = 1."""

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * noise - sigma * x0

    def x0(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * x - sigma * output


class Weighting(Protocol):
    """(N,) factors of the squared errors at the levels alpha (N,), sigma (N,)."""

    def __call__(self, alpha: Tensor, sigma: Tensor) -> Tensor: ...


class Plain:
    """Every noise level counts alike (L_simple of Ho et al. 2020)."""

    def __call__(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.ones_like(alpha)


class DDPM(nn.Module):
    """Denoising diffusion in `steps` discrete levels (Ho et al. 2020); variance-preserving: alpha^2 + sigma^2 = 1.

    A module only so that a weighting with parameters is seen; it has none of its own, and its tables are no state.

    Args:
        schedule: how fast the signal fades.
        prediction: what the network's output means (default: the noise).
        weighting: factors of the squared errors (default: 1).
        steps: T, the number of noise levels.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: Prediction | None = None,
        weighting: Weighting | None = None,
        steps: int = 1000,
    ) -> None:
        super().__init__()
        self.steps = steps
        self.prediction: Prediction = Eps() if prediction is None else prediction
        self.weighting: Weighting = Plain() if weighting is None else weighting
        squared_alpha = np.concatenate([[1.0], np.cumprod(1 - schedule.betas(steps))])  # t = 0..T
        # Kept off the state dict and out of .to(dtype): a bf16 model still needs these in full.
        self._tables = {"alpha": np.sqrt(squared_alpha), "sigma": np.sqrt(1 - squared_alpha)}
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    def alpha(self, t: Tensor) -> Tensor:
        """The signal's factor at 0 <= t <= T, float32 of t's shape: exact at whole t, linear in between."""
        return self._look_up("alpha", t)

    def sigma(self, t: Tensor) -> Tensor:
        """The noise's factor at 0 <= t <= T, float32 of t's shape: exact at whole t, linear in between."""
        return self._look_up("sigma", t)

    def loss(self, net: Network, x0: Tensor, conditioning: Conditioning, draws: Draws) -> Tensor:
        """Weighted squared error of the prediction at random levels 1..T, mean over all but the batch: (N,)."""
        t = (draws.stratified("timestep") * self.steps).floor().add(1).clamp(max=self.steps)  # (N,)
        noise = draws.normal("noise", x0.shape[1:])
        alpha, sigma = self.alpha(t), self.sigma(t)
        a, s = rowwise(alpha, x0), rowwise(sigma, x0)
        output = net(a * x0 + s * noise, self._noise_level(t), conditioning).float()
        error = output - self.prediction.target(x0, noise, a, s)
        return self.weighting(alpha, sigma) * error.square().flatten(1).mean(1)

    def denoise(self, net: Network, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's estimate of x0, float32, from x (N, ...) at t, () or (N,), 0 < t <= T."""
        t = t.expand(len(x))
        output = net(x, self._noise_level(t), conditioning).float()
        return self.prediction.x0(output, x, rowwise(self.alpha(t), x), rowwise(self.sigma(t), x))

    def grid(self, steps: int) -> Tensor:
        """Whole times from T to 0 in exactly `steps` steps, as even as they can be: (steps + 1,) float32.

        Raises:
            ConfigError: unless 1 <= steps <= T.
        """
        if not 1 <= steps <= self.steps:
            raise ConfigError(f"sampling steps: expected 1 to {self.steps} (the objective's levels), got {steps}")
        return torch.tensor([-(-self.steps * left // steps) for left in range(steps, -1, -1)], dtype=torch.float32)

    @staticmethod
    def _noise_level(t: Tensor) -> Tensor:
        """What the network is told. The lineage counts its levels from 0, so published weights work unchanged."""
        return t - 1

    def _look_up(self, name: str, t: Tensor) -> Tensor:
        key = (name, t.device)
        if key not in self._on_device:
            self._on_device[key] = torch.tensor(self._tables[name], dtype=torch.float32, device=t.device)
        table = self._on_device[key]
        below = t.detach().floor().clamp(0, self.steps - 1).long()
        # take(), because indexing by a scalar tensor would read it back from the device.
        return torch.lerp(table.take(below), table.take(below + 1), (t - below).float())

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the tables' device copies behind."""
        return {**super().__getstate__(), "_on_device": {}}
