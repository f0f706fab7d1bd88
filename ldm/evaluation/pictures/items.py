"""Samples that are asked for as the items of a data set would be, item after item.

By their classes and captions, and by what lies on their pictures: masks, maps, boxes, small pictures.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from ldm.data.asked_for import asked_for
from ldm.data.dataset import ImageDataset, class_labels
from ldm.errors import ConfigError
from ldm.evaluation.pictures.stored import in_parallel
from ldm.latents.asked import DenseItems
from ldm.sampling.conditions import Condition
from ldm.sizes import SIZES

READ = ("class_label", "caption")
"""The keys of a condition that an item of a data set can say."""


class Items:
    """The sample of a seed is asked for by item seed % len, so that each of them has its turn.

    Args:
        dataset: of the items, in the order of their turns.
        keys: that the model reads: some of `READ`, sizes, which samples have of themselves, and what `dense` makes.
        dense: what lies on the pictures, as the model reads it; None: nothing.

    Raises:
        ConfigError: other keys, or the data set has no such values.
    """

    def __init__(self, dataset: ImageDataset, keys: Sequence[str], dense: DenseItems | None = None) -> None:
        self.dense = dense
        if others := [key for key in keys if key not in (*READ, *SIZES) and not self._makes(key)]:
            raise ConfigError(
                f"this model reads {', '.join(others)}, which no item says: make its samples with "
                "sample.py --conditions FILE, and evaluate their folder"
            )
        self.dataset = dataset
        self.keys = tuple(key for key in keys if key not in SIZES)
        self._labels = class_labels(dataset)
        # Arrays would fill the memory.
        self._said = self._say if {*self.keys} - {*READ} else lru_cache(maxsize=100_000)(self._say)

    def _makes(self, key: str) -> bool:
        return self.dense is not None and self.dense.says([key])

    @property
    def name(self) -> str:
        """Of the rule, and of all that it depends on."""
        described = f"{self.dataset.fingerprint()} {' '.join(self.keys)}"
        if self.dense is not None and {*self.keys} - {*READ}:
            described += json.dumps([self.dense.dense.facts(), self.dense.crop.describe()], sort_keys=True)
        return f"items {sha256(described.encode()).hexdigest()[:8]}"

    def __len__(self) -> int:
        return len(self.dataset)

    def places(self, seeds: np.ndarray) -> np.ndarray:
        """The item of each seed, (N,) int64."""
        return seeds % len(self)

    def conditions(self, seeds: np.ndarray) -> list[Condition]:
        """What the sample of each seed is asked for by.

        Raises:
            DataError: an item cannot be read, or lacks a key.
        """
        return [self._said(int(place)) for place in self.places(seeds)]

    def truths(self, seeds: np.ndarray) -> Tensor:
        """The picture of each seed's item as the autoencoder sees it, (n, C, H, W) uint8.

        Raises:
            DataError: an item cannot be read.
        """
        assert self.dense is not None, "which says how pictures are cropped"
        dense, dataset = self.dense, self.dataset
        places = self.places(seeds).tolist()
        return torch.stack(in_parallel(lambda place: dense.picture({**dataset[place]}, dataset.path(place)), places))

    def labels(self, seeds: np.ndarray) -> np.ndarray | None:
        """The class of each seed's item, (N,) int64; None: there are no classes, or they are not known."""
        return None if self._labels is None else self._labels[self.places(seeds)]

    def _say(self, place: int) -> Condition:
        item, path = self.dataset[place], self.dataset.path(place)
        if self.dense is None:
            return asked_for(item, self.keys, path)
        return self.dense.condition({**item}, self.keys, place, path)
