"""How an error is measured, and how much it counts at each noise level: errors of the network's output -> losses (N,).

A noise level is characterized by its signal-to-noise ratio snr = alpha^2 / sigma^2. Papers state weights for the error
of eps, x0 or v; here they are stated once, as weights of the squared error of x0, and hold for every prediction.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ldm.layers import timestep_embedding
from ldm.ranges import Count, Finite, NotNegative, Positive


class Distance(ABC):
    """distance(output, target) -> the elementwise error, in their shape.

    A class, not a protocol, so that a configuration with a weighting in its place is refused, though both are callable.
    """

    @abstractmethod
    def __call__(self, output: Tensor, target: Tensor) -> Tensor: ...


class Squared(Distance):
    """The squared error, to which the papers' weights apply."""

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square()


class Absolute(Distance):
    """The absolute value: `loss_type: l1` of latent diffusion's configurations.

    It is minimized by the median, not the mean. A weighting multiplies it by the same factor as the squared error.
    """

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs()


@dataclass(frozen=True)
class Level:
    """The noise levels of the rows of a batch.

    Attributes:
        snr: (N,) alpha^2 / sigma^2.
        snr_before: (N,) the same, one step of the objective closer to the data.
        x0_error_scale: (N,) by how much the error of x0 is smaller than the output's (Prediction.x0_error_scale).
    """

    snr: Tensor
    snr_before: Tensor
    x0_error_scale: Tensor


class Weighting(Protocol):
    """weighting(error (N,), level) -> (N,) losses; `error` is the mean error (Distance) of the output."""

    def __call__(self, error: Tensor, level: Level) -> Tensor: ...


class Plain:
    """The output's error, unweighted: L_simple of Ho et al. 2020 for eps, EDM's weights for its own F."""

    def __call__(self, error: Tensor, level: Level) -> Tensor:
        return error


class MinSNR:
    """min(snr, gamma) of the error of x0 (Hang et al. 2023)."""

    def __init__(self, gamma: Positive = 5.0) -> None:
        self.gamma = gamma

    def __call__(self, error: Tensor, level: Level) -> Tensor:
        return error * level.x0_error_scale**2 * level.snr.clamp(max=self.gamma)


class SoftMinSNR:
    """gamma snr / (gamma + snr) of the error of x0 (Crowson et al. 2024, "Hourglass").

    The same as `Sigmoid` with bias ln(gamma).
    """

    def __init__(self, gamma: Positive = 4.0) -> None:
        self.gamma = gamma

    def __call__(self, error: Tensor, level: Level) -> Tensor:
        return error * level.x0_error_scale**2 / (1 / self.gamma + 1 / level.snr)


class Sigmoid(SoftMinSNR):
    """sigmoid(bias - ln snr) of the error of eps (Kingma and Gao 2023; Hoogeboom et al. 2024)."""

    def __init__(self, bias: Finite = 0.0) -> None:
        super().__init__(math.exp(bias))


class P2:
    """1 / (k + snr)^gamma of the error of eps: a lower weight for the finest details (Choi et al. 2022)."""

    def __init__(self, gamma: NotNegative = 1.0, k: Positive = 1.0) -> None:
        self.gamma, self.k = gamma, k

    def __call__(self, error: Tensor, level: Level) -> Tensor:
        return error * level.x0_error_scale**2 * level.snr / (self.k + level.snr) ** self.gamma


class KarrasWeighting:
    """1 / sigma_data^2 + snr of the error of x0: EDM's weights (Karras et al. 2022), for any other prediction."""

    def __init__(self, sigma_data: Positive = 1.0) -> None:
        self.sigma_data = sigma_data

    def __call__(self, error: Tensor, level: Level) -> Tensor:
        return error * level.x0_error_scale**2 * (level.snr + self.sigma_data**-2)


class VLB:
    """The variational bound: the error of x0 times half the snr that a step gains (Kingma et al. 2021, eq. 13).

    In nats per dimension if levels are drawn uniformly, once multiplied by the number of steps; the first step, whose
    gain is infinite, is weighted with its own snr.
    """

    def __call__(self, error: Tensor, level: Level) -> Tensor:
        # Infinite only where the step before is the data itself.
        gained = torch.where(level.snr_before.isinf(), level.snr, level.snr_before - level.snr)
        return error * level.x0_error_scale**2 * gained / 2


class PlainAndVLB(VLB):
    """The unweighted error and a little of the variational bound: latent diffusion's `original_elbo_weight`.

    Args:
        vlb_weight: of the bound; the error itself has weight 1.
    """

    def __init__(self, vlb_weight: NotNegative) -> None:
        self.vlb_weight = vlb_weight

    def __call__(self, error: Tensor, level: Level) -> Tensor:
        return error + self.vlb_weight * super().__call__(error, level)


class Uncertainty(nn.Module):
    """Another weighting's loss over exp(u) + u, with u a learned function of the level (Karras et al. 2024, "EDM2").

    It makes the losses of all levels contribute equally. u starts at 0, where it changes nothing.

    Args:
        weighting: the weighting whose loss is scaled.
        channels: number of features of ln(snr) that u is linear in.
    """

    def __init__(self, weighting: Weighting, channels: Count = 128) -> None:
        super().__init__()
        self.weighting = weighting
        self.channels = channels
        self.u = nn.Linear(channels, 1)
        nn.init.zeros_(self.u.weight)
        nn.init.zeros_(self.u.bias)

    def forward(self, error: Tensor, level: Level) -> Tensor:
        logarithm = level.snr.log().clamp(-20, 20)  # (N,)
        features = timestep_embedding(logarithm, self.channels, longest_period=100.0)  # (N, channels)
        # The layer is not called, since autocast would round it to bf16, and cannot be disabled on the meta device of a
        # dry run. Divided by sqrt(channels), as in EDM2; otherwise the network's high learning rate makes u unstable.
        u = (features * self.u.weight).sum(1) / math.sqrt(self.channels) + self.u.bias  # (N,)
        return self.weighting(error, level) / u.exp() + u


def weighted(weighting: Weighting) -> Weighting:
    """The weighting whose loss an `Uncertainty` scales; itself where it is none."""
    return weighted(weighting.weighting) if isinstance(weighting, Uncertainty) else weighting
