import numpy as np
import pytest
import torch

from ldm.errors import DataError, NumericError
from ldm.evaluation.rows import check, codes, dealt


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


def some(number: int = 100) -> np.ndarray:
    """Of which half repeat one another."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((number, 5)).astype(np.float32) + 3
    rows[: number // 2] = 0
    rows[: number // 2, 1] = random.permutation(number // 2) % 7
    return rows


def test_the_order_is_that_of_the_vectors_and_not_that_of_the_files() -> None:
    rows = some()
    moved = np.random.default_rng(1).permutation(100)
    for number in range(3):
        expected = rows[dealt(codes(rows), 0, number)]
        np.testing.assert_array_equal(rows[moved][dealt(codes(rows[moved]), 0, number)], expected)
        np.testing.assert_array_equal(rows[dealt(codes(torch.from_numpy(rows)), 0, number)], expected)
    orders = {tuple(dealt(codes(rows), seed, number)) for seed in range(3) for number in range(3)}
    assert len(orders) == 9
    assert all(sorted(order) == [*range(100)] for order in orders)


def test_rounding_and_other_images_hardly_change_the_order() -> None:
    rows = np.random.default_rng(0).standard_normal((5000, 64)).astype(np.float32) + 3
    rounded = rows * (1 + 1e-6 * np.random.default_rng(1).standard_normal(rows.shape)).astype(np.float32)
    assert (codes(rows) == codes(rounded)).mean() > 0.995
    fewer = codes(rows[:4000])
    assert (codes(rows)[:4000] == fewer).all()


def test_copies_are_dealt_apart() -> None:
    order = dealt(codes(np.ones((1000, 3))), 0)
    assert len(set(order)) == 1000
    place = np.argsort(dealt(codes(some(1000)), 0))
    assert abs(place[:500].mean() - 499.5) < 40


def test_the_order_has_nothing_to_do_with_what_is_in_the_rows() -> None:
    means = []
    for seed in range(200):
        rows = np.random.default_rng(seed).standard_normal((100, 3))
        means.append(rows[dealt(codes(rows), 0)[:20]].mean(0))
    assert np.abs(np.mean(means, axis=0)).max() < 4 * np.sqrt(1 / 20 / 200)
    assert np.std(means) == pytest.approx(np.sqrt(1 / 20), rel=0.15)
