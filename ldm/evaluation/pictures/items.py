"""Samples that are asked for as the items of a data set would be: by their classes and captions, item after item."""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256

import numpy as np

from ldm.data.dataset import ImageDataset, asked_for, class_labels
from ldm.errors import ConfigError
from ldm.sampling.conditions import Condition
from ldm.sizes import SIZES

READ = ("class_label", "caption")
"""The keys of a condition that an item of a data set can say."""


class Items:
    """The sample of a seed is asked for by item seed % len, so that each of them has its turn.

    Args:
        dataset: of the items, in the order of their turns.
        keys: that the model reads: some of `READ`, and sizes, which samples have of themselves.

    Raises:
        ConfigError: other keys, or the data set has no such values.
    """

    def __init__(self, dataset: ImageDataset, keys: Sequence[str]) -> None:
        if others := [key for key in keys if key not in (*READ, *SIZES)]:
            raise ConfigError(
                f"this model reads {', '.join(others)}, which no item says: make its samples with "
                "sample.py --conditions FILE, and evaluate their folder"
            )
        self.dataset = dataset
        self.keys = tuple(key for key in keys if key in READ)
        self._labels = class_labels(dataset)
        self._said = lru_cache(maxsize=100_000)(self._say)

    @property
    def name(self) -> str:
        """Of the rule, and of all that it depends on."""
        described = f"{self.dataset.fingerprint()} {' '.join(self.keys)}"
        return f"items {sha256(described.encode()).hexdigest()[:8]}"

    def places(self, seeds: np.ndarray) -> np.ndarray:
        """The item of each seed, (N,) int64."""
        return seeds % len(self.dataset)

    def conditions(self, seeds: np.ndarray) -> list[Condition]:
        """What the sample of each seed is asked for by.

        Raises:
            DataError: an item cannot be read, or lacks a key.
        """
        return [self._said(int(place)) for place in self.places(seeds)]

    def labels(self, seeds: np.ndarray) -> np.ndarray | None:
        """The class of each seed's item, (N,) int64; None: there are no classes, or they are not known."""
        return None if self._labels is None else self._labels[self.places(seeds)]

    def _say(self, place: int) -> Condition:
        return asked_for(self.dataset[place], self.keys, self.dataset.path(place))
