"""Distributions of noise levels: quantiles of what the papers name."""

import math

import pytest
import torch
from torch.distributions import LogNormal as TorchLogNormal
from torch.distributions import Normal

from ldm.diffusion.noise_levels import LogitNormal, LogNormal, Shifted, Uniform, shifted

U = (torch.arange(10_000) + 0.5) / 10_000


def test_uniform_is_what_it_is_given():
    assert torch.equal(Uniform()(U), U)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7)])
def test_logit_normal(mean, std):
    places = LogitNormal(mean, std)(U)
    assert (places > 0).all()
    assert (places < 1).all()
    torch.testing.assert_close(Normal(mean, std).cdf(places.logit()), U, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (-0.4, 1.0)])
def test_log_normal(mean, std):
    torch.testing.assert_close(TorchLogNormal(mean, std).cdf(LogNormal(mean, std)(U)), U, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("levels", [LogitNormal(), LogNormal()], ids=lambda levels: type(levels).__name__)
def test_the_ends_stay_finite(levels):
    ends = levels(torch.tensor([0.0, math.nextafter(1, 0)], dtype=torch.float32))
    assert torch.isfinite(ends).all()
    assert ends[0] > 0


def test_shift_is_that_of_the_latent_s_size():
    # 4 x 32 x 32 is the size that is not shifted; four times as many pixels double the noise-to-signal ratio.
    torch.testing.assert_close(Shifted(4 * 32 * 32, Uniform())(U), U)
    torch.testing.assert_close(Shifted(4 * 64 * 64, LogNormal())(U), 2 * LogNormal()(U))
    places = Shifted(4 * 64 * 64, Uniform())(U)
    torch.testing.assert_close(places / (1 - places), 2 * U / (1 - U), rtol=3e-3, atol=1e-6)
    assert shifted(torch.tensor([0.0, 1.0]), 3.0).tolist() == [0, 1]
