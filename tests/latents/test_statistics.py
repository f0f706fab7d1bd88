"""The scale of latents: as written, and whether two are the same."""

import pytest

from ldm.errors import ConfigError
from ldm.latents.statistics import Statistics


def test_numbers_are_floats():
    found = Statistics.written({"mean": [0, 1], "std": [1, 2]})
    assert str(found) == "{mean: [0.0, 1.0], std: [1.0, 2.0]}"
    found.require(2)
    with pytest.raises(ConfigError, match=r"data.params.statistics.mean: expected 3 numbers"):
        found.require(3)


@pytest.mark.parametrize(
    ("mean", "std", "same"),
    [([0.0, 5.0], [1.0, 10.0], True), ([0.0005, 5.005], [1.0005, 10.005], True), ([0.0, 5.02], [1.0, 10.0], False)],
)
def test_the_same_up_to_a_thousandth_of_a_deviation(mean, std, same):
    assert Statistics(mean, std).is_like(Statistics([0.0, 5.0], [1.0, 10.0])) is same


def test_channels_that_only_one_has_are_not_compared():
    assert Statistics([0.0], [1.0]).is_like(Statistics([0.0, 3.0], [1.0, 2.0]))
