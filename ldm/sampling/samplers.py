"""From noise to data. Each sampler is written once for all objectives, in terms of alpha, sigma and the estimated x0.

A sampler is f(denoise, objective, x, times, draws, ...) -> x0, with x at times[0] and denoise(x (N, ...), t ()) -> x0.
Times are on the host, decrease strictly and end at 0 (timesteps.py): no loop waits for the device. Noise drawn on the
way comes from `draws`, keyed by the row's sample number, so that an image does not depend on its batch.

Every public function of this file is a sampler: `--sampler` finds it by its name, with its other parameters as settings
(`--sampler heun s_churn=40`), and a configuration names it as `{target: ldm.sampling.samplers.heun, partial: true}`.
"""

import math
from collections import deque
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ldm.diffusion.objectives import Objective
from ldm.errors import ConfigError
from ldm.randomness import Draws
from ldm.ranges import Count, Fraction, NotNegative
from ldm.sampling.guidance import Denoiser
from ldm.sampling.steps import drawn_noise, first_order_step, fresh_noise, log_ratios, polynomial_step, sde_step


class Sampler(Protocol):
    """From `x` (N,c,h,w) at times[0] to data of that shape."""

    def __call__(
        self, denoise: Denoiser, objective: Objective, x: Tensor, times: Tensor, *, draws: Draws
    ) -> Tensor: ...


@torch.no_grad()
def ddim(
    denoise: Denoiser,
    objective: Objective,
    x: Tensor,
    times: Tensor,
    draws: Draws | None = None,
    eta: Fraction = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2021), which is Euler's method for EDM and flows; one call of `denoise` per step.

    Args:
        x: (N, ...) float32 at times[0].
        times: (steps + 1,) on the host.
        draws: the rows' randomness on x's device; needed if eta > 0.
        eta: 0 = deterministic ... 1 = ancestral.
    """
    for i, (t, s) in enumerate(pairwise(times)):
        x = first_order_step(objective, x, denoise(x, t), t, s, eta, fresh_noise(draws, eta, i, x, s))
    return x


def euler(denoise: Denoiser, objective: Objective, x: Tensor, times: Tensor, draws: Draws | None = None) -> Tensor:
    """Euler's method, in x0 and eps: `ddim` without noise, under the name that it has for EDM and flows."""
    return ddim(denoise, objective, x, times, draws)


def ancestral(denoise: Denoiser, objective: Objective, x: Tensor, times: Tensor, draws: Draws) -> Tensor:
    """DDPM's own sampler (Ho et al. 2020, algorithm 2), with the posterior's variance; the SDE of flows and EDM."""
    return ddim(denoise, objective, x, times, draws, eta=1.0)


@torch.no_grad()
def heun(
    denoise: Denoiser,
    objective: Objective,
    x: Tensor,
    times: Tensor,
    draws: Draws | None = None,
    s_churn: NotNegative = 0.0,
    s_tmin: NotNegative = 0.0,
    s_tmax: NotNegative = math.inf,
    s_noise: NotNegative = 1.0,
) -> Tensor:
    """Heun's second-order method; two calls of `denoise` per step, one in the last.

    It integrates dx = x0 d(alpha) + eps d(sigma). On EDM's path that is the paper's sampler (Karras et al. 2022,
    algorithm 2), on a straight path Heun's method on the velocity (as Ma et al. 2024, "SiT").

    Args:
        x: (N, ...) float32 at times[0].
        times: (steps + 1,) on the host.
        draws: the rows' randomness on x's device; needed if s_churn > 0.
        s_churn: noise added on the way, S_churn. It raises sigma / alpha by at most a factor sqrt(2), even beyond
            `t_max` if the path continues (EDM); if the path ends there (DDPM, flows), no further than to its end, so
            that nothing is added at its last level.
        s_tmin, s_tmax: the ratios sigma / alpha between which it is added, S_min and S_max.
        s_noise: factor on the standard deviation of the noise added, S_noise.

    Raises:
        ConfigError: nothing lies between `s_tmin` and `s_tmax`.
    """
    if not s_tmin <= s_tmax:
        raise ConfigError(f"heun: expected s_tmin <= s_tmax, found {s_tmin:g} and {s_tmax:g}")
    gamma = min(s_churn / (len(times) - 1), math.sqrt(2) - 1)
    for i, (t, s) in enumerate(pairwise(times)):
        ratio = objective.sigma(t) / objective.alpha(t)
        if gamma > 0 and s_tmin <= float(ratio) <= s_tmax and math.isfinite(float(ratio)):
            noisier = objective.time_at(ratio * (1 + gamma))
            more = (objective.sigma(noisier) / objective.alpha(noisier)) ** 2 - ratio**2
            fresh = drawn_noise(draws, i, x)
            x = objective.alpha(noisier) * (x / objective.alpha(t) + s_noise * more.clamp(min=0).sqrt() * fresh)
            t = noisier
        x = _heun_step(denoise, objective, x, t, s)
    return x


