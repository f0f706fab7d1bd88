"""References: computed once, never of other pictures or features, and as ADM's statistics."""

import numpy as np
import pytest
import torch

from ldm.errors import DataError
from ldm.evaluation.feature_store import key
from ldm.evaluation.features.base import MAIN, SPATIAL
from ldm.evaluation.moments import Moments
from ldm.evaluation.reference import PicturesReference, StatisticsReference, holds_statistics, identity, save
from tests.evaluation.spaces import Projection


class Noise:
    """Pictures of noise.

    Args:
        number: of them.
        seed: of the noise.
    """

    shape = (3, 4, 4)

    def __init__(self, number: int = 40, seed: int = 0) -> None:
        self.number, self.seed, self.asked = number, seed, 0

    def __len__(self):
        return self.number

    def images(self, indices):
        self.asked += len(indices)
        rows = [np.random.default_rng([self.seed, index]).integers(0, 256, self.shape, np.uint8) for index in indices]
        return torch.from_numpy(np.stack(rows))

    def labels(self):
        return None

    def description(self):
        return {"kind": "noise", "seed": self.seed}


def prepared(pictures, root, *spaces, number=None):
    reference = PicturesReference(pictures, "noise", number, root)
    reference.prepare(spaces, 16)
    return reference


def test_moments_are_those_of_all_pictures_and_kept(tmp_path):
    space, pictures = Projection(), Noise()
    reference = prepared(pictures, tmp_path, space)
    features = space(Noise().images(range(40))).numpy()
    for part in (MAIN, SPATIAL):
        expected = Moments.of(features[:, space.parts[part]])
        for _ in range(2):  # computed, then read
            found = reference.moments(space, part)
            assert np.allclose(found.mean, expected.mean, rtol=1e-12)
            assert np.allclose(found.covariance, expected.covariance, rtol=1e-12, atol=1e-15)
    assert len([*tmp_path.rglob("moments.*.npz")]) == 2
    for file in tmp_path.rglob("moments.*.npz"):
        file.write_bytes(b"damaged")
    assert np.allclose(reference.moments(space).mean, Moments.of(features[:, space.parts[MAIN]]).mean)


def test_what_is_there_is_used_again_for_the_same_pictures_and_features_alone(tmp_path):
    space = Projection()
    prepared(Noise(), tmp_path, space)
    again = Noise()
    prepared(again, tmp_path, space)
    assert again.asked == 0
    other = Noise(seed=1)
    prepared(other, tmp_path, space)
    assert other.asked == 40
    wider = Projection(width=7)  # other weights
    prepared(again, tmp_path, wider)
    assert again.asked == 40
    assert key(space) != key(wider)


def test_a_part_of_a_reference_is_another_one(tmp_path):
    whole, part = prepared(Noise(), tmp_path, Projection()), prepared(Noise(), tmp_path, Projection(), number=30)
    assert (whole.number, part.number) == (40, 30)
    assert identity(whole) != identity(part)
    assert not np.allclose(whole.moments(Projection()).mean, part.moments(Projection()).mean)


def test_statistics_come_back(tmp_path):
    space = Projection()
    reference = prepared(Noise(), tmp_path, space)
    save(reference, space, tmp_path / "deep" / "statistics.npz")
    found = StatisticsReference(tmp_path / "deep" / "statistics.npz")
    found.prepare([space], 16)
    assert (found.number, found.table(space)) == (40, None)
    for part in (MAIN, SPATIAL):
        assert np.allclose(found.moments(space, part).covariance, reference.moments(space, part).covariance)
    with pytest.raises(DataError, match=r"mu: expected the shape \(7,\), found \(6,\)"):
        found.prepare([Projection(width=7)], 16)


def test_statistics_are_told_from_pictures(tmp_path):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2), sigma=np.eye(2))
    np.savez(tmp_path / "pictures.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "broken.npz").write_bytes(b"PK")
    found = [holds_statistics(tmp_path / f"{name}.npz") for name in ("statistics", "pictures", "broken", "nothing")]
    assert found == [True, False, False, False]


def test_one_picture_is_no_reference_and_nothing_is_computed_of_it(tmp_path):
    pictures = Noise(1)
    with pytest.raises(DataError, match="noise: 1 picture, expected 2 or more"):
        prepared(pictures, tmp_path, Projection())
    assert pictures.asked == 0


def test_saved_statistics_say_of_which_features_they_are(tmp_path):
    """Two rules of resizing make two distances of one size."""
    space, other = Projection("inception-2015/tf1-299"), Projection("inception-2015/clean-299")
    save(prepared(Noise(), tmp_path, space), space, tmp_path / "own.npz")
    StatisticsReference(tmp_path / "own.npz").prepare([space], 16)
    message = r"own.npz: expected statistics of the features inception-2015/clean-299 .*, found those of .*tf1-299"
    with pytest.raises(DataError, match=message):
        StatisticsReference(tmp_path / "own.npz").prepare([other], 16)
    np.savez(tmp_path / "others.npz", mu=np.zeros(6), sigma=np.eye(6))
    StatisticsReference(tmp_path / "others.npz").prepare([other], 16)


def test_a_store_that_can_only_be_read_is_enough(tmp_path, monkeypatch):
    reference = prepared(Noise(), tmp_path, Projection())

    def refuse(*_):
        raise PermissionError(13, "Permission denied", "moments")

    monkeypatch.setattr(Moments, "save", refuse)
    assert reference.moments(Projection()).count == 40
