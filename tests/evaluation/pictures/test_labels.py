"""The classes of samples: by the seed alone, as often as the rule says."""

import numpy as np
import pytest

from ldm.errors import ConfigError
from ldm.evaluation.pictures.labels import RULES, Balanced, Proportional, Random, rule

SEEDS = np.arange(3000)
TRAINED_ON = np.repeat([0, 1, 3], [600, 300, 100])


@pytest.mark.parametrize("name", RULES)
def test_a_class_follows_from_its_seed_alone(name):
    labels = rule(name, TRAINED_ON)
    drawn = labels(SEEDS, 4)
    assert drawn.dtype == np.int64
    assert np.array_equal(labels(SEEDS[700:], 4), drawn[700:])
    assert set(drawn.tolist()) <= {0, 1, 2, 3}


def test_balanced_and_random():
    assert np.bincount(Balanced()(SEEDS, 3)).tolist() == [1000] * 3
    counts = np.bincount(Random()(SEEDS, 3))
    assert (np.abs(counts - 1000) < 100).all()
    assert counts.tolist() != [1000] * 3


def test_in_proportion_to_the_training_pictures():
    """Within five standard deviations of the multinomial; a class without pictures is never asked for."""
    counts = np.bincount(Proportional(TRAINED_ON)(SEEDS, 4), minlength=4)
    expected = np.array([0.6, 0.3, 0.0, 0.1])
    assert (np.abs(counts - 3000 * expected) <= 5 * np.sqrt(3000 * expected * (1 - expected))).all()


def test_its_name_says_which_proportions():
    one, other = Proportional(TRAINED_ON), Proportional(TRAINED_ON[:-1])
    assert one.name == Proportional(TRAINED_ON[::-1]).name != other.name


def test_what_is_not_known_is_refused():
    with pytest.raises(ConfigError, match="not known"):
        rule("proportional", None)
    with pytest.raises(ConfigError, match="balanced, random, proportional"):
        rule("even", None)
