import numpy as np
import pytest
import torch

from ldm.errors import DataError, NumericError
from ldm.evaluation.rows import check, dealt


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="matrix"):
        check(torch.zeros(shape))


def test_too_few_are_refused() -> None:
    with pytest.raises(DataError, match="features of 3 images: expected 4 or more"):
        check(np.zeros((3, 2)), least=4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_first_image_without_finite_features_is_named(value: float) -> None:
    rows = np.zeros((9000, 2), dtype=np.float32)
    rows[[5001, 7000], 1] = value
    with pytest.raises(NumericError, match="features of image 5001"):
        check(rows)


def test_the_order_is_that_of_the_vectors_and_not_that_of_the_files() -> None:
    random = np.random.default_rng(0)
    rows = random.standard_normal((100, 5)).astype(np.float32)
    rows[:50] = 0
    rows[:50, 1] = random.permutation(50) % 7  # equal sums
    moved = random.permutation(100)
    for number in range(3):
        expected = rows[dealt(rows, 0, number)]
        np.testing.assert_array_equal(rows[moved][dealt(rows[moved], 0, number)], expected)
        np.testing.assert_array_equal(rows[dealt(torch.from_numpy(rows), 0, number)], expected)
    orders = {tuple(dealt(rows, seed, number)) for seed in range(3) for number in range(3)}
    assert len(orders) == 9
    assert all(sorted(order) == [*range(100)] for order in orders)
