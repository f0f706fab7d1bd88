import numpy as np
import pytest

from ldm.errors import DataError
from ldm.evaluation.distances.frechet import frechet_distance
from ldm.evaluation.distances.ratio import IMAGENET_256, mean_ratio, ratio
from ldm.evaluation.moments import Moments


def test_real_images_have_one() -> None:
    random = np.random.default_rng(0)
    training, validation, samples = (Moments.of(random.standard_normal((number, 4))) for number in (9000, 2000, 2000))
    of_real = frechet_distance(validation, training)
    assert ratio(of_real, of_real) == 1
    assert ratio(frechet_distance(samples, training), of_real) == pytest.approx(1, abs=0.5)
    blurred = Moments.of(random.standard_normal((2000, 4)) * 0.7)
    assert ratio(frechet_distance(blurred, training), of_real) > 50


def test_the_mean_is_arithmetic() -> None:
    assert mean_ratio({"a": 2.0, "b": 30.0}, {"a": 1.0, "b": 10.0, "c": 5.0}) == 2.5
    assert mean_ratio(IMAGENET_256, IMAGENET_256) == 1
    assert len(IMAGENET_256) == 6


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(DataError, match="expected more than 0"):
        ratio(1.0, 0.0)
    with pytest.raises(DataError, match="no distance of held-out images in b"):
        mean_ratio({"a": 2.0, "b": 30.0}, {"a": 1.0})
    with pytest.raises(DataError, match="at least one"):
        mean_ratio({}, {})
