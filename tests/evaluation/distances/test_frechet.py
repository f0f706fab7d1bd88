import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.image.fid import _compute_fid

from ldm.errors import DataError
from ldm.evaluation.distances.frechet import distance_to, frechet_distance
from ldm.evaluation.moments import Moments


def exact(mean: np.ndarray, deviations: np.ndarray) -> Moments:
    """Of 2D points whose mean is `mean` (D,) and whose covariance is exactly diag(deviations ** 2)."""
    size = len(mean)
    spread = np.diag(deviations) * np.sqrt((2 * size - 1) / 2)
    return Moments.of(np.concatenate([mean + spread, mean - spread]))


def mixed(seed: int, number: int, size: int, shift: float = 0.0) -> np.ndarray:
    """(number, size): correlated, their covariance another one for each seed."""
    random = np.random.default_rng(seed)
    return random.standard_normal((number, size)) @ random.standard_normal((size, size)) + shift


def closed_form(a: Moments, b: Moments) -> float:
    cross = np.trace(sqrtm(a.covariance @ b.covariance)).real
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def test_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    mean_1, mean_2 = np.array([0.0, 1.0, -2.0]), np.array([0.5, 1.0, 3.0])
    deviation_1, deviation_2 = np.array([1.0, 0.2, 3.0]), np.array([2.0, 0.1, 3.0])
    expected = ((mean_1 - mean_2) ** 2).sum() + ((deviation_1 - deviation_2) ** 2).sum()
    found = frechet_distance(exact(mean_1, deviation_1), exact(mean_2, deviation_2))
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [1, 2, 40])
def test_distance_of_any_gaussians_is_the_closed_form(size: int) -> None:
    a, b = Moments.of(mixed(0, 100, size)), Moments.of(mixed(1, 200, size, shift=0.5))
    if size > 1:
        assert not np.allclose(a.covariance @ b.covariance, b.covariance @ a.covariance)
    assert frechet_distance(a, b) == pytest.approx(closed_form(a, b), rel=1e-9)


def test_distance_agrees_with_public_ones() -> None:
    a, b = mixed(1, 200, 12), mixed(2, 300, 12, shift=0.3)
    found = frechet_distance(Moments.of(a), Moments.of(b))
    moments = [torch.from_numpy(one) for rows in (a, b) for one in (rows.mean(0), np.cov(rows, rowvar=False))]
    assert found == pytest.approx(_compute_fid(*moments).item(), rel=1e-9)
    theirs = [fid_features_to_statistics(torch.from_numpy(rows)) for rows in (a, b)]
    theirs_distance = fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert found == pytest.approx(theirs_distance, rel=1e-6)


def test_singular_covariances_are_no_obstacle() -> None:
    few = mixed(2, 8, 32)  # rank 7 in 32 dimensions
    dead = few.copy()
    dead[:, 5] = 0
    assert frechet_distance(Moments.of(few), Moments.of(few)) == pytest.approx(0, abs=1e-9)
    full = Moments.of(mixed(3, 100, 32))
    # In the limit of a vanishing variance in the missing directions.
    nearly = Moments.of(few)
    nearly.scatter += 7e-14 * np.eye(32)
    assert frechet_distance(Moments.of(few), full) == pytest.approx(closed_form(nearly, full), rel=1e-5)
    assert np.isfinite(frechet_distance(Moments.of(dead), Moments.of(few)))


def test_a_reference_is_prepared_once_and_gives_the_same() -> None:
    a, b = Moments.of(mixed(0, 50, 6)), Moments.of(mixed(1, 60, 6))
    assert distance_to(b)(a) == frechet_distance(a, b)


def test_another_number_of_features_is_refused() -> None:
    with pytest.raises(DataError, match="the reference has 6 features and the images have 5"):
        frechet_distance(Moments.of(mixed(0, 50, 5)), Moments.of(mixed(0, 50, 6)))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.integers(1, 6), shift=st.floats(-5, 5))
def test_distance_is_symmetric_and_a_shift_adds_its_square(seed: int, size: int, shift: float) -> None:
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((30, size)), random.standard_normal((40, size)) * 2
    moments, moved = Moments.of(a), Moments.of(a + shift)
    assert frechet_distance(moments, Moments.of(b)) == pytest.approx(frechet_distance(Moments.of(b), moments), rel=1e-9)
    assert frechet_distance(moved, moments) == pytest.approx(size * shift**2, rel=1e-6, abs=1e-9)


def test_no_distance_is_below_zero() -> None:
    """Not even by rounding, where a set is compared with itself."""
    for seed in range(20):
        moments = Moments.of(np.random.default_rng(seed).standard_normal((30, 64)).astype(np.float32))
        assert 0 <= frechet_distance(moments, moments) < 1e-9
