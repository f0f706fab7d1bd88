"""DPM-Solver++ as a solver of eta's reverse SDE, against what is known of it for Gaussian data."""

import itertools
import math

import pytest
import torch

from ldm.diffusion.noise_schedules import SqrtLinear, ZeroTerminal
from ldm.diffusion.objectives import DDPM, EDM, Flow, Interpolant
from ldm.diffusion.paths import GVP, VP
from ldm.diffusion.predictions import V
from ldm.sampling.samplers import dpmpp_2m
from ldm.sampling.timesteps import karras

OBJECTIVES = {
    "ddpm": DDPM(SqrtLinear()),
    "zero_terminal": DDPM(ZeroTerminal(SqrtLinear()), V()),
    "edm": EDM(),
    "flow": Flow(),
    "gvp": Interpolant(GVP()),
    "vp": Interpolant(VP()),
}


class Impulses:
    """Row 0 is what x starts with, row i + 1 gets a 1 at step i: of what is linear, squares add up to the variance."""

    def __init__(self, steps):
        self.rows = steps + 1

    def normal(self, purpose, shape):
        row = int(purpose.removeprefix("step")) + 1
        return torch.eye(self.rows, dtype=torch.float64)[row].reshape(self.rows, *[1] * len(shape))


def variances(objective, std, times, eta, every=1):
    """Of the sampler's x at each `every`th of `times`, for Gaussian data of mean 0, and the right ones."""

    def denoise(x, t):
        a, s = objective.alpha(t), objective.sigma(t)
        return a * std**2 / (a**2 * std**2 + s**2) * x

    right = ((objective.alpha(times) * std) ** 2 + objective.sigma(times) ** 2).double()
    found = []
    for end in range(every + 1, len(times) + 1, every):
        x = torch.zeros(len(times), 1, dtype=torch.float64)
        x[0] = right[0].sqrt()
        x = dpmpp_2m(denoise, objective, x, times[:end], Impulses(len(times) - 1), eta)
        found.append(x.square().sum())
    return torch.stack(found), right[every::every]


ETAS = [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_noise_is_right_at_every_step_where_the_data_is_a_point(objective, eta):
    """There its estimate is constant, so that every step is exact, however long."""
    objective = OBJECTIVES[objective]
    found, right = variances(objective, 0.0, karras(objective, 6, (1, 1, 1), 0.05).double(), eta)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("objective", ["edm", "flow", "gvp", "vp"])
def test_the_variance_is_right_at_every_step_in_the_limit(objective, eta):
    objective = OBJECTIVES[objective]

    def error(steps):
        ratios = torch.exp(torch.linspace(2, -3, steps + 1, dtype=torch.float64))
        found, right = variances(objective, 0.7, objective.time_at(ratios), eta, every=steps // 10)
        return (found / right - 1).abs().max().item()

    coarse, fine = error(20), error(80)
    assert fine < 0.05
    assert fine < coarse / 3  # of first order at least


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("objective", ["edm", "flow", "gvp", "vp"])
def test_noise_is_forgotten_at_the_pace_of_the_sde(objective, eta):
    """Around a point of data eps decays by (ratio_s / ratio_t)^eta^2, whatever the steps between t and s."""
    objective = OBJECTIVES[objective]
    ends = torch.tensor([2.0, -1.0], dtype=torch.float64)
    for steps in (1, 2, 7):
        ratios = torch.exp(ends[0] + torch.linspace(0, 1, steps + 1, dtype=torch.float64) * (ends[1] - ends[0]))
        times = objective.time_at(ratios)
        x = torch.zeros(steps + 1, 1, dtype=torch.float64)
        x[0] = objective.sigma(times[0])  # eps = 1
        x = dpmpp_2m(lambda x, t: torch.zeros_like(x), objective, x, times, Impulses(steps), eta)
        kept = (x[0, 0] / objective.sigma(times[-1])).item()
        assert kept == pytest.approx(math.exp(eta**2 * (ends[1] - ends[0]).item()), rel=1e-6)


@pytest.mark.parametrize("eta", ETAS)
def test_a_step_is_that_of_k_diffusion(eta):
    """Its DPM-Solver++(2M) SDE on EDM's path, whose eta multiplies the step in lambda: it is ours squared."""
    objective, x = EDM(), torch.randn(5, 3, dtype=torch.float64)
    times = objective.timesteps(6).double()[:-1]
    noises = [torch.randn(5, 3, dtype=torch.float64) for _ in range(5)]

    class Given:
        def normal(self, purpose, shape):
            return noises[int(purpose.removeprefix("step"))]

    def denoise(x, t):
        return torch.tanh(x / (1 + t))

    y, before, h_before = x, None, None
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        x0, h = denoise(y, t), (t / s).log()
        total = h + eta**2 * h
        y = s / t * torch.exp(-(eta**2) * h) * y - torch.expm1(-total) * x0
        if before is not None:
            y = y - 0.5 * torch.expm1(-total) * (h / h_before) * (x0 - before)
        y = y + noises[i] * s * (-torch.expm1(-2 * eta**2 * h)).sqrt()
        before, h_before = x0, h
    torch.testing.assert_close(dpmpp_2m(denoise, objective, x, times, Given(), eta), y, rtol=1e-6, atol=1e-6)
