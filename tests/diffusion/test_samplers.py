"""Samplers against closed forms: where the data's distribution is known, so is the best denoiser, and every sampler has
to lead back to that distribution; and against diffusers' DDIM where both walk the same times."""

import pytest
import torch
from diffusers import DDIMScheduler

from ldm.diffusion.objectives import DDPM, Cosine, SqrtLinear
from ldm.diffusion.samplers import ancestral, ddim, first_order_step
from ldm.randomness import Draws

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


def draw(objective, denoise, sampler, steps):
    draws = OneGenerator()
    return sampler(denoise, objective, draws.normal("noise", (1,)), steps, draws=draws)


@pytest.mark.parametrize("schedule", [SqrtLinear(), Cosine()], ids=["sqrt_linear", "cosine"])
@pytest.mark.parametrize("sampler", [ddim, ancestral])
def test_gaussian_is_recovered(sampler, schedule):
    objective = DDPM(schedule)
    x = draw(objective, mixture_denoiser(objective, [0.5], [0.7], [1.0]), sampler, 250)
    assert x.mean().item() == pytest.approx(0.5, abs=0.04)
    assert x.std().item() == pytest.approx(0.7, rel=0.04)


@pytest.mark.parametrize("sampler", [ddim, ancestral])
def test_mixture_is_recovered(sampler):
    objective = DDPM(SqrtLinear())
    x = draw(objective, mixture_denoiser(objective, [-1.0, 1.5], [0.2, 0.4], [0.7, 0.3]), sampler, 1000)
    low = x[x < 0]
    high = x[x > 0]
    assert len(low) / N == pytest.approx(0.7, abs=0.03)
    assert low.mean().item() == pytest.approx(-1.0, abs=0.03)
    assert high.mean().item() == pytest.approx(1.5, abs=0.06)
    assert low.std().item() == pytest.approx(0.2, rel=0.1)
    assert high.std().item() == pytest.approx(0.4, rel=0.1)


def test_ddim_of_a_gaussian_converges_to_its_own_ode():
    """The probability flow of a Gaussian is linear: x0 = mean + std / sqrt(var_T) (x_T - alpha_T mean)."""
    objective = DDPM(SqrtLinear())
    denoise = mixture_denoiser(objective, [0.5], [0.7], [1.0])
    noise = torch.randn(50, 1)
    last = torch.tensor(1000.0)
    a, s = objective.alpha(last), objective.sigma(last)
    exact = 0.5 + 0.7 / (a**2 * 0.49 + s**2).sqrt() * (noise - a * 0.5)
    errors = [(ddim(denoise, objective, noise, steps) - exact).abs().mean().item() for steps in (125, 250, 500)]
    # First order: half the error for twice the steps.
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.2)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [10, 50])
def test_equals_diffusers(eta, steps):
    objective = DDPM(SqrtLinear())
    scheduler = DDIMScheduler(
        1000, 0.0015, 0.0195, "scaled_linear", clip_sample=False, timestep_spacing="trailing", prediction_type="sample"
    )
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == [t - 1 for t in objective.grid(steps)[:-1].int().tolist()]
    draws = Draws(0, range(3), 3)
    x = noise = draws.normal("noise", (2, 4, 4))

    def denoise(x, t):
        return (0.6 * x).clamp(-1, 1) + 0.01 * t / 1000

    for i, t in enumerate(scheduler.timesteps):
        fresh = draws.normal(f"step{i}", (2, 4, 4))
        x = scheduler.step(denoise(x, t + 1), t, x, eta=eta, variance_noise=fresh).prev_sample
    torch.testing.assert_close(ddim(denoise, objective, noise, steps, eta, draws), x, rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_image_depends_on_its_number_alone(eta):
    objective = DDPM(SqrtLinear())
    denoise = mixture_denoiser(objective, [0.0], [1.0], [1.0])

    def images(numbers):
        draws = Draws(0, numbers, 1)
        return ddim(denoise, objective, draws.normal("noise", (2, 4, 4)), 7, eta, draws)

    torch.testing.assert_close(images([3, 11, 5])[1:2], images([11]), rtol=0, atol=0)
    assert not torch.equal(images([11]), images([12]))


@pytest.mark.parametrize("steps", [1, 3, 400, 999, 1000])
def test_calls_and_times(steps):
    objective = DDPM(SqrtLinear())
    times = []

    def denoise(x, t):
        times.append(t.item())
        return torch.full_like(x, 0.25)

    x = ddim(denoise, objective, torch.randn(1, 1, 2, 2), steps)
    assert len(times) == steps
    assert times[0] == 1000
    assert times[-1] >= 1
    assert times == sorted(times, reverse=True)
    torch.testing.assert_close(x, torch.full_like(x, 0.25))  # the last step ends at the estimate


def test_nothing_waits_for_the_device():
    """On the meta device there are no values: reading one would be an error."""
    objective = DDPM(SqrtLinear())
    draws = Draws(0, range(2), 2, "meta")
    x = ancestral(lambda x, t: x * t, objective, torch.empty(2, 1, 4, 4, device="meta"), 5, draws)
    assert x.shape == (2, 1, 4, 4)


def test_noise_on_the_way_needs_draws():
    with pytest.raises(ValueError, match="draws"):
        ddim(lambda x, t: x, DDPM(SqrtLinear()), torch.zeros(1, 1), 5, eta=0.5)
