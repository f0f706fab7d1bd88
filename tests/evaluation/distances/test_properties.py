"""What every distance has to do, on features of real pictures (OpenMoji) from a small network with random weights."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from ldm.data.sources.openmoji import OpenMoji
from ldm.evaluation.distances.frechet import frechet_distance
from ldm.evaluation.distances.inception_score import inception_score
from ldm.evaluation.distances.kernel import kid
from ldm.evaluation.distances.manifold import manifold
from ldm.evaluation.distances.neighbors import nearest
from ldm.evaluation.moments import Moments

BLURS = (0.0, 0.5, 1.0, 2.0, 4.0)  # deviations in pixels


def features(images: torch.Tensor) -> np.ndarray:
    """(N, 3, 32, 32) uint8 -> (N, 32) float32: two layers with random weights, then the mean over places."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(16, 3, 3, 3, generator=generator) / 27**0.5
    second = torch.randn(32, 16, 3, 3, generator=generator) / 144**0.5
    maps = F.relu(F.conv2d(images / 127.5 - 1, first, stride=2))
    return F.relu(F.conv2d(maps, second, stride=2)).mean((2, 3)).numpy()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> torch.Tensor:
    dataset = OpenMoji(size=32, folder=tmp_path_factory.mktemp("openmoji"), skin_tones=False, validation_fraction=0)
    dataset.emoji = dataset.emoji[::4]
    return torch.from_numpy(np.stack([np.asarray(dataset[i]["image"]) for i in range(400)])).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def blurred(pictures) -> list[np.ndarray]:
    """Features of every other picture, the blurrier the later."""
    half = pictures[::2]
    return [features(gaussian_blur(half, [25, 25], [sigma]) if sigma else half) for sigma in BLURS]


@pytest.fixture(scope="module")
def others(pictures) -> np.ndarray:
    return features(pictures[1::2])


def assert_rising(values: list[float]) -> None:
    assert values == sorted(values), values
    assert len({*values}) == len(values), values


def test_more_blur_is_farther_from_the_pictures_themselves(blurred) -> None:
    sharp = Moments.of(blurred[0])
    assert_rising([frechet_distance(Moments.of(rows), sharp) for rows in blurred])
    assert_rising([kid(rows, blurred[0], subsets=1, subset_size=200).mean for rows in blurred])
    assert_rising([float(np.median(nearest(rows, blurred[0]).distances)) for rows in blurred])


def test_more_blur_is_farther_from_other_pictures(blurred, others) -> None:
    assert_rising([frechet_distance(Moments.of(rows), Moments.of(others)) for rows in blurred])
    assert_rising([kid(rows, others, subsets=20, subset_size=100).mean for rows in blurred])
    found = [manifold(rows, others) for rows in blurred]
    assert_rising([-one.coverage for one in found])
    assert found[-1].recall < found[0].recall / 2


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), number=st.integers(20, 60), size=st.integers(1, 12), copies=st.booleans())
def test_the_order_of_the_pictures_changes_nothing(seed: int, number: int, size: int, copies: bool) -> None:
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((2, number, size)).astype(np.float32)
    if copies:
        a, b = np.round(a), np.round(b)
    moved, also = random.permutation(a), random.permutation(b)
    distance = frechet_distance(Moments.of(a), Moments.of(b))
    assert frechet_distance(Moments.of(moved), Moments.of(also)) == pytest.approx(distance, rel=1e-9, abs=1e-9)
    found = kid(moved, also, subsets=3, subset_size=10)
    assert found == pytest.approx(kid(a, b, subsets=3, subset_size=10), rel=1e-9, abs=1e-12)
    assert inception_score(moved) == pytest.approx(inception_score(a), rel=1e-9)
    assert manifold(moved, also) == pytest.approx(manifold(a, b), rel=1e-12)
    assert sorted(nearest(moved, also).distances.ravel()) == pytest.approx(sorted(nearest(a, b).distances.ravel()))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), number=st.integers(20, 60), size=st.integers(1, 80))
def test_the_distance_to_itself_is_zero_and_both_ways_are_equally_far(seed: int, number: int, size: int) -> None:
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((2, number, size)) * random.uniform(0.1, 10, size)
    first, second = Moments.of(a), Moments.of(b)
    scale = float(np.trace(first.covariance))
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9 * scale)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-7)
    assert frechet_distance(first, second) > 0
    assert (nearest(a, a).distances == 0).all()
    assert manifold(a, a)[:2] == (1, 1)
