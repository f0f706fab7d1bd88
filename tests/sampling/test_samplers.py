"""Samplers against closed forms: where the data's distribution is known, so is the best denoiser, and every sampler has
to lead back to that distribution; and against diffusers' DDIM where both walk the same times."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from ldm.diffusion.noise_schedules import Cosine, SqrtLinear, ZeroTerminal
from ldm.diffusion.objectives import DDPM, EDM, Flow, Interpolant
from ldm.diffusion.paths import GVP, VP
from ldm.diffusion.predictions import V
from ldm.errors import ConfigError
from ldm.randomness import Draws
from ldm.sampling.samplers import ancestral, ddim, dpmpp_2m, dpmpp_2m_sde, euler, heun, unipc
from ldm.sampling.steps import first_order_step, start
from ldm.sampling.timesteps import compvis, karras

N = 4000


def mixture_denoiser(objective, means, stds, weights):
    """E[x0 | x_t] for x0 from a mixture of Gaussians, independent in every dimension."""
    means, stds, weights = (torch.tensor(v) for v in (means, stds, weights))

    def denoise(x, t):
        a, s = objective.alpha(t), objective.sigma(t)
        var = a**2 * stds**2 + s**2
        gap = x[..., None] - a * means
        share = (weights.log() - var.log() / 2 - gap**2 / (2 * var)).softmax(-1)
        return (share * (means + stds**2 * a / var * gap)).sum(-1)

    return denoise


class OneGenerator:
    """Draws for very many rows at once, whose addresses do not matter."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, purpose, shape):
        return torch.randn(N, *shape, generator=self.generator)


def half_sde(*args, **kwargs):
    return dpmpp_2m(*args, eta=0.5, **kwargs)


def churned(*args, **kwargs):
    return heun(*args, s_churn=20.0, **kwargs)


ONE = (1, 1, 1)
"""The shape of a latent, which only some schedules need."""
SAMPLERS = {
    "ddim": ddim,
    "euler": euler,
    "ancestral": ancestral,
    "heun": heun,
    "churned": churned,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_2m_half_sde": half_sde,
    "unipc": unipc,
}
OBJECTIVES = {
    "ddpm": DDPM(SqrtLinear()),
    "cosine": DDPM(Cosine()),
    "zero_terminal": DDPM(ZeroTerminal(SqrtLinear()), V()),
    "edm": EDM(),
    "flow": Flow(),
    "gvp": Interpolant(GVP()),
    "vp": Interpolant(VP()),
}


def draw(objective, denoise, sampler):
    """As many steps as the sampler's order makes necessary."""
    steps = {ancestral: 1000, ddim: 250}.get(sampler, 60)
    draws, times = OneGenerator(), objective.timesteps(1000) if steps == 1000 else karras(objective, steps, ONE, 0.01)
    return sampler(denoise, objective, start(objective, draws.normal("noise", (1,)), times[0]), times, draws=draws)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gaussian_is_recovered(sampler, objective):
    objective = OBJECTIVES[objective]
    x = draw(objective, mixture_denoiser(objective, [0.5], [0.7], [1.0]), SAMPLERS[sampler])
    assert x.mean().item() == pytest.approx(0.5, abs=0.05)
    assert x.std().item() == pytest.approx(0.7, rel=0.05)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_mixture_is_recovered(sampler, objective):
    objective = OBJECTIVES[objective]
    denoise = mixture_denoiser(objective, [-1.0, 1.5], [0.2, 0.4], [0.7, 0.3])
    x = draw(objective, denoise, SAMPLERS[sampler])
    low = x[x < 0]
    high = x[x > 0]
    assert len(low) / N == pytest.approx(0.7, abs=0.03)
    assert low.mean().item() == pytest.approx(-1.0, abs=0.03)
    assert high.mean().item() == pytest.approx(1.5, abs=0.06)
    assert low.std().item() == pytest.approx(0.2, rel=0.12)
    assert high.std().item() == pytest.approx(0.4, rel=0.12)


ORDERS = {"ddim": 1, "heun": 2, "dpmpp_2m": 2, "unipc": 3}


