"""The paths of SiT against the formulas of its paper, and an error measured as an absolute value."""

import math

import pytest
import torch

from ldm.diffusion.conditioning import Conditioning
from ldm.diffusion.noise_schedules import SqrtLinear
from ldm.diffusion.objectives import DDPM, Flow, Interpolant
from ldm.diffusion.paths import GVP, VP, Straight
from ldm.diffusion.predictions import PathVelocity, V
from ldm.diffusion.weightings import VLB, Absolute
from ldm.errors import ConfigError
from ldm.randomness import Draws

PATHS = {"straight": Straight(), "gvp": GVP(), "vp": VP()}
TIMES = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)


def theirs(name, t):
    """(alpha, sigma) of Ma et al. 2024; VP's alpha is exp(-beta_min t / 2 - (beta_max - beta_min) t^2 / 4)."""
    if name == "straight":
        return 1 - t, t
    if name == "gvp":
        return torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
    alpha = torch.exp(-0.25 * t**2 * (20 - 0.1) - 0.5 * t * 0.1)
    return alpha, torch.sqrt(1 - alpha**2)


@pytest.mark.parametrize("name", PATHS)
def test_formulas(name):
    path = PATHS[name]
    alpha, sigma = theirs(name, TIMES)
    torch.testing.assert_close(path.alpha(TIMES), alpha)
    torch.testing.assert_close(path.sigma(TIMES), sigma)
    torch.testing.assert_close(path.time(sigma / alpha), TIMES)
    assert path.time(torch.tensor(math.inf)) == path.last
    assert path.alpha(torch.tensor(0.0)) == 1
    assert path.sigma(torch.tensor(0.0)) == 0


@pytest.mark.parametrize("name", PATHS)
def test_velocity_is_the_derivative_in_time(name):
    path, step = PATHS[name], 1e-6
    slopes = path.slopes(path.alpha(TIMES), path.sigma(TIMES))
    for slope, of in zip(slopes, (path.alpha, path.sigma), strict=True):
        torch.testing.assert_close(slope, (of(TIMES + step) - of(TIMES - step)) / (2 * step), rtol=1e-6, atol=1e-8)
    x0, noise = torch.randn(2, 25, dtype=torch.float64)
    alpha, sigma = path.alpha(TIMES), path.sigma(TIMES)
    prediction = PathVelocity(path)
    target = prediction.target(x0, noise, alpha, sigma)
    torch.testing.assert_close(target, slopes[0] * x0 + slopes[1] * noise)
    torch.testing.assert_close(prediction.x0(target, alpha * x0 + sigma * noise, alpha, sigma), x0)
    moved = prediction.x0(target + 1, alpha * x0 + sigma * noise, alpha, sigma)
    torch.testing.assert_close((moved - x0).abs(), prediction.gain(alpha, sigma).abs())


def test_gvp_s_velocity_is_v():
    alpha, sigma = GVP().alpha(TIMES), GVP().sigma(TIMES)
    x0, noise = torch.randn(2, 25, dtype=torch.float64)
    v = V().target(x0, noise, alpha, sigma)
    torch.testing.assert_close(PathVelocity(GVP()).target(x0, noise, alpha, sigma), math.pi / 2 * v)


@pytest.mark.parametrize(
    "make", [lambda: VP(1.0, 0.5), lambda: VP(0.0), lambda: GVP(last=0.0), lambda: Straight(last=2.0)]
)
def test_impossible_paths(make):
    with pytest.raises(ConfigError):
        make()


def test_the_absolute_error_is_latent_diffusion_s_l1():
    draws, x0 = Draws(0, range(6), 6, "cpu"), torch.randn(6, 2, 4, 4)
    zero = lambda x, level, conditioning: torch.zeros_like(x)  # noqa: E731
    for objective in (
        DDPM(SqrtLinear(), distance=Absolute()),
        Flow(distance=Absolute()),
        Interpolant(GVP(), distance=Absolute()),
    ):
        t = objective.path.visit(objective.levels(draws.stratified("timestep")))
        noise = draws.normal("noise", (2, 4, 4))
        alpha, sigma = (of(t).view(-1, 1, 1, 1) for of in (objective.alpha, objective.sigma))
        expected = objective.prediction.target(x0, noise, alpha, sigma).abs().flatten(1).mean(1)
        torch.testing.assert_close(objective.loss(zero, x0, Conditioning(), draws), expected)
    with pytest.raises(ConfigError, match="variational bound"):
        DDPM(SqrtLinear(), weighting=VLB(), distance=Absolute())
