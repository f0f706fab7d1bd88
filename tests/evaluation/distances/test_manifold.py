import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import calculate_precision_recall_full

from ldm.errors import DataError
from ldm.evaluation.distances import neighbors
from ldm.evaluation.distances.manifold import Manifold, manifold


def normal(seed: int, number: int, size: int = 8, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((number, size)) * scale).astype(np.float32)


def of_all_distances(features: np.ndarray, reference: np.ndarray, k: int, density_k: int) -> Manifold:
    """The papers' formulas, from the whole matrix of distances."""

    def squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return ((a[:, None].astype(np.float64) - b[None]) ** 2).sum(-1)

    cross = squared(reference, features)
    of_reference, of_features = (np.sort(squared(rows, rows), axis=1) for rows in (reference, features))
    within = cross < of_reference[:, density_k, None]  # at 0 is the row itself
    return Manifold(
        (cross <= of_reference[:, k, None]).any(0).mean(),
        (cross <= of_features[:, k]).any(1).mean(),
        within.sum(0).mean() / density_k,
        within.any(1).mean(),
    )


@pytest.mark.parametrize("block", [2048, 33])
def test_it_is_that_of_all_distances(monkeypatch, block: int) -> None:
    monkeypatch.setattr(neighbors, "_BLOCK", block)
    features, reference = normal(0, 120, scale=0.8), normal(1, 150)
    found = manifold(features, reference)
    assert found == pytest.approx(of_all_distances(features, reference, 3, 5), rel=1e-12)
    assert manifold(torch.from_numpy(features), torch.from_numpy(reference)) == found
    assert 0 < found.recall < found.precision < 1


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_torch_fidelitys(k: int) -> None:
    for features, reference in [
        (normal(0, 300, scale=0.8), normal(1, 350)),
        (np.round(normal(0, 300, 3, 2)), np.round(normal(1, 350, 3, 2))),  # many ties and copies
    ]:
        expected = calculate_precision_recall_full(torch.from_numpy(features), torch.from_numpy(reference), k)
        assert manifold(features, reference, k)[:2] == pytest.approx(expected, abs=1e-7)  # theirs is a mean in fp32


def test_equal_distances_are_equal_whatever_their_rounding() -> None:
    features, reference = np.round(normal(0, 300, 3, 2)), np.round(normal(1, 350, 3, 2))
    expected = of_all_distances(features, reference, 3, 5)
    assert manifold(features, reference) == pytest.approx(expected, rel=1e-12)
    turned = np.linalg.qr(np.random.default_rng(3).standard_normal((3, 3)))[0]
    assert manifold(features @ turned / 3, reference @ turned / 3) == pytest.approx(expected, rel=1e-12)


def clusters(seed: int, number: int, *centers: float) -> np.ndarray:
    rows = normal(seed, number * len(centers), 4)
    rows[:, 0] += np.repeat(centers, number)
    return rows


def test_half_of_the_clusters_is_half_the_recall() -> None:
    found = manifold(clusters(0, 400, 0), clusters(1, 400, 0, 100))
    assert found.precision > 0.9
    assert found.recall == pytest.approx(0.5, abs=0.05)
    assert found.coverage == pytest.approx(0.5, abs=0.05)
    assert found.density == pytest.approx(1, abs=0.1)


def test_half_of_the_images_elsewhere_is_half_the_precision() -> None:
    found = manifold(clusters(0, 400, 0, 100), clusters(1, 400, 0))
    assert found.precision == pytest.approx(0.5, abs=0.05)
    assert found.density == pytest.approx(0.5, abs=0.05)
    assert found.recall > 0.9
    assert found.coverage > 0.9


def test_far_away_there_is_nothing() -> None:
    assert manifold(clusters(0, 50, 100), clusters(1, 50, 0)) == (0, 0, 0, 0)


def test_one_picture_many_times_has_no_recall() -> None:
    found = manifold(np.repeat(clusters(0, 1, 0), 100, 0), clusters(1, 400, 0))
    assert found.recall == 0
    assert found.coverage < 0.1


@pytest.mark.parametrize("shift", [0.0, 7.3])
def test_of_a_set_with_itself(shift: float) -> None:
    rows = normal(0, 200) + np.float32(shift)
    assert manifold(np.random.default_rng(1).permutation(rows), rows) == (1, 1, 1, 1)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(DataError, match="features of 5 images: expected 6 or more"):
        manifold(normal(0, 50), normal(1, 5))
    with pytest.raises(DataError, match="features of 3 images: expected 4 or more"):
        manifold(normal(0, 3), normal(1, 50))
