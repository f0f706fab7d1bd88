"""What samplers are made of: the start, and steps from one time to the next, for any objective.

They are written in terms of alpha, sigma and the estimated x0. Times t and s are () tensors on the host.
"""

import math

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.objectives import Objective
from ldm.randomness import Draws
from ldm.runtime.float64 import double


def start(objective: Objective, noise: Tensor, t: Tensor, x0: Tensor | None = None) -> Tensor:
    """The start of sampling at t (): from `x0` (N, ...), or, without one, for data with mean 0 and variance 1."""
    if x0 is None:
        return noise * torch.hypot(objective.alpha(t), objective.sigma(t))
    return objective.alpha(t) * x0 + objective.sigma(t) * noise


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

    With eta > 0 a part of eps is replaced by `fresh` noise, with eta times the standard deviation of the true posterior
    q(x_s | x_t, x0): eta = 0 is DDIM (Song et al. 2021, eq. 12), and Euler's method for EDM and flows; eta = 1 is DDPM,
    and the reverse SDE of any path.

    Args:
        x: (N, ...) at time t.
        x0: its estimated data.
        t, s: () times.
        fresh: standard normal, of the shape of x; needed if eta > 0.
    """
    alpha_t, sigma_t, alpha_s, sigma_s = objective.alpha(t), objective.sigma(t), objective.alpha(s), objective.sigma(s)
    eps = (x - alpha_t * x0) / sigma_t
    if fresh is None:
        return alpha_s * x0 + sigma_s * eps
    # The variance that a step s -> t adds, times the fraction of it that the data does not determine.
    added = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
    spread = eta * sigma_s / sigma_t * added.clamp(min=0).sqrt()
    return alpha_s * x0 + (sigma_s**2 - spread**2).clamp(min=0).sqrt() * eps + spread * fresh


def sde_step(
    objective: Objective, x: Tensor, x0: Tensor, t: Tensor, s: Tensor, eta: float, fresh: Tensor | None
) -> Tensor:
    """From t to s by the exact solution of the SDE with this eta for constant x0: eps decays by (k_s / k_t)^eta^2.

    With k = sigma / alpha = e^-lambda, eps_s = r eps_t + sqrt(1 - r^2) fresh and r = (k_s / k_t)^eta^2: two steps are
    the same as one, whatever eta is. For eta 0 and 1 it equals `first_order_step`.
    """
    if fresh is None:
        return first_order_step(objective, x, x0, t, s)
    alpha_t, sigma_t, alpha_s, sigma_s = objective.alpha(t), objective.sigma(t), objective.alpha(s), objective.sigma(s)
    eps = (x - alpha_t * x0) / sigma_t
    # Written so that pure noise, where k_t is infinite, gives 0: none of its eps is kept.
    kept = (sigma_s * alpha_t / (alpha_s * sigma_t)) ** eta**2
    return alpha_s * x0 + sigma_s * (kept * eps + (1 - kept**2).clamp(min=0).sqrt() * fresh)


def polynomial_step(
    objective: Objective, x: Tensor, known: list[tuple[float, Tensor]], t: Tensor, s: Tensor, here: float, there: float
) -> Tensor:
    """sigma_s / sigma_t x + alpha_s sum_j w_j x0_j: the integral of the polynomial through (lambda_j, x0_j)."""
    h = there - here
    places = np.array([(log - here) / h for log, _ in known])
    # moments[k] = h * integral of e^(-h (1 - u)) u^k over u in [0, 1], by parts.
    moments = [-math.expm1(-h)]
    for k in range(1, len(known)):
        moments.append(1 - k / h * moments[-1])
    weights = np.linalg.solve(np.vander(places, increasing=True).T, np.array(moments))
    update = sum(float(weight) * x0 for weight, (_, x0) in zip(weights, known, strict=True))
    return objective.sigma(s) / objective.sigma(t) * x + objective.alpha(s) * update


def log_ratios(objective: Objective, times: Tensor) -> list[float]:
    """ln(alpha / sigma) of each time, on the host; -inf where there is only noise, inf where there is none."""
    alpha, sigma = double(objective.alpha(times)), double(objective.sigma(times))
    return (alpha / sigma).log().tolist()


def fresh_noise(draws: Draws | None, eta: float, step: int, x: Tensor, s: Tensor) -> Tensor | None:
    """Noise for a step to s, if any is needed."""
    return drawn_noise(draws, step, x) if eta > 0 and float(s) > 0 else None


def drawn_noise(draws: Draws | None, step: int, x: Tensor) -> Tensor:
    """Standard normal noise of the shape of x for step number `step`; ValueError without the rows' randomness."""
    if draws is None:
        raise ValueError("a stochastic sampler needs draws: pass the rows' randomness")
    return draws.normal(f"step{step}", x.shape[1:])
