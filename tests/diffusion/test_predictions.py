"""Predictions: the way to the target and back, on every path, and how they convert into one another."""

import itertools

import pytest
import torch

from ldm.diffusion.paths import GVP
from ldm.diffusion.predictions import X0, EDMPreconditioned, Eps, PathVelocity, V, Velocity

PREDICTIONS = [Eps(), X0(), V(), Velocity(), PathVelocity(GVP()), EDMPreconditioned(0.5)]
LEVELS = {
    "variance preserving": (0.6, 0.8),
    "straight": (0.3, 0.7),
    "exploding": (1.0, 3.0),
    "nearly data": (0.9999, 0.0141),
    "nearly noise": (0.01, 0.99995),
}


def name(value):
    return type(value).__name__ if not isinstance(value, str) else value


@pytest.fixture(params=LEVELS)
def level(request):
    return tuple(torch.tensor(value, dtype=torch.float64) for value in LEVELS[request.param])


def drawn():
    return torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)


def usable(prediction, alpha):
    """EDM's coefficients are for alpha = 1."""
    return not isinstance(prediction, EDMPreconditioned) or alpha == 1


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=name)
def test_target_leads_back_to_the_data(prediction, level):
    alpha, sigma = level
    x0, noise = drawn()
    x = alpha * x0 + sigma * noise
    torch.testing.assert_close(prediction.x0(prediction.target(x0, noise, alpha, sigma), x, alpha, sigma), x0)


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=name)
def test_gain_is_how_errors_carry_over(prediction, level):
    alpha, sigma = level
    x0, noise = drawn()
    x, target = alpha * x0 + sigma * noise, prediction.target(x0, noise, alpha, sigma)
    moved = prediction.x0(target + 0.25, x, alpha, sigma) - x0
    torch.testing.assert_close(moved.abs(), (0.25 * prediction.x0_error_scale(alpha, sigma)).expand(5, 3))


@pytest.mark.parametrize(("one", "other"), [*itertools.permutations(PREDICTIONS[:5], 2)], ids=name)
def test_they_convert_into_one_another(one, other, level):
    """An output of one kind says the same as one of another kind, whether it is right or not."""
    alpha, sigma = level
    x, output = drawn()
    x0 = one.x0(output, x, alpha, sigma)
    eps = (x - alpha * x0) / sigma
    back = one.target(other.x0(other.target(x0, eps, alpha, sigma), x, alpha, sigma), eps, alpha, sigma)
    torch.testing.assert_close(back, output)


def test_preconditioning_is_the_paper_s():
    """Karras et al. 2022, table 1: c_skip, c_out, and the weight (sigma^2 + s^2) / (sigma s)^2."""
    sigma, s = torch.tensor([0.01, 0.5, 80.0]), 0.5
    prediction = EDMPreconditioned(s)
    torch.testing.assert_close(prediction.x0_error_scale(torch.ones(3), sigma), sigma * s / (sigma**2 + s**2).sqrt())
    weight = (sigma**2 + s**2) / (sigma * s) ** 2
    torch.testing.assert_close(prediction.x0_error_scale(torch.ones(3), sigma) ** -2, weight)
    # The target has variance 1 at every level, and so has the scaled input.
    x0, noise = s * torch.randn(100_000), torch.randn(100_000)
    for level in sigma:
        target = prediction.target(x0, noise, torch.ones(()), level)
        assert target.std().item() == pytest.approx(1, rel=0.02)
