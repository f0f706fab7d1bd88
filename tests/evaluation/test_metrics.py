import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.fid import _compute_fid

from ldm.evaluation.metrics import accuracy, frechet_distance, gaussian


def exact(mean: np.ndarray, deviations: np.ndarray) -> torch.Tensor:
    """2D points whose mean is `mean` (D,) and whose covariance is exactly diag(deviations ** 2)."""
    size = len(mean)
    spread = np.diag(deviations) * np.sqrt((2 * size - 1) / 2)
    return torch.from_numpy(np.concatenate([mean + spread, mean - spread]))


def test_gaussian_is_numpys_in_fp64() -> None:
    # A mean far from zero: fp32 sums would lose the covariance.
    features = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * 1e-2 + 1e3
    mean, covariance = gaussian(features)
    assert covariance.dtype == np.float64
    np.testing.assert_allclose(mean, features.double().mean(0).numpy(), rtol=1e-12)
    np.testing.assert_allclose(covariance, torch.cov(features.double().T).numpy(), rtol=1e-9)


def test_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    mean_1, mean_2 = np.array([0.0, 1.0, -2.0]), np.array([0.5, 1.0, 3.0])
    deviation_1, deviation_2 = np.array([1.0, 0.2, 3.0]), np.array([2.0, 0.1, 3.0])
    expected = ((mean_1 - mean_2) ** 2).sum() + ((deviation_1 - deviation_2) ** 2).sum()
    found = frechet_distance(exact(mean_1, deviation_1), exact(mean_2, deviation_2))
    assert found == pytest.approx(expected, rel=1e-12)


def test_distance_agrees_with_that_of_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    a = torch.randn(200, 12, generator=generator, dtype=torch.float64) @ mixing
    b = torch.randn(300, 12, generator=generator, dtype=torch.float64) + 0.3
    moments = [torch.from_numpy(moment) for features in (a, b) for moment in gaussian(features)]
    assert frechet_distance(a, b) == pytest.approx(_compute_fid(*moments).item(), rel=1e-9)


def test_singular_covariances_are_no_obstacle() -> None:
    generator = torch.Generator().manual_seed(2)
    few = torch.randn(8, 32, generator=generator)  # rank 7 in 32 dimensions
    dead = few.clone()
    dead[:, 5] = 0
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    assert np.isfinite(frechet_distance(dead, few))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.integers(1, 6), shift=st.floats(-5, 5))
def test_distance_is_symmetric_and_a_shift_adds_its_square(seed: int, size: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(30, size, generator=generator, dtype=torch.float64)
    b = torch.randn(40, size, generator=generator, dtype=torch.float64) * 2
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a + shift, a) == pytest.approx(size * shift**2, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("shape", [(1, 4), (4,), (2, 3, 4)])
def test_features_without_a_covariance_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="covariance"):
        gaussian(torch.zeros(shape))


def test_accuracy_counts_hits() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0], [1.0, 0.0]])
    assert accuracy(logits, torch.tensor([0, 1, 1, 0])) == 0.75
