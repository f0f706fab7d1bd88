"""Inpainting by going back: against the exact conditional of a Gaussian, of which one half is known."""

import math
from functools import partial

import pytest
import torch

from ldm.diffusion.noise_schedules import SqrtLinear
from ldm.diffusion.objectives import DDPM, EDM, Flow
from ldm.errors import ConfigError
from ldm.normals import GeneratorPerRow
from ldm.randomness import Draws
from ldm.sampling.img2img import inpaint
from ldm.sampling.repaint import RePaint, noisier
from ldm.sampling.samplers import ancestral, ddim, dpmpp_2m, heun, unipc
from ldm.sampling.steps import start

RHO, KNOWN, N = 0.9, 1.5, 1000
OBJECTIVES = {"ddpm": DDPM(SqrtLinear()), "flow": Flow(), "edm": EDM()}
SAMPLERS = {"ddim": ddim, "ancestral": ancestral, "heun": heun, "dpmpp_2m": partial(dpmpp_2m, eta=1.0), "unipc": unipc}


def denoiser(objective):
    """E[x0 | x_t] of pairs (N,2,1,1) of standard normals with correlation RHO."""
    covariance = torch.tensor([[1.0, RHO], [RHO, 1.0]])

    def denoise(x, t):
        alpha, sigma = objective.alpha(t), objective.sigma(t)
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2))
        return (x[:, :, 0, 0] @ gain.T)[:, :, None, None]

    return denoise


def inpainted(objective, sampler, steps=20, numbers=range(N)):
    """Pairs whose first value is KNOWN: (N,2)."""
    # The bounds are near what some noise gives, whatever makes it; with this they hold.
    draws = Draws(0, list(numbers), len(numbers), normals=GeneratorPerRow())
    times = objective.timesteps(steps)
    x = start(objective, draws.normal("noise", (2, 1, 1)), times[0])
    known, kept = (torch.tensor(pair).reshape(1, 2, 1, 1) for pair in ([KNOWN, 0.0], [True, False]))
    return sampler(inpaint(denoiser(objective), known, kept), objective, x, times, draws=draws)[:, :, 0, 0]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_resampled_once_is_the_sampler_bit_for_bit(sampler):
    plain = inpainted(Flow(), SAMPLERS[sampler])
    assert torch.equal(inpainted(Flow(), RePaint(SAMPLERS[sampler], 1, 5)), plain)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_more_resamplings_come_nearer_to_the_exact_conditional(sampler, objective):
    """Its mean is RHO KNOWN = 1.35, its standard deviation 0.44; plain inpainting has about 0.7 and 0.7."""
    mean, std = RHO * KNOWN, math.sqrt(1 - RHO**2)
    errors = []
    for resamplings in (1, 2, 8):
        pairs = inpainted(OBJECTIVES[objective], RePaint(SAMPLERS[sampler], resamplings, 2))
        assert torch.allclose(pairs[:, 0], torch.tensor(KNOWN), atol=1e-5)
        errors.append((abs(pairs[:, 1].mean() - mean), abs(pairs[:, 1].std() - std)))
    means, stds = zip(*errors, strict=True)
    assert means[0] > means[1] > means[2]
    assert means[2] < 0.4 * means[0]
    assert stds[2] < 0.12


def test_going_back_keeps_the_distribution_at_every_time():
    """x_s = alpha_s x0 + sigma_s eps becomes x_t of the same x0: variance and covariance with it."""
    x0, eps, noise = torch.randn(3, 100_000, generator=torch.Generator().manual_seed(0))
    for objective in OBJECTIVES.values():
        times = objective.timesteps(10)
        for s, t in ((times[6], times[3]), (times[-1], times[7]), (times[4], times[0])):
            x = noisier(objective, objective.alpha(s) * x0 + objective.sigma(s) * eps, s, t, noise)
            variance = float(objective.alpha(t) ** 2 + objective.sigma(t) ** 2)
            assert float(x.var()) == pytest.approx(variance, rel=0.03)
            assert float((x * x0).mean()) == pytest.approx(float(objective.alpha(t)), abs=0.02 * variance**0.5)


@pytest.mark.parametrize("sampler", [ddim, ancestral])
def test_a_row_depends_on_its_number_alone_and_no_noise_comes_twice(sampler):
    repaint, seen = RePaint(sampler, 3, 5), []
    together = inpainted(Flow(), repaint, 20, range(6))
    assert torch.allclose(inpainted(Flow(), repaint, 20, [4]), together[4:5], atol=1e-6)

    def noting(*args, draws):
        seen.append(draws.normal("step0", (1,)).tolist())
        return sampler(*args, draws=draws)

    inpainted(Flow(), RePaint(noting, 3, 5), 20, range(2))
    assert len(seen) == 1 + 3 * 3  # the first five steps once, the others three times
    assert len({str(noise) for noise in seen}) == len(seen)


def test_steps_that_are_no_multiple_of_the_jump_are_all_taken():
    taken = []

    def noting(denoise, objective, x, times, *, draws):
        taken.append(times.tolist())
        return x

    times = Flow().timesteps(7)
    RePaint(noting, 2, 3)(lambda x, t: x, Flow(), torch.zeros(1, 1), times, draws=Draws(0, [0], 1))
    expected = [times[:2], *[times[1:5]] * 2, *[times[4:]] * 2]
    assert taken == [part.tolist() for part in expected]


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="resamplings: expected 1 or more, found 0"):
        RePaint(ddim, 0)
    with pytest.raises(ConfigError, match="jump: expected 1 or more, found 0"):
        RePaint(ddim, 2, 0)
    with pytest.raises(ConfigError, match="jump 20: expected fewer than the 20 steps"):
        inpainted(Flow(), RePaint(ddim, 2, 20))
