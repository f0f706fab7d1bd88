"""Heun's method and s_churn, against their papers' algorithms and exact solutions."""

import math
from itertools import pairwise

import pytest
import torch

from ldm.diffusion.noise_schedules import Cosine, Linear, SqrtLinear, ZeroTerminal
from ldm.diffusion.objectives import DDPM, EDM, Flow, Interpolant
from ldm.diffusion.paths import GVP, VP
from ldm.diffusion.predictions import V
from ldm.sampling.samplers import heun
from ldm.sampling.steps import first_order_step, start
from ldm.sampling.timesteps import default, karras

WIDE = torch.linspace(0.2, 2.2, 16, dtype=torch.float64)
SPECTRUM = WIDE / WIDE.square().mean().sqrt()  # standard deviations of standardized data whose directions differ


class Noises:
    """Draws whose noise is known to the test."""

    def __init__(self, shape):
        self.generator = torch.Generator().manual_seed(0)
        self.shape = shape
        self.drawn = []

    def normal(self, purpose, shape):
        self.drawn.append(torch.randn(self.shape, generator=self.generator, dtype=torch.float64))
        return self.drawn[-1]


def gaussian(objective, stds):
    """E[x0 | x] for Gaussian data of mean 0."""

    def denoise(x, t):
        a, s = objective.alpha(t).double(), objective.sigma(t).double()
        return a * stds**2 / (a**2 * stds**2 + s**2) * x

    return denoise


