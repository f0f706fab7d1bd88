"""From noise to data. Each sampler is written once for every objective, in terms of alpha, sigma and the estimated x0.

A sampler is f(denoise, objective, noise, steps, ...) -> x0, with denoise(x (N, ...), t ()) -> x0. No loop waits for the
device. Noise drawn on the way is keyed by the row's own number, so that an image does not depend on its batch.
"""

import torch
from torch import Tensor

from ldm.diffusion.guidance import Denoiser
from ldm.diffusion.objectives import Objective
from ldm.randomness import Draws


def first_order_step(
    objective: Objective,
    x: Tensor,
    x0: Tensor,
    t: Tensor,
    s: Tensor,
    eta: float = 0.0,
    fresh: Tensor | None = None,
) -> Tensor:
    """From time t to s < t: x_s = alpha_s x0 + sigma_s eps, with eps = (x_t - alpha_t x0) / sigma_t.

    With eta > 0 a part of eps is replaced by `fresh` noise, of eta times the standard deviation of the true posterior
    q(x_s | x_t, x0): eta = 0 is DDIM (Song et al. 2021, eq. 12), and Euler's method for EDM and flows; eta = 1 is DDPM.

    Args:
        x: (N, ...) at time t.
        x0: its estimated data.
        t, s: () times.
        fresh: standard normal, of the shape of x; needed where eta > 0.
    """
    alpha_t, sigma_t, alpha_s, sigma_s = objective.alpha(t), objective.sigma(t), objective.alpha(s), objective.sigma(s)
    eps = (x - alpha_t * x0) / sigma_t
    if fresh is None:
        return alpha_s * x0 + sigma_s * eps
    # The variance that a step s -> t adds, times the share of it that the data leaves open.
    added = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
    spread = eta * sigma_s / sigma_t * added.clamp(min=0).sqrt()
    return alpha_s * x0 + (sigma_s**2 - spread**2).clamp(min=0).sqrt() * eps + spread * fresh


@torch.no_grad()
def ddim(
    denoise: Denoiser,
    objective: Objective,
    noise: Tensor,
    steps: int,
    eta: float = 0.0,
    draws: Draws | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021) in exactly `steps` calls of `denoise`.

    Args:
        noise: (N, ...) standard normal, float32.
        eta: 0 = deterministic ... 1 = ancestral.
        draws: the rows' randomness on noise's device; needed where eta > 0.
    """
    if eta > 0 and draws is None:
        raise ValueError("eta > 0 adds noise on the way: pass draws")
    times = objective.grid(steps).to(noise.device)
    # The spread of noisy whitened data at the last level: 1 where variance is preserved.
    x = noise * torch.hypot(objective.alpha(times[0]), objective.sigma(times[0]))
    for i in range(steps):
        last = i == steps - 1
        fresh = None if draws is None or eta == 0 or last else draws.normal(f"step{i}", x.shape[1:])
        x = first_order_step(objective, x, denoise(x, times[i]), times[i], times[i + 1], eta, fresh)
    return x


def ancestral(denoise: Denoiser, objective: Objective, noise: Tensor, steps: int, draws: Draws) -> Tensor:
    """DDPM's own sampler (Ho et al. 2020, algorithm 2), with the posterior's variance, on a grid of `steps`."""
    return ddim(denoise, objective, noise, steps, eta=1.0, draws=draws)