@pytest.mark.parametrize("sampler", ORDERS)
@pytest.mark.parametrize("objective", ["edm", "flow", "gvp", "vp"])
def test_errors_fall_at_the_sampler_s_order(sampler, objective):
    """Between two times where everything is smooth, in double precision; the slope over a doubling of the steps.

    The probability flow of a Gaussian is linear: x_s = alpha_s m + (x_t - alpha_t m) sqrt(var_s / var_t).
    """
    objective, order = OBJECTIVES[objective], ORDERS[sampler]
    mean, std = 0.5, 0.7
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]

    def denoise(x, t):
        a, s = objective.alpha(t), objective.sigma(t)
        return mean + std**2 * a / (a**2 * std**2 + s**2) * (x - a * mean)

    def error(steps):
        # Even in ln(sigma / alpha), from 4 down to 0.25.
        ratios = torch.exp(torch.linspace(1, -1, steps + 1, dtype=torch.float64) * torch.log(torch.tensor(4.0)))
        times = objective.time_at(ratios)
        (a, b), (s, r) = ([f(times[i]) for i in (0, -1)] for f in (objective.alpha, objective.sigma))
        exact = b * mean + (x - a * mean) * ((b**2 * std**2 + r**2) / (a**2 * std**2 + s**2)).sqrt()
        return (SAMPLERS[sampler](denoise, objective, x, times) - exact).abs().max().item()

    slope = math.log2(error(100) / error(200))
    assert slope == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_few_steps_of_high_order_are_worth_many_of_first(objective):
    objective = OBJECTIVES[objective]
    denoise = mixture_denoiser(objective, [-1.0, 1.5], [0.5, 0.6], [0.6, 0.4])
    noise = torch.randn(64, 1)

    def run(sampler, steps):
        times = karras(objective, steps, ONE, 0.01)
        return sampler(denoise, objective, start(objective, noise, times[0]), times)

    exact = run(heun, 300)
    first = (run(ddim, 24) - exact).abs().mean()
    for sampler in (heun, dpmpp_2m, unipc):
        assert (run(sampler, 24) - exact).abs().mean() < first / 2, sampler


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [10, 50])
def test_equals_diffusers(eta, steps):
    objective = DDPM(SqrtLinear())
    scheduler = DDIMScheduler(
        1000, 0.0015, 0.0195, "scaled_linear", clip_sample=False, timestep_spacing="trailing", prediction_type="sample"
    )
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == [t - 1 for t in objective.timesteps(steps)[:-1].int().tolist()]
    draws = Draws(0, range(3), 3)
    x = noise = draws.normal("noise", (2, 4, 4))

    def denoise(x, t):
        return (0.6 * x).clamp(-1, 1) + 0.01 * t / 1000

    for i, t in enumerate(scheduler.timesteps):
        fresh = draws.normal(f"step{i}", (2, 4, 4))
        x = scheduler.step(denoise(x, t + 1), t, x, eta=eta, variance_noise=fresh).prev_sample
    torch.testing.assert_close(
        ddim(denoise, objective, noise, objective.timesteps(steps), draws, eta), x, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [10, 50])
