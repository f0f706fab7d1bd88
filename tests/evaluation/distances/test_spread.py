"""Intervals are tried on Gaussians whose distance is known: of 95% intervals, about 95 in 100 hold the truth."""

import sys

import numpy as np
import pytest
from scipy import stats

from ldm.errors import ConfigError, DataError
from ldm.evaluation.distances.frechet import frechet_distance
from ldm.evaluation.distances.spread import (
    Estimate,
    blocks,
    difference,
    distinguishable,
    extrapolated,
    extrapolates,
    frechet_spread,
    jackknife,
    jackknifed,
    of_blocks,
)
from ldm.evaluation.moments import Moments

SIZE, IMAGES, REPETITIONS = 6, 300, 200
DEVIATIONS = np.linspace(0.5, 1.5, SIZE)


def exactly(shift: float, scale: float) -> Moments:
    """Of the distribution itself."""
    moments = Moments(SIZE)
    moments.count, moments.mean = None, np.full(SIZE, shift)
    moments.scatter = np.diag((scale * DEVIATIONS) ** 2)
    return moments


REFERENCE = exactly(0, 1)


def drawn(seed: int, number: int = IMAGES, shift: float = 0.2, scale: float = 1.2) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((number, SIZE)) * DEVIATIONS * scale + shift


def coverage(estimates: list[Estimate], truth: float) -> float:
    return float(np.mean([low <= truth <= high for low, high in (one.interval() for one in estimates)]))


@pytest.mark.parametrize(("shift", "scale"), [(0.2, 1.2), (0.0, 1.0)])
def test_jackknife_intervals_hold_the_truth(shift: float, scale: float) -> None:
    truth = frechet_distance(exactly(shift, scale), REFERENCE)
    spreads = [frechet_spread(drawn(seed, IMAGES, shift, scale), REFERENCE) for seed in range(REPETITIONS)]
    assert 0.9 <= coverage([spread.unbiased for spread in spreads], truth) <= 0.995
    measured = np.array([spread.measured.value for spread in spreads])
    assert 0.9 <= coverage([spread.measured for spread in spreads], measured.mean()) <= 0.995
    unbiased = np.mean([spread.unbiased.value for spread in spreads])
    assert abs(unbiased - truth) < 0.15 * (measured.mean() - truth)
    assert measured.mean() - truth > measured.std() / 2, "there is a bias to remove"


def test_the_extrapolation_is_nearer_to_the_truth_and_its_intervals_hold_it() -> None:
    truth = frechet_distance(exactly(0.2, 1.2), REFERENCE)
    found = [extrapolated(drawn(seed), REFERENCE) for seed in range(REPETITIONS)]
    assert 0.9 <= coverage([one.unbiased for one in found], truth) <= 0.99
    measured = np.mean([one.distances[-1] for one in found])
    assert abs(np.mean([one.unbiased.value for one in found]) - truth) < 0.3 * (measured - truth)
    sizes, distances = found[0].sizes, found[0].distances
    assert (sizes[0], sizes[-1], len(distances)) == (30, IMAGES, 12)
    assert distances[-1] == pytest.approx(frechet_spread(drawn(0), REFERENCE).measured.value, rel=1e-9)
    _, intercept, *_ = stats.linregress(1 / sizes, distances)
    assert found[0].unbiased.value == pytest.approx(intercept, rel=1e-9)


def test_equal_models_are_told_apart_as_often_as_the_level_says() -> None:
    found = [frechet_spread(drawn(seed), REFERENCE).unbiased for seed in range(2 * REPETITIONS)]
    wrong = np.mean([distinguishable(a, b) for a, b in zip(found[::2], found[1::2], strict=True)])
    assert 0.01 <= wrong <= 0.1
    worse = [frechet_spread(drawn(seed, scale=2), REFERENCE).unbiased for seed in range(1000, 1050)]
    assert np.mean([distinguishable(a, b) for a, b in zip(found, worse, strict=False)]) > 0.95


