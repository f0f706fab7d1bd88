"""What a network's output means: the training target, and the way back from the output to the data.

All hold for any noisy latent x = alpha x0 + sigma noise; with alpha^2 + sigma^2 = 1 (DDPM) or alpha + sigma = 1 (flow)
they are the papers' formulas.
"""

from typing import Protocol

from torch import Tensor

from ldm.diffusion.paths import Smooth
from ldm.ranges import Positive


class Prediction(Protocol):
    """alpha and sigma broadcast over the rows: () or (N, 1, ...)."""

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...

    def x0(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...

    def x0_error_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """By how much the error of x0 is smaller than the output's: x0 = ... +- scale * output; the shape of alpha."""
        ...


class Eps:
    """The noise (Ho et al. 2020). Without any signal it does not determine the data, so no path may end there."""

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise

    def x0(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x - sigma * output) / alpha

    def x0_error_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma / alpha


class X0:
    """The data."""

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x0

    def x0(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return output

    def x0_error_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha.new_ones(alpha.shape)


class V:
    """v = alpha noise - sigma x0 (Salimans and Ho 2022, appendix D)."""

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * noise - sigma * x0

    def x0(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha * x - sigma * output) / (alpha**2 + sigma**2)

    def x0_error_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma / (alpha**2 + sigma**2)


class Velocity:
    """noise - x0: the velocity along a straight path from data to noise (Lipman et al. 2023; Liu et al. 2023)."""

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise - x0

    def x0(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x - sigma * output) / (alpha + sigma)

    def x0_error_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma / (alpha + sigma)


class PathVelocity:
    """dx/dt = alpha' x0 + sigma' noise: velocity along any smooth path (Albergo et al. 2023; Ma et al. 2024, "SiT").

    On a straight path it is `Velocity`.

    Args:
        path: the objective's own path.
    """

    def __init__(self, path: Smooth) -> None:
        self.path = path

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        of_alpha, of_sigma = self.path.slopes(alpha, sigma)
        return of_alpha * x0 + of_sigma * noise

    def x0(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        of_alpha, of_sigma = self.path.slopes(alpha, sigma)
        return (of_sigma * x - sigma * output) / (of_sigma * alpha - of_alpha * sigma)

    def x0_error_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        of_alpha, of_sigma = self.path.slopes(alpha, sigma)
        return sigma / (of_sigma * alpha - of_alpha * sigma)


class EDMPreconditioned:
    """EDM's output F: x0 = c_skip x + c_out F, with the coefficients of Karras et al. 2022, table 1 (alpha = 1).

    Its squared error is 1 / c_out^2 times that of x0, which is the paper's weighting.

    Args:
        sigma_data: standard deviation of the data; latents from a cache are standardized: 1.
    """

    def __init__(self, sigma_data: Positive = 1.0) -> None:
        self.sigma_data = sigma_data

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x0 - self._skip(sigma) * (alpha * x0 + sigma * noise)) / self.x0_error_scale(alpha, sigma)

    def x0(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self._skip(sigma) * x + self.x0_error_scale(alpha, sigma) * output

    def x0_error_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()

    def _skip(self, sigma: Tensor) -> Tensor:
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)