def test_equals_ddim_of_latent_diffusion_on_its_own_times(eta, steps):
    """Song et al. 2021, eq. 12 and 16, over the levels that CompVis' code visits; its last step ends at index 0."""
    bars = (1 - torch.from_numpy(SqrtLinear().betas(1000))).cumprod(0)
    indices = [index + 1 for index in range(0, 1000, 1000 // steps)]
    objective, draws = DDPM(SqrtLinear()), Draws(0, range(3), 3)
    noise = draws.normal("noise", (2, 4, 4))

    def denoise(x, t):
        return (0.6 * x).clamp(-1, 1) + 0.01 * t / 1000

    x = noise.double()
    for i, (index, before) in enumerate(zip(reversed(indices), [*reversed(indices[:-1]), 0], strict=True)):
        bar, bar_before = bars[index], bars[before]
        x0 = denoise(x, index + 1)
        eps = (x - bar.sqrt() * x0) / (1 - bar).sqrt()
        spread = eta * ((1 - bar_before) / (1 - bar) * (1 - bar / bar_before)).sqrt()
        fresh = draws.normal(f"step{i}", (2, 4, 4))
        x = bar_before.sqrt() * x0 + (1 - bar_before - spread**2).sqrt() * eps + spread * fresh
    times = compvis(objective, steps, ONE)
    ours = ddim(denoise, objective, noise, times, draws, eta)
    torch.testing.assert_close(ours.double(), x, rtol=1e-3, atol=1e-3)
    # Ending at the data instead leaves out the noise of the first level, 0.039 of it.
    cleaned = ddim(denoise, objective, noise, torch.cat([times[:-1], torch.zeros(1)]), draws, eta)
    assert (cleaned - ours).square().mean().sqrt() > 0.02


def test_eta_one_is_the_posterior_of_ddpm():
    """Ho et al. 2020, eq. 7: mean and variance of q(x_{t-1} | x_t, x0)."""
    objective = DDPM(SqrtLinear())
    betas = torch.from_numpy(SqrtLinear().betas(1000))
    bars = torch.cat([torch.ones(1).double(), (1 - betas).cumprod(0)])
    for t in (2, 10, 500, 1000):
        x, x0 = torch.randn(5, 3), torch.randn(5, 3)
        step = [
            first_order_step(objective, x, x0, torch.tensor(float(t)), torch.tensor(t - 1.0), 1.0, fresh).double()
            for fresh in (torch.zeros(5, 3), torch.ones(5, 3))
        ]
        beta, bar, before = betas[t - 1], bars[t], bars[t - 1]
        mean = before.sqrt() * beta / (1 - bar) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - bar) * x
        std = ((1 - before) / (1 - bar) * beta).sqrt()
        torch.testing.assert_close(step[0], mean.double(), rtol=2e-3, atol=2e-4)
        torch.testing.assert_close(step[1] - step[0], std.expand(5, 3), rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_depends_on_its_number_alone(sampler):
    objective = DDPM(SqrtLinear())
    denoise = mixture_denoiser(objective, [0.0], [1.0], [1.0])

    def images(numbers):
        draws = Draws(0, numbers, 1)
        noise = draws.normal("noise", (2, 4, 4))
        return SAMPLERS[sampler](denoise, objective, noise, objective.timesteps(7), draws=draws)

    torch.testing.assert_close(images([3, 11, 5])[1:2], images([11]), rtol=0, atol=0)
    assert not torch.equal(images([11]), images([12]))


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_calls_and_times(sampler, steps):
    objective = DDPM(SqrtLinear())
    times = []

    def denoise(x, t):
        assert t.shape == ()
        times.append(t.item())
        return torch.full_like(x, 0.25)

    draws = Draws(0, [0], 1)
    x = SAMPLERS[sampler](denoise, objective, torch.randn(1, 1, 2, 2), objective.timesteps(steps), draws=draws)
    assert len(times) == (2 * steps - 1 if "heun" in sampler or "churned" in sampler else steps)
    assert times[0] == 1000
    assert times[-1] >= 1
    torch.testing.assert_close(x, torch.full_like(x, 0.25))  # the last step ends at the estimate


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nothing_waits_for_the_device(sampler, objective):
    """On the meta device there are no values: reading one would be an error."""
    objective = OBJECTIVES[objective]
    draws, times = Draws(0, range(2), 2, "meta"), objective.timesteps(5)
    x = start(objective, torch.empty(2, 1, 4, 4, device="meta"), times[0])
    x = SAMPLERS[sampler](lambda x, t: x * t, objective, x, times, draws=draws)
    assert x.shape == (2, 1, 4, 4)


@pytest.mark.parametrize("sampler", ["ancestral", "churned", "dpmpp_2m_sde", "dpmpp_2m_half_sde"])
def test_noise_on_the_way_needs_draws(sampler):
    objective = DDPM(SqrtLinear())
    with pytest.raises(ValueError, match="draws"):
        SAMPLERS[sampler](lambda x, t: x, objective, torch.zeros(1, 1), objective.timesteps(5), draws=None)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_start_has_the_spread_of_the_last_level_and_keeps_an_image(objective):
    objective = OBJECTIVES[objective]
    noise, x0 = torch.randn(4000, 1), torch.randn(4000, 1)
    last = torch.tensor(objective.t_max)
    of_data = objective.alpha(last) * x0 + objective.sigma(last) * noise
    assert start(objective, noise, last).std().item() == pytest.approx(of_data.std().item(), rel=0.05)
    early = objective.time_at(torch.tensor(0.05))
    assert (start(objective, noise, early, x0) / objective.alpha(early) - x0).std().item() == pytest.approx(
        0.05, rel=0.1
    )


def test_churn_between_levels_in_the_wrong_order_is_refused():
    with pytest.raises(ConfigError, match="s_tmin <= s_tmax, found 3 and 2"):
        heun(lambda x, t: x, EDM(), torch.zeros(1, 2), EDM().timesteps(2), s_churn=1.0, s_tmin=3.0, s_tmax=2.0)
