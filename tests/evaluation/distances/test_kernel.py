import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kernel_mmd

from ldm.errors import DataError
from ldm.evaluation.distances.kernel import kid
from ldm.evaluation.rows import codes, dealt


def normal(seed: int, number: int, shift: float = 0.0, size: int = 16) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((number, size)) + shift).astype(np.float32)


def test_it_is_torch_fidelitys_on_the_same_subsets() -> None:
    a, b = normal(0, 300), normal(1, 400, 0.4)
    expected = []
    for subset in range(5):
        x = a[dealt(codes(a), 3, 2 * subset)[:100]].astype(np.float64)
        y = b[dealt(codes(b), 3, 2 * subset + 1)[:100]].astype(np.float64)
        expected.append(kernel_mmd(x, y))
    found = kid(a, b, subsets=5, subset_size=100, seed=3)
    assert found == pytest.approx((np.mean(expected), np.std(expected)), rel=1e-9)


def test_the_subsets_are_those_of_the_seed_and_not_those_of_the_files() -> None:
    a, b = normal(0, 300), normal(1, 400, 0.4)
    found = kid(a, b, subsets=3, subset_size=50)
    assert found == kid(np.random.default_rng(2).permutation(a), torch.from_numpy(b), subsets=3, subset_size=50)
    assert found != kid(a, b, subsets=3, subset_size=50, seed=1)
    one = kid(a, a, subsets=1, subset_size=50).mean
    assert one != 0, "the same subset of both sets"


def test_it_has_no_bias_where_the_distributions_are_equal() -> None:
    found = kid(normal(0, 2000), normal(1, 2000), subsets=100, subset_size=100)
    assert abs(found.mean) < 3 * found.deviation / np.sqrt(2000 / 100)
    assert kid(normal(0, 2000), normal(1, 2000, 0.3), subsets=100, subset_size=100).mean > 5 * abs(found.mean)


def test_the_closed_form_for_one_feature() -> None:
    # E k(x, x') = E (x x' + 1)^3 = 1 + 3 m^2 + 3 (m^2 + 1)^2 + (m^3 + 3 m)^2 for means m of unit variance.
    a, b = normal(0, 20000, size=1), normal(1, 20000, 0.5, size=1)

    def mean_kernel(m: float, n: float) -> float:
        return 1 + 3 * m * n + 3 * (m**2 + 1) * (n**2 + 1) + (m**3 + 3 * m) * (n**3 + 3 * n)

    expected = mean_kernel(0, 0) + mean_kernel(0.5, 0.5) - 2 * mean_kernel(0, 0.5)
    assert kid(a, b, subsets=20, subset_size=1000).mean == pytest.approx(expected, rel=0.1)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(DataError, match="features of 40 images: expected 50 or more"):
        kid(normal(0, 60), normal(1, 40), subset_size=50)
