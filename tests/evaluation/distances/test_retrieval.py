"""Ranks of known arrangements, and of chance."""

import numpy as np
import pytest

from ldm.errors import DataError
from ldm.evaluation.distances import neighbors
from ldm.evaluation.distances.retrieval import ranks, retrieval, shuffled

LINE = np.arange(20, dtype=np.float32)[:, None]


def test_ranks_on_a_line():
    # From 7.1 on, the points lie at distances 0.1 (7), 0.9 (8), 1.1 (6), 1.9 (9), 2.1 (5), ...
    features = np.full((5, 1), 7.1, np.float32)
    assert ranks(features, LINE, np.array([7, 8, 6, 9, 5])).tolist() == [1, 2, 3, 4, 5]


def test_equally_far_ones_share_their_ranks():
    features = np.array([[7.0]], np.float32)
    assert ranks(features, LINE, np.array([8])).tolist() == [2.5]
    copies = np.zeros((9, 3), np.float32)
    assert ranks(copies[:1], copies, np.array([4])).tolist() == [5]


def test_the_same_in_blocks(monkeypatch):
    generator = np.random.default_rng(0)
    features, reference = generator.normal(size=(30, 4)), generator.normal(size=(50, 4))
    own = generator.integers(0, 50, 30)
    whole = ranks(features, reference, own)
    distances = ((features[:, None] - reference) ** 2).sum(-1)
    expected = 1 + (distances < distances[np.arange(30), own][:, None]).sum(1)
    assert whole.tolist() == expected.tolist()
    monkeypatch.setattr(neighbors, "_BLOCK", 7)
    assert ranks(features, reference, own).tolist() == whole.tolist()


def test_copies_are_found_and_shuffled_ones_by_chance():
    pictures = np.random.default_rng(1).normal(size=(400, 8)).astype(np.float32)
    own = np.arange(400)
    assert retrieval(pictures, pictures, own) == (1.0, 1.0, 1.0)
    chance = retrieval(pictures, pictures, shuffled(own))
    assert chance.among == pytest.approx(10 / 400, abs=0.03)
    assert chance.median == pytest.approx(200, abs=40)
    assert sorted(shuffled(own)) == own.tolist()


def test_other_features_are_refused():
    with pytest.raises(DataError, match="features of 4 and of 3 numbers"):
        ranks(np.zeros((2, 4)), np.zeros((5, 3)), np.array([0, 1]))
