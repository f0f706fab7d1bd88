import math
from dataclasses import dataclass

import numpy as np
import pytest

from ldm.data.chances import Choice, integer, plain, require_spans, uniform
from ldm.errors import ConfigError

RANDOM = np.random.default_rng(0)


@dataclass(frozen=True)
class Kind:
    """Something with a span."""

    width: tuple[float, float] = (1, 2)
    parts: tuple["Kind", ...] = ()


def test_a_choice_follows_its_weights_and_never_takes_one_of_weight_0():
    choice = Choice(4, [0, 1, 3, 0], "weights")
    taken = np.bincount([choice.draw(RANDOM) for _ in range(4000)], minlength=4)
    assert choice.shares == [0, 0.25, 0.75, 0]
    assert taken[0] == taken[3] == 0
    assert abs(taken[1] - 1000) < 5 * math.sqrt(4000 * 0.25 * 0.75)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0, 0], r"M\.weights: expected weights from 0 up of which one is above 0, found \[0\.0, 0\.0\]"),
        ([1, -1], "expected weights from 0 up"),
        ([1, float("nan")], "expected weights from 0 up"),
        ([1, 2, 3], "expected one weight for each of 2, found 3: write as many"),
    ],
)
def test_weights_that_choose_nothing_are_refused(weights, message):
    with pytest.raises(ConfigError, match=message):
        Choice(2, weights, "M.weights")


def test_a_reversed_span_is_refused():
    with pytest.raises(ConfigError, match=r"Kind\.width: .* low <= high, found \[2, 1\]: exchange them"):
        require_spans(Kind(), width=(2, 1))
    with pytest.raises(ConfigError, match=r"found \[1\]: write two numbers"):
        require_spans(Kind(), width=[1])


def test_numbers_of_spans():
    assert {integer((2, 4), RANDOM) for _ in range(100)} == {2, 3, 4}
    found = [uniform((-1, 3), RANDOM) for _ in range(1000)]
    assert -1 <= min(found) < -0.9
    assert 2.9 < max(found) < 3


def test_plain_values_name_the_class():
    inner = {"target": f"{__name__}.Kind", "width": [1, 2], "parts": []}
    assert plain(Kind((3, 4), (Kind(),))) == {"target": f"{__name__}.Kind", "width": [3, 4], "parts": [inner]}