def mixture(objective):
    """E[x0 | x] for eight bumps in 16 dimensions, standardized as a whole."""
    centers = torch.randn(8, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    centers, spread = centers - centers.mean(0), 0.4
    centers = centers / centers.square().mean().sqrt() * math.sqrt(1 - spread**2)

    def denoise(x, t):
        a, s = objective.alpha(t).double(), objective.sigma(t).double()
        var = a**2 * spread**2 + s**2
        gap = x[:, None] - a * centers
        share = (-gap.square().sum(-1) / (2 * var)).softmax(-1)[..., None]
        return (share * (centers + spread**2 * a / var * gap)).sum(1)

    return denoise


def algorithm_2(denoise, noises, x, levels, s_churn, low, high, s_noise):
    """Karras et al. 2022, algorithm 2, line by line; returns the levels that it visited as well."""
    steps, visited = len(levels) - 1, []
    for i in range(steps):
        level, following = levels[i], levels[i + 1]
        gamma = min(s_churn / steps, math.sqrt(2) - 1) if low <= level <= high else 0.0
        raised = level + gamma * level
        visited.append(raised)
        if gamma > 0:
            x = x + math.sqrt(raised**2 - level**2) * s_noise * noises.pop(0)
        slope = (x - denoise(x, torch.tensor(raised, dtype=torch.float64))) / raised
        there = x + (following - raised) * slope
        if following != 0:
            other = (there - denoise(there, torch.tensor(following, dtype=torch.float64))) / following
            there = x + (following - raised) * (slope + other) / 2
        x = there
    return x, visited


CHURNS = {
    "none": (0.0, 0.0, math.inf, 1.0),
    "a little": (2.0, 0.0, math.inf, 1.0),
    "more than can be": (200.0, 0.0, math.inf, 1.003),
    "in the middle": (40.0, 0.05, 50.0, 1.003),  # the paper's for ImageNet-64
    "above the last level": (40.0, 80.0, math.inf, 1.0),
}


@pytest.mark.parametrize("s_churn", CHURNS)
@pytest.mark.parametrize("steps", [1, 2, 18])
def test_equals_algorithm_2_on_edm(s_churn, steps):
    objective, (amount, low, high, s_noise) = EDM(), CHURNS[s_churn]
    times, noises = objective.timesteps(steps).double(), Noises((6, 16))
    denoise, x = mixture(objective), 80 * torch.randn(6, 16, dtype=torch.float64)
    ours = heun(denoise, objective, x, times, noises, amount, low, high, s_noise)
    expected, visited = algorithm_2(denoise, noises.drawn, x, times.tolist(), amount, low, high, s_noise)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    if amount and s_churn != "in the middle":
        assert max(visited) > 80  # the original goes beyond where sampling starts


def test_churn_goes_beyond_the_last_level_where_the_path_does():
    """And is cut off at the end of a path that ends: nothing is noisier than DDPM's last level or pure noise."""

    def visited(objective):
        times = []

        def denoise(x, t):
            times.append(float(t))
            return 0.5 * x

        draws = Noises((2, 3))
        heun(
            denoise,
            objective,
            torch.randn(2, 3, dtype=torch.float64),
            objective.timesteps(4).double(),
            draws,
            s_churn=100.0,
        )
        return times, draws.drawn

    times, noises = visited(EDM())
    assert times[0] == pytest.approx(80 * math.sqrt(2))
    assert len(noises) == 4
    for objective in (DDPM(SqrtLinear()), Flow(), Interpolant(GVP()), Interpolant(VP())):
        times, _ = visited(objective)
        grid = objective.timesteps(4).tolist()
        assert times[0] == max(times) == objective.t_max
        assert all(raised > t for raised, t in zip(times[2::2], grid[1:-1], strict=True))


@pytest.mark.parametrize("objective", [DDPM(SqrtLinear()), Flow(), Interpolant(VP())], ids=["ddpm", "flow", "vp"])
def test_churn_at_the_end_of_a_path_changes_nothing(objective):
    """One step from the last level: there is no noisier one, so it is the step without churn."""
    x, times = torch.randn(4, 16, dtype=torch.float64), torch.tensor([objective.t_max, 0.5 * objective.t_max])
    denoise = gaussian(objective, SPECTRUM)
    churned = heun(denoise, objective, x, times, Noises((4, 16)), s_churn=100.0)
    torch.testing.assert_close(churned, heun(denoise, objective, x, times), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("steps", [2, 10])
def test_is_heun_s_method_on_the_velocity_of_a_flow(steps):
    """As SiT integrates: x + h (v(x, t) + v(x + h v, t + h)) / 2; the last step, to the data, is Euler's."""
    objective = Flow()
    denoise, times = mixture(objective), torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    noise = torch.randn(5, 16, dtype=torch.float64)

    def velocity(x, t):
        return (x - denoise(x, t)) / t  # eps - x0, with x = (1 - t) x0 + t eps

    x = noise
    for t, s in pairwise(times):
        slope = velocity(x, t)
        ahead = x + (s - t) * slope
        x = ahead if s == 0 else x + (s - t) * (slope + velocity(ahead, s)) / 2
    torch.testing.assert_close(heun(denoise, objective, noise, times), x, rtol=1e-9, atol=1e-9)


def along_the_ratio(denoise, objective, x, times):
    """Heun's method on x / alpha over sigma / alpha, and where alpha is 0 on x / sigma over alpha / sigma."""
    for t, s in pairwise(times):
        a, n, b, m = objective.alpha(t), objective.sigma(t), objective.alpha(s), objective.sigma(s)
        x0 = denoise(x, t)
        ahead = first_order_step(objective, x, x0, t, s)
        if m == 0:
            x = ahead
        elif a == 0:
            x = m / n * x + b * (x0 + denoise(ahead, s)) / 2
        else:
            slopes = (x - a * x0) / n + (ahead - b * denoise(ahead, s)) / m
            x = b / a * x + (m - b / a * n) * slopes / 2
    return x


def errors(objective, stds, schedule, steps):
    """Root mean square errors of `heun` and of `along_the_ratio`, against the exact flow of Gaussian data."""
    denoise, times = gaussian(objective, stds), schedule(objective, steps, (16, 1, 1)).double()
    x = start(objective, torch.randn(64, 16, generator=torch.Generator().manual_seed(2)), times[0]).double()
    a, s = objective.alpha(times[0]), objective.sigma(times[0])
    exact = x * stds / (a**2 * stds**2 + s**2).sqrt()
    made = [sampler(denoise, objective, x, times) for sampler in (heun, along_the_ratio)]
    return [(one - exact).square().mean().sqrt().item() for one in made]


STANDARDIZED = {"white": torch.ones(16, dtype=torch.float64), "spectrum": SPECTRUM}


@pytest.mark.parametrize("schedule", [default, karras])
@pytest.mark.parametrize("steps", [20, 40])
@pytest.mark.parametrize("data", STANDARDIZED)
def test_is_more_exact_on_flows_than_along_the_ratio(data, steps, schedule):
    ours, former = errors(Flow(), STANDARDIZED[data], schedule, steps)
    assert ours < former / 1.5


@pytest.mark.parametrize("data", STANDARDIZED)
@pytest.mark.parametrize(
    "schedule", [SqrtLinear(), Linear(), Cosine(), ZeroTerminal(SqrtLinear())], ids=lambda s: type(s).__name__
)
def test_is_more_exact_on_ddpm_with_karras_levels(schedule, data):
    ours, former = errors(DDPM(schedule, V()), STANDARDIZED[data], karras, 20)
    assert ours < former / 1.4


@pytest.mark.parametrize("data", STANDARDIZED)
def test_stays_near_the_data_on_the_cosine_schedule(data):
    """Whose last ratios are in the hundreds and thousands: along the ratio the error is that of no picture at all."""
    ours, former = errors(DDPM(Cosine()), STANDARDIZED[data], default, 20)
    assert ours < 0.05
    assert former > 1
