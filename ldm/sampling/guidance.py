"""Guidance: denoisers made of denoisers. All act on the estimated x0, so they hold for every objective and sampler.

x0 is affine in what a network predicts, whatever that is: extrapolating one is extrapolating the other. That holds
channel by channel too: where `channels` is given, the first so many are guided, and the others are as without guidance.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.objectives import Objective

# denoise(x (N, ...), t () on the host, conditioning of N rows) -> x0, and the same with the conditioning filled in.
ConditionalDenoiser = Callable[[Tensor, Tensor, Conditioning], Tensor]
Denoiser = Callable[[Tensor, Tensor], Tensor]


def classifier_free(
    denoise: ConditionalDenoiser,
    conditioning: Conditioning,
    null: Conditioning,
    scale: float,
    rescale: float = 0.0,
    channels: int | None = None,
) -> Denoiser:
    """x0 = null + scale (conditional - null) (Ho and Salimans 2022, eq. 6, in their w = scale - 1).

    One call of 2N rows; scale 1 is the conditional denoiser itself, in one call of N rows.

    Args:
        rescale: 0 ... 1: how far each row's spread is brought back to that of the conditional x0 (Lin et al. 2024,
            section 3.4, there on v): large scales else burn pictures out.
        channels: guided ones; None: all, as is usual. DiT's and LightningDiT's published figures are of the first 3.
    """
    if scale == 1:
        return lambda x, t: denoise(x, t, conditioning)
    both = conditioning.cat(null)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        # lerp(null, conditional, scale) in one pass.
        whole, untold = denoise(torch.cat([x, x]), t, both).chunk(2)
        told = whole[:, :channels]
        x0 = torch.lerp(untold[:, :channels], told, scale)
        if rescale > 0:
            x0 = x0 * (1 - rescale + rescale * _spread(told) / _spread(x0))
        return _completed(x0, whole)

    return guided


def autoguidance(denoise: Denoiser, worse: Denoiser, scale: float, channels: int | None = None) -> Denoiser:
    """x0 = worse + scale (denoise - worse): away from what a smaller or less trained model gets wrong.

    Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself", eq. 3.
    """

    def guided(x: Tensor, t: Tensor) -> Tensor:
        better = denoise(x, t)
        return _completed(torch.lerp(worse(x, t)[:, :channels], better[:, :channels], scale), better)

    return guided


def within(guided: Denoiser, plain: Denoiser, objective: Objective, above: float, up_to: float) -> Denoiser:
    """Guidance for above < sigma / alpha <= up_to alone, elsewhere `plain` (Kynkäänniemi et al. 2024)."""

    def chosen(x: Tensor, t: Tensor) -> Tensor:
        ratio = float(objective.sigma(t) / objective.alpha(t))  # t is on the host: nothing waits for the device
        return (guided if above < ratio <= up_to else plain)(x, t)

    return chosen


def classifier(
    denoise: Denoiser,
    objective: Objective,
    log_probability: Callable[[Tensor, Tensor], Tensor],
    scale: float,
    channels: int | None = None,
) -> Denoiser:
    """x0 + scale sigma^2 / alpha grad log p(class | x_t) (Dhariwal and Nichol 2021, algorithm 2, there on eps).

    Args:
        log_probability: (x (N, ...), t ()) -> (N,), of each row's wanted class, by a classifier of noisy latents.
    """

    def guided(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = objective.alpha(t), objective.sigma(t)
        x0 = denoise(x, t)
        if float(alpha) == 0:
            return x0  # pure noise: no class to be seen in it
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(log_probability(leaf, t).sum(), leaf)
        return _completed((x0 + scale * sigma**2 / alpha * slope)[:, :channels], x0)

    return guided


def inpaint(denoise: Denoiser, known: Tensor, mask: Tensor) -> Denoiser:
    """`known` (N, ...) where `mask` is true, the estimate elsewhere; any sampler ends with what is known."""
    return lambda x, t: torch.where(mask, known, denoise(x, t))


def _completed(first: Tensor, x0: Tensor) -> Tensor:
    """`first` (N, c, ...) as the first channels of `x0` (N, C, ...)."""
    channels = first.shape[1]
    return first if channels == x0.shape[1] else torch.cat([first, x0[:, channels:]], dim=1)


def _spread(x: Tensor) -> Tensor:
    """The standard deviation of each row, (N, 1, ...)."""
    return x.flatten(1).std(1).reshape(-1, *[1] * (x.ndim - 1))
