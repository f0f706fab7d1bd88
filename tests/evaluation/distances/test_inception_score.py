import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from ldm.errors import DataError
from ldm.evaluation.distances.inception_score import inception_score
from ldm.evaluation.rows import codes, dealt


def logits(number: int = 1003, classes: int = 7) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((number, classes)).astype(np.float32) * 2


def test_it_is_torch_fidelitys_on_the_same_splits() -> None:
    rows = logits()
    theirs = isc_features_to_metric(torch.from_numpy(rows[dealt(codes(rows), 0)]), splits=10, shuffle=False)
    expected = theirs["inception_score_mean"], theirs["inception_score_std"]
    assert inception_score(rows) == pytest.approx(expected, rel=1e-9)


def test_it_does_not_depend_on_the_order_of_the_files() -> None:
    rows = logits()
    assert inception_score(rows[::-1].copy()) == inception_score(rows)
    assert inception_score(rows[rows.argmax(1).argsort()]) == inception_score(rows)
    assert inception_score(rows, seed=1) != inception_score(rows)


def test_it_lies_between_one_and_the_number_of_classes() -> None:
    assert inception_score(np.zeros((100, 5), np.float32)) == pytest.approx((1, 0))
    certain = np.eye(5, dtype=np.float32)[np.arange(1000) % 5] * 2000  # the other classes underflow to 0
    assert inception_score(certain, splits=1).mean == pytest.approx(5)
    assert inception_score(np.repeat(certain[:1], 100, 0)) == pytest.approx((1, 0))


def test_too_few_images_are_refused() -> None:
    with pytest.raises(DataError, match="features of 9 images: expected 10 or more"):
        inception_score(logits(9))