def _heun_step(denoise: Denoiser, objective: Objective, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """From t to s along the mean x0 and eps of both ends; to the data itself, where eps is undefined, along t's alone.

    x = alpha x0 + sigma eps follows dx = x0 d(alpha) + eps d(sigma), even where alpha or sigma is 0. On standardized
    data, with 10 to 40 steps, the error is 1.2 to 14 times smaller on flows than along d(x / alpha) = eps d(sigma /
    alpha), and 1.3 to 40 times smaller on DDPM with the schedule `Karras`. With DDPM's evenly spaced times the last
    step dominates, and both are about equal (the alternative is better only for white noise); on the cosine noise
    schedule, whose last ratios are huge, the alternative diverges.
    """
    x0 = denoise(x, t)
    ahead = first_order_step(objective, x, x0, t, s)
    alpha_t, sigma_t, alpha_s, sigma_s = objective.alpha(t), objective.sigma(t), objective.alpha(s), objective.sigma(s)
    if float(sigma_s) == 0:
        return ahead
    x0_ahead = denoise(ahead, s)
    eps, eps_ahead = (x - alpha_t * x0) / sigma_t, (ahead - alpha_s * x0_ahead) / sigma_s
    return x + (alpha_s - alpha_t) * (x0 + x0_ahead) / 2 + (sigma_s - sigma_t) * (eps + eps_ahead) / 2


@torch.no_grad()
def dpmpp_2m(
    denoise: Denoiser,
    objective: Objective,
    x: Tensor,
    times: Tensor,
    draws: Draws | None = None,
    eta: Fraction = 0.0,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022), and with eta = 1 its SDE form; second order with one `denoise` per step.

    The estimated data is extrapolated to the middle of the step, in lambda = ln(alpha / sigma), from its last two
    values. The first and the last step are first-order.

    Args:
        x: (N, ...) float32 at times[0].
        times: (steps + 1,) on the host.
        draws: the rows' randomness on x's device; needed if eta > 0.
        eta: 0 = deterministic ... 1 = the reverse SDE. In between, noise with eta times the SDE's standard deviation is
            added, and the drift compensates for it, so that the noise at every level stays the same:
            dx = (f x - (1 + eta^2) / 2 g^2 score) dt + eta g dw (Karras et al. 2022, eq. 6, with
            beta = eta^2 sigma' / sigma; eta^2 is the eta of k-diffusion's DPM-Solver++).
    """
    before: Tensor | None = None
    logs = log_ratios(objective, times)
    for i, (t, s) in enumerate(pairwise(times)):
        x0 = denoise(x, t)
        carried = x0
        if before is not None and math.isfinite(logs[i + 1]):
            ahead = (logs[i + 1] - logs[i]) / (2 * (logs[i] - logs[i - 1]))
            carried = x0 + ahead * (x0 - before)
        x = sde_step(objective, x, carried, t, s, eta, fresh_noise(draws, eta, i, x, s))
        before = x0
    return x


def dpmpp_2m_sde(denoise: Denoiser, objective: Objective, x: Tensor, times: Tensor, draws: Draws) -> Tensor:
    """DPM-Solver++(2M) of the reverse SDE: `dpmpp_2m` with eta = 1."""
    return dpmpp_2m(denoise, objective, x, times, draws, eta=1.0)


@torch.no_grad()
def unipc(
    denoise: Denoiser,
    objective: Objective,
    x: Tensor,
    times: Tensor,
    draws: Draws | None = None,
    order: Count = 2,
) -> Tensor:
    """A predictor-corrector with one call of `denoise` per step, of order `order` + 1 (UniPC: Zhao et al. 2023).

    With lambda = ln(alpha / sigma), x_s = sigma_s / sigma_t x_t + sigma_s times the integral of e^lambda x0(lambda)
    from t to s. The predictor integrates the polynomial through the last `order` estimates of x0; the corrector repeats
    the step with one more point once x0 is known at its end. The first steps have fewer points; the last step, to the
    data, is first-order. (An order above 2 gains little, since the first steps limit it.)
    """
    logs = log_ratios(objective, times)
    known: deque[tuple[float, Tensor]] = deque(maxlen=order)  # (lambda, x0), newest last
    begin = x
    for i, (t, s) in enumerate(pairwise(times)):
        x0 = denoise(x, t)
        if known:  # from the second step on, unless the first started from pure noise
            # Repeat the step that led here, with the estimate at its end.
            x = polynomial_step(objective, begin, [*known, (logs[i], x0)], times[i - 1], t, logs[i - 1], logs[i])
        if math.isfinite(logs[i]):
            known.append((logs[i], x0))
        begin = x
        if math.isfinite(logs[i + 1]) and math.isfinite(logs[i]):
            x = polynomial_step(objective, x, [*known], t, s, logs[i], logs[i + 1])
        else:
            x = first_order_step(objective, x, x0, t, s)
    return x
