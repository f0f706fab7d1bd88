"""The diagonal Gaussian over latents that the encoder predicts (Kingma and Welling 2014, arXiv:1312.6114)."""

import math
from typing import Protocol

import torch
from torch import Tensor

from ldm.runtime.float64 import double


class Posterior(Protocol):
    """What an encoder's output means; the latent cache stores its `mean` and `std`, each (N, C, ...)."""

    mean: Tensor

    @property
    def std(self) -> Tensor: ...

    @property
    def var(self) -> Tensor: ...

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """The latents decoded in training: (N, C, ...)."""
        ...

    def mode(self) -> Tensor:
        """The most likely latents: (N, C, ...)."""
        ...

    def regularization_loss(self) -> Tensor:
        """The regularization term of the loss: (N,)."""
        ...

    def logs(self) -> dict[str, Tensor]:
        """Detached, by name, of each image: (N,)."""
        ...


class DiagonalGaussian:
    """q(z | x) = N(mean, diag(var)), one per row of `moments`.

    Sums run over all dimensions but the batch. Give float32 moments: a KL summed in bfloat16 keeps three digits.

    Args:
        moments: (N, 2C, ...), mean and log-variance stacked along dimension 1; the log-variance is clamped to
            [-30, 20].
        deterministic: the point mass at the mean. Its samples are the mean; its kl and nll are zero by convention,
            since the true ones are infinite and constant in the parameters.
    """

    def __init__(self, moments: Tensor, deterministic: bool = False) -> None:
        self.deterministic = deterministic
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.zeros_like(self.mean) if deterministic else (0.5 * self.logvar).exp()
        self.var = torch.zeros_like(self.mean) if deterministic else self.logvar.exp()

    def sample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """One latent per row: (N, C, ...).

        Args:
            noise: standard normal of the mean's shape; drawn from `generator` (or torch's global one) if not given.
        """
        if self.deterministic:
            return self.mean
        if noise is None:
            mean = self.mean
            noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return self.mean + self.std * noise.to(self.mean.dtype)

    def mode(self) -> Tensor:
        """The most likely latent, which is the mean: (N, C, ...)."""
        return self.mean

    def kl(self, other: "DiagonalGaussian | None" = None) -> Tensor:
        """KL(self || other) in nats: (N,). `other` is the standard normal if not given."""
        if self.deterministic:
            return self._zeros()
        if other is None:
            return 0.5 * _sum(self.mean.square() + self.var - 1.0 - self.logvar)
        ratio = ((self.mean - other.mean).square() + self.var) / other.var
        return 0.5 * _sum(ratio - 1.0 - self.logvar + other.logvar)

    def regularization_loss(self) -> Tensor:
        """The KL against the standard normal, in nats: (N,)."""
        return self.kl()

    def logs(self) -> dict[str, Tensor]:
        return {"kl": self.kl().detach()}

    def nll(self, x: Tensor) -> Tensor:
        """-log q(x) in nats: (N,). x has the mean's shape."""
        if self.deterministic:
            return self._zeros()
        return 0.5 * _sum(math.log(2.0 * math.pi) + self.logvar + (x - self.mean).square() / self.var)

    def _zeros(self) -> Tensor:
        return self.mean.new_zeros(self.mean.shape[0])


def latent_sums(posterior: Posterior) -> Tensor:
    """Per channel: number of values, sum of E[z], sum of E[z^2] = mean^2 + var; (3, c) float64, additive."""
    mean, var = double(posterior.mean), double(posterior.var)  # (N, c, h, w)
    over = (0, *range(2, mean.ndim))
    return torch.stack([torch.ones_like(mean).sum(over), mean.sum(over), (mean.square() + var).sum(over)])


def statistics(sums: Tensor) -> dict[str, list[float]]:
    """latent_sums (3, c) of a data set -> per-channel mean and standard deviation of its latents, draws included."""
    count, first, second = sums.cpu()
    mean = first / count
    return {"mean": mean.tolist(), "std": (second / count - mean.square()).clamp_min(0.0).sqrt().tolist()}


def _sum(x: Tensor) -> Tensor:
    """(N, ...) -> (N,)"""
    return x.flatten(1).sum(1)
