"""DiagonalGaussian against torch.distributions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, Normal, kl_divergence

from ldm.autoencoder.posterior import DiagonalGaussian


def gaussian(seed: int = 0, shape: tuple[int, ...] = (3, 4, 5, 6), dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    batch, channels, *rest = shape
    return DiagonalGaussian(torch.randn(batch, 2 * channels, *rest, generator=generator, dtype=dtype))


def reference(q: DiagonalGaussian) -> Independent:
    return Independent(Normal(q.mean, q.std), q.mean.ndim - 1)


shapes = st.lists(st.integers(1, 4), min_size=2, max_size=5).map(tuple)


@settings(max_examples=30, deadline=None)
@given(shape=shapes, seeds=st.tuples(st.integers(0, 99), st.integers(100, 199)))
def test_kl_and_nll_agree_with_torch_distributions(shape, seeds):
    q, p = (gaussian(seed, shape) for seed in seeds)
    standard = DiagonalGaussian(torch.zeros(shape[0], 2 * shape[1], *shape[2:], dtype=torch.float64))
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(q.kl(p), kl_divergence(reference(q), reference(p)))
    torch.testing.assert_close(q.kl(), kl_divergence(reference(q), reference(standard)))
    torch.testing.assert_close(q.nll(x), -reference(q).log_prob(x))
    assert (q.kl(p) >= 0).all()


def test_gradients_agree_with_torch_distributions():
    moments = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    ours = DiagonalGaussian(moments)
    theirs = Independent(Normal(moments[:, :3], (0.5 * moments[:, 3:]).exp()), 2)
    standard = Independent(Normal(torch.zeros(3, 4, dtype=torch.float64), 1.0), 2)
    (a,) = torch.autograd.grad(ours.kl().sum(), moments)
    (b,) = torch.autograd.grad(kl_divergence(theirs, standard).sum(), moments)
    torch.testing.assert_close(a, b)


def test_kl_of_equal_gaussians_is_zero():
    torch.testing.assert_close(gaussian(5).kl(gaussian(5)), torch.zeros(3, dtype=torch.float64))


def test_sample_is_mean_plus_std_times_noise():
    q = gaussian()
    noise = torch.randn(q.mean.shape, dtype=torch.float64)
    torch.testing.assert_close(q.sample(noise), q.mean + q.var.sqrt() * noise)
    torch.testing.assert_close(q.mode(), q.mean)


def test_sample_draws_from_the_generator_given():
    q = gaussian()
    first = q.sample(generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, q.sample(generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(first, q.sample(generator=torch.Generator().manual_seed(2)))


def test_samples_have_the_moments_they_should():
    q = DiagonalGaussian(torch.tensor([[2.0, -1.0, 0.6, -3.0]]).expand(200_000, -1))
    z = q.sample(generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(z.mean(0), q.mean[0], atol=0.02, rtol=0)
    torch.testing.assert_close(z.std(0), q.std[0], atol=0.0, rtol=0.02)


def test_log_variance_is_clamped():
    q = DiagonalGaussian(torch.tensor([[0.0, 0.0, -1e4, 1e4]]))
    assert q.logvar.tolist() == [[-30.0, 20.0]]
    assert q.kl().isfinite().all()
    assert q.nll(torch.ones(1, 2)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_point_mass(dtype):
    moments = torch.randn(3, 4, 2, dtype=dtype)
    q = DiagonalGaussian(moments, deterministic=True)
    assert torch.equal(q.sample(), moments[:, :2])
    assert torch.equal(q.sample(torch.randn(3, 2, 2)), q.mode())
    assert torch.equal(q.std, torch.zeros(3, 2, 2, dtype=dtype))
    for value in (q.kl(), q.kl(gaussian(shape=(3, 2, 2))), q.nll(torch.zeros(3, 2, 2, dtype=dtype))):
        assert value.dtype == dtype
        assert torch.equal(value, torch.zeros(3, dtype=dtype))


def test_point_mass_stays_on_its_device():
    q = DiagonalGaussian(torch.empty(3, 4, 2, device="meta"), deterministic=True)
    assert q.kl().device.type == "meta"
    assert q.nll(q.mean).shape == (3,)


def test_kl_to_a_point_mass_is_infinite():
    q = gaussian(1)
    p = DiagonalGaussian(torch.cat([q.mean, q.logvar], dim=1), deterministic=True)
    assert q.kl(p).isposinf().all()