def test_the_number_of_images_does_not_decide() -> None:
    few, many = frechet_spread(drawn(0, 100), REFERENCE), frechet_spread(drawn(1, 20_000), REFERENCE)
    assert not distinguishable(few.unbiased, many.unbiased)
    assert many.unbiased.error < few.unbiased.error / 5


def test_too_few_images_for_their_features_do_not_extrapolate() -> None:
    size = 24
    reference = Moments(size)
    reference.count, reference.scatter = None, np.eye(size)
    truth = size * 0.1**2
    found = {}
    for number in (size, 4 * size, 8 * size):
        rows = [np.random.default_rng(seed).standard_normal((number, size)) + 0.1 for seed in range(40)]
        found[number] = np.mean([frechet_spread(one, reference).unbiased.value for one in rows]) - truth
    assert [extrapolates(number, size) for number in found] == [False, True, True]
    assert abs(found[size]) > 10 * abs(found[4 * size])
    assert abs(found[4 * size]) < truth


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(0).standard_normal((1000, 1)) * 3 + 5
    spread = jackknifed(lambda rows: float(np.mean(rows)), values, number=100)
    assert spread.unbiased.value == pytest.approx(values.mean())
    assert spread.measured == pytest.approx(spread.unbiased)
    assert spread.measured.error == pytest.approx(3 / 1000**0.5, rel=0.15)
    parts = of_blocks([float(values[rows].mean()) for rows in blocks(values, 100)])
    assert parts == pytest.approx(spread.unbiased)


def test_the_jackknife_removes_the_bias_of_a_variance() -> None:
    values = np.random.default_rng(0).standard_normal((50, 1))
    assert np.var(values) < np.var(values, ddof=1)
    found = jackknife(float(np.var(values)), [float(np.var(np.delete(values, i))) for i in range(50)])
    assert found.unbiased.value == pytest.approx(np.var(values, ddof=1), rel=1e-12)


def test_blocks_are_disjoint_and_do_not_depend_on_the_order_of_the_files() -> None:
    rows = drawn(0, 103)
    parts = blocks(rows, 10)
    assert sorted(np.concatenate(parts)) == [*range(103)]
    assert {len(part) for part in parts} == {10, 11}
    moved = np.random.default_rng(1).permutation(103)
    for part, again in zip(parts, blocks(rows[moved], 10), strict=True):
        np.testing.assert_array_equal(rows[part], rows[moved][again])
    assert not np.array_equal(parts[0], blocks(rows, 10, seed=1)[0])
    np.testing.assert_allclose(frechet_spread(rows[moved], REFERENCE), frechet_spread(rows, REFERENCE), rtol=1e-9)
    assert extrapolated(rows[moved], REFERENCE).unbiased == pytest.approx(extrapolated(rows, REFERENCE).unbiased)


def test_intervals_and_differences_are_students_and_welchs() -> None:
    random = np.random.default_rng(0)
    a, b = random.standard_normal(12) + 0.8, random.standard_normal(9) * 2
    first, second = of_blocks(a.tolist()), of_blocks(b.tolist())
    expected = stats.ttest_1samp(a, 0).confidence_interval(0.9)
    assert first.interval(0.9) == pytest.approx((expected.low, expected.high))
    test = stats.ttest_ind(a, b, equal_var=False)
    assert difference(first, second).freedom == pytest.approx(test.df)
    for level in (0.5, 0.9, 0.95, 0.99):
        assert distinguishable(first, second, level) == (test.pvalue < 1 - level)
    assert distinguishable(Estimate(1, 0, 9), Estimate(2, 0, 9))
    assert not distinguishable(Estimate(1, 0, 9), Estimate(1, 0, 9))


def test_too_few_images_are_refused() -> None:
    with pytest.raises(DataError, match="features of 19 images: expected 20 or more"):
        frechet_spread(drawn(0, 19), REFERENCE)


def test_intervals_say_which_package_they_need(monkeypatch):
    """scipy is no requirement of ldm: where it is installed, every start of a program imports it."""
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(ConfigError, match=r"pip install -e .\[evaluation\]"):
        Estimate(1.0, 0.1, 9).interval()
