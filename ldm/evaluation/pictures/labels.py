"""The classes that samples of a class-conditional model are made of; a picture's class follows from its seed alone.

Which rule is used changes a distance: published tables of ImageNet have it random or balanced, and where some classes
have far more pictures than others, samples of all equally often are farther from them than those `in proportion`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ldm.errors import ConfigError
from ldm.randomness import keys


class Labels(Protocol):
    """A rule."""

    @property
    def name(self) -> str:
        """Of the rule, and of all that it depends on."""

    def __call__(self, seeds: np.ndarray, num_classes: int) -> np.ndarray:
        """The class of each seed: (N,) int64."""


@dataclass(frozen=True)
class Balanced:
    """Every class equally often, in turn."""

    name: str = "balanced"

    def __call__(self, seeds: np.ndarray, num_classes: int) -> np.ndarray:
        return seeds % num_classes


@dataclass(frozen=True)
class Random:
    """Each class drawn with equal probability."""

    name: str = "random"

    def __call__(self, seeds: np.ndarray, num_classes: int) -> np.ndarray:
        return (_drawn(seeds) % np.uint64(num_classes)).astype(np.int64)


class Proportional:
    """Each class drawn with its share of the training pictures.

    Args:
        labels: the class of every training picture, (N,); None: unknown.

    Raises:
        ConfigError: they are unknown.
    """

    def __init__(self, labels: np.ndarray | None) -> None:
        if labels is None:
            raise ConfigError(
                "labels: proportional: the classes of the training pictures are not known without reading them all; "
                "choose balanced or random"
            )
        self.counts = np.bincount(labels)

    @property
    def name(self) -> str:
        return f"proportional {hashlib.sha256(self.counts.astype('<i8').tobytes()).hexdigest()[:8]}"

    def __call__(self, seeds: np.ndarray, num_classes: int) -> np.ndarray:
        place = (_drawn(seeds) >> np.uint64(11)).astype(np.float64) / 2.0**53  # in [0, 1)
        found = np.searchsorted(self.counts.cumsum() / self.counts.sum(), place, side="right")
        return found.astype(np.int64)


def _drawn(seeds: np.ndarray) -> np.ndarray:
    return keys(0, "evaluation label", seeds)


RULES = ("balanced", "random", "proportional")
"""By their names on the command line and in configurations."""

ITEMS = "items"
"""Instead of a rule for classes: samples are asked for as the items of the data set would be (items.py)."""


def usual(reads: Sequence[str]) -> str:
    """What samples are asked for by where nothing is said: `ITEMS`, if the model reads more than the class."""
    return ITEMS if {*reads} - {"class_label"} else Balanced().name


def rule(name: str, labels: np.ndarray | None) -> Labels:
    """The rule of a name in `RULES`.

    Args:
        name: of the rule.
        labels: the class of every training picture, if they are known.

    Raises:
        ConfigError: there is none of this name, or it needs what is not known.
    """
    if name == "proportional":
        return Proportional(labels)
    known: dict[str, Labels] = {one.name: one for one in (Balanced(), Random())}
    if name not in known:
        raise ConfigError(f"labels: expected one of {', '.join(RULES)}, found {name!r}")
    return known[name]
