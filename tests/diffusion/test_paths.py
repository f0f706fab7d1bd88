"""Continuous paths against SiT's formulas, whose time runs from noise (0) to data (1), and their derivatives."""

import math

import pytest
import torch

from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.objectives import Interpolant
from ldm.diffusion.paths import GVP, VP, Linear
from ldm.diffusion.predictions import X0, Eps, PathVelocity, V, Velocity
from ldm.errors import ConfigError

PATHS = {
    "straight": Linear(),
    "gvp": GVP(),
    "vp": VP(),
    "vp, constant rate": VP(5.0, 5.0),
    "gvp, cut": GVP(t_max=0.999),
}
TIMES = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


def test_gvp_is_the_paper_s():
    """Ma et al. 2024: alpha = sin(pi t / 2), sigma = cos(pi t / 2)."""
    theirs = 1 - TIMES
    torch.testing.assert_close(GVP().alpha(TIMES), torch.sin(math.pi / 2 * theirs))
    torch.testing.assert_close(GVP().sigma(TIMES), torch.cos(math.pi / 2 * theirs))


def test_vp_is_the_paper_s():
    """Ma et al. 2024: alpha = exp(-1/4 (1 - t)^2 (20 - 0.1) - 1/2 (1 - t) 0.1), sigma = sqrt(1 - alpha^2)."""
    theirs = 1 - TIMES
    alpha = torch.exp(-0.25 * (1 - theirs) ** 2 * (20 - 0.1) - 0.5 * (1 - theirs) * 0.1)
    torch.testing.assert_close(VP().alpha(TIMES), alpha)
    torch.testing.assert_close(VP().sigma(TIMES), (1 - alpha**2).sqrt(), rtol=1e-9, atol=0)
    assert VP().alpha(torch.tensor(1.0)).item() == pytest.approx(math.exp(-5.025), rel=1e-6)


def test_vp_is_the_solution_of_its_sde():
    """Song et al. 2021, eq. 33: d ln(alpha) / dt = -beta / 2, beta linear from beta_min to beta_max."""
    t = TIMES.clone().requires_grad_()
    (slope,) = torch.autograd.grad(VP(0.5, 12.0).alpha(t).log().sum(), t)
    torch.testing.assert_close(slope, -(0.5 + TIMES * 11.5) / 2)


def test_slopes_are_the_derivatives(path):
    t = TIMES.clone().requires_grad_()
    alpha, sigma = path.alpha(t), path.sigma(t)
    slopes = [torch.autograd.grad(value.sum(), t, retain_graph=True)[0] for value in (alpha, sigma)]
    for found, expected in zip(path.slopes(alpha.detach(), sigma.detach()), slopes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    # And by differences, which know nothing of the formulas' code.
    step = 1e-6
    for value, expected in ((path.alpha, slopes[0]), (path.sigma, slopes[1])):
        difference = (value(TIMES + step) - value(TIMES - step)) / (2 * step)
        torch.testing.assert_close(difference, expected, rtol=1e-5, atol=1e-6)


def test_the_velocity_is_that_of_x(path):
    """The target of PathVelocity is d/dt of alpha x0 + sigma noise, and it leads back to x0."""
    x0, noise, step = torch.randn(999, dtype=torch.float64), torch.randn(999, dtype=torch.float64), 1e-6

    def x(t):
        return path.alpha(t) * x0 + path.sigma(t) * noise

    alpha, sigma = path.alpha(TIMES), path.sigma(TIMES)
    velocity = PathVelocity(path).target(x0, noise, alpha, sigma)
    torch.testing.assert_close((x(TIMES + step) - x(TIMES - step)) / (2 * step), velocity, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(PathVelocity(path).x0(velocity, x(TIMES), alpha, sigma), x0, rtol=1e-8, atol=1e-8)


def test_the_velocity_is_known_by_other_names_on_some_paths():
    x0, noise = torch.randn(999, dtype=torch.float64), torch.randn(999, dtype=torch.float64)
    straight, circle = Linear(), GVP()
    level = straight.alpha(TIMES), straight.sigma(TIMES)
    torch.testing.assert_close(PathVelocity(straight).target(x0, noise, *level), Velocity().target(x0, noise, *level))
    level = circle.alpha(TIMES), circle.sigma(TIMES)
    v = V().target(x0, noise, *level)
    torch.testing.assert_close(PathVelocity(circle).target(x0, noise, *level), math.pi / 2 * v)


def test_time_is_the_inverse_of_the_ratio(path):
    torch.testing.assert_close(path.time_at(path.sigma(TIMES) / path.alpha(TIMES)), TIMES, rtol=1e-9, atol=0)
    ratio = torch.tensor([0.0, 1e-5, 1e30, torch.inf])
    assert path.time_at(ratio).dtype == torch.float32
    assert path.time_at(ratio)[0] == 0
    assert path.time_at(ratio)[2:].tolist() == pytest.approx([path.t_max] * 2)
    assert (path.time_at(ratio) <= path.t_max).all()


def test_ends_are_exact():
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    for path in (Linear(), GVP(), VP()):
        assert (path.alpha(zero), path.sigma(zero)) == (1, 0)
    for path in (Linear(), GVP()):
        assert (path.alpha(one), path.sigma(one)) == (0, 1)


def test_training_and_sampling_stay_on_the_path(path):
    visited = path.to_time(torch.linspace(0, 1, 101))
    assert visited.min() > 0
    assert visited.max() == pytest.approx(path.t_max)
    assert path.timesteps(10)[[0, -1]].tolist() == pytest.approx([path.t_max, 0])


@pytest.mark.parametrize("path", [GVP(t_max=0.999), VP(), Linear(t_max=0.999)], ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("make", [PathVelocity, lambda path: Eps(), lambda path: X0(), lambda path: V()])
def test_every_prediction_denoises_on_them(path, make):
    prediction = make(path)
    objective = Interpolant(path, prediction)
    t = torch.tensor([1e-3, 0.2, 0.7, path.t_max])
    x0, noise = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    a, s = (level(t).reshape(-1, 1, 1, 1) for level in (objective.alpha, objective.sigma))
    target = prediction.target(x0, noise, a, s)
    back = objective.denoise(lambda x, told, conditioning: target, a * x0 + s * noise, t, Conditioning())
    torch.testing.assert_close(back, x0, rtol=2e-2, atol=2e-3)  # float32 noise times a ratio of 636 at the end


def test_the_default_prediction_is_the_path_s_velocity():
    objective = Interpolant(GVP())
    assert isinstance(objective.prediction, PathVelocity)
    assert objective.prediction.path is objective.path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Interpolant(GVP(), Eps()), "found Eps"),
        (lambda: GVP(t_max=0.0), "t_max: expected more than 0 and at most 1, found 0"),
        (lambda: VP(t_max=1.5), "t_max: expected .* found 1.5"),
        (lambda: VP(beta_min=0.0), "0 < beta_min <= beta_max, found 0 and 20"),
        (lambda: VP(beta_min=3.0, beta_max=2.0), "found 3 and 2"),
        (lambda: GVP().timesteps(0), "1 or more"),
    ],
)
def test_mistakes_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
