"""Pictures to be measured: where they come from does not matter to what measures them.

A source says how many there are, hands out any of them by number, and describes what decides their pixels, so that
what was computed of them is used again only where it holds.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ldm.randomness import permutation
from ldm.ranges import Count

Description = Mapping[str, Any]
"""What decides the pixels, in JSON's types."""


class Pictures(Protocol):
    """A fixed sequence of pictures of one size."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of each."""

    def __len__(self) -> int: ...

    def images(self, indices: Sequence[int]) -> Tensor:
        """(n, C, H, W) uint8 on the CPU. A picture depends on its number alone, not on the others.

        Raises:
            DataError: one cannot be read, or is of another size than the first.
            NumericError: one is not finite.
        """

    def labels(self) -> np.ndarray | None:
        """The class of each, (N,) int64; None: there are no classes, or they are not known."""

    def description(self) -> Description:
        """Two sources of equal descriptions have equal pictures, number by number."""


def digest(description: Description) -> str:
    """16 hex digits that name a description."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


class Scattered:
    """The same pictures in an order that has nothing to do with their contents, the same in every run.

    A folder lists one class after another: the first thousand of it, or one block of it, would be one class.

    Args:
        pictures: in their own order.
        number: so many of them, the first in the new order; None: all.
    """

    def __init__(self, pictures: Pictures, number: Count | None = None) -> None:
        self.pictures = pictures
        self.order = permutation(0, 0, len(pictures))[:number]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.pictures.shape

    def __len__(self) -> int:
        return len(self.order)

    def images(self, indices: Sequence[int]) -> Tensor:
        return self.pictures.images(self.order[np.asarray(indices, dtype=np.int64)].tolist())

    def labels(self) -> np.ndarray | None:
        labels = self.pictures.labels()
        return None if labels is None else labels[self.order]

    def description(self) -> Description:
        return {**self.pictures.description(), "order": "scattered"}
