import numpy as np
import pytest
import torch

from ldm.errors import DataError
from ldm.evaluation.distances import neighbors
from ldm.evaluation.distances.neighbors import Nearest, authenticity, closest_pairs, memorization, nearest


def normal(seed: int, number: int, size: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((number, size)).astype(np.float32)


@pytest.fixture(params=[2048, 64, 7])
def block(request, monkeypatch) -> int:
    monkeypatch.setattr(neighbors, "_BLOCK", request.param)
    return request.param


@pytest.mark.parametrize("others", [False, True])
def test_they_are_those_of_all_distances(block: int, others: bool) -> None:
    b = normal(1, 150)
    a = b if others else normal(0, 100)
    every = torch.cdist(
        torch.from_numpy(a).double(), torch.from_numpy(b).double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    if others:
        every.fill_diagonal_(np.inf)
    expected = every.sort(dim=1)
    found = nearest(a, b, 9, others=others)
    np.testing.assert_allclose(found.distances, expected.values[:, :9], rtol=1e-12)
    np.testing.assert_array_equal(found.indices, expected.indices[:, :9])
    of_tensors = nearest(torch.from_numpy(a), torch.from_numpy(b), 9, others=others)
    np.testing.assert_array_equal(of_tensors.indices, found.indices)


def test_a_copy_has_distance_zero_and_a_near_copy_its_own() -> None:
    reference = normal(0, 50) + 1000
    copies = reference[[3, 7]].copy()
    copies[1, 0] += 1e-3
    found = nearest(copies, reference)
    assert found.indices[:, 0].tolist() == [3, 7]
    assert found.distances[0, 0] == 0
    assert found.distances[1, 0] == float(copies[1, 0]) - float(reference[7, 0])


def test_the_closest_pairs_come_first() -> None:
    found = Nearest(np.array([[3.0, 4.0], [0.5, 9.0], [1.0, 1.0]]), np.array([[5, 6], [7, 8], [9, 1]]))
    assert closest_pairs(found, 2) == [(1, 7, 0.5), (2, 9, 1.0)]
    assert len(closest_pairs(found)) == 3


def test_memorization_is_seen() -> None:
    training, held_out = normal(0, 1000), nearest(normal(1, 400), normal(0, 1000))
    new = nearest(normal(2, 400), training)
    copied = nearest(training[:400] + 1e-3 * normal(3, 400), training)
    assert memorization(new, held_out).ratio == pytest.approx(1, abs=0.1)
    assert memorization(new, held_out).nearer == pytest.approx(0.5, abs=0.06)
    assert memorization(held_out, held_out) == (1, 0.5)
    assert memorization(copied, held_out).ratio < 0.01
    assert memorization(copied, held_out).nearer > 0.99
    half = Nearest(np.concatenate([new.distances, copied.distances]), np.concatenate([new.indices, copied.indices]))
    assert memorization(half, held_out).nearer == pytest.approx(0.75, abs=0.04)


def test_real_pictures_are_half_authentic_and_copies_are_not() -> None:
    training = normal(0, 1000)
    own = nearest(training, training, others=True)
    assert authenticity(nearest(normal(1, 1000), training), own) == pytest.approx(0.5, abs=0.08)
    assert authenticity(nearest(training[:300] + 1e-3, training), own) < 0.05


def test_features_of_another_size_and_too_few_are_refused() -> None:
    with pytest.raises(DataError, match="features of 6 and of 5 numbers"):
        nearest(normal(0, 5), normal(0, 5, size=5))
    with pytest.raises(DataError, match="features of 5 images: expected 6"):
        nearest(normal(0, 5), normal(0, 5), 5, others=True)
