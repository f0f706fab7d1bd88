"""What a batch holds of its items beside their latents: a caption, features, numbers; addressed by item number."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ldm.data.loading import chosen
from ldm.latents.part_reader import PartReader

CAPTION = "caption"


class Captions(Protocol):
    """The captions of a data set's items, one or more of each."""

    @property
    def broken(self) -> Sequence[int]:
        """Items whose captions could not be read."""
        ...

    def counts(self, items: np.ndarray) -> np.ndarray:
        """How many captions (N,) items have: (N,) int64."""
        ...

    def texts(self, items: np.ndarray, which: np.ndarray) -> list[str]:
        """The `which`-th caption of each of (N,) items."""
        ...


class Conditions:
    """Gathers them, batch by batch. Items are numbered as those of the whole data set, broken ones included.

    Args:
        captions: None: items have none.
        features: a part of the cache for each feature, by its name in a configuration.
        numbers: (items,) or (items, k) float32 by key of a batch.
    """

    def __init__(
        self,
        captions: Captions | None = None,
        features: Mapping[str, PartReader] | None = None,
        numbers: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.captions = captions
        self.features = dict(features or {})
        self.numbers = dict(numbers or {})

    def parts(self) -> list[PartReader]:
        """Those of the cache from which it gathers."""
        own = [self.captions] if isinstance(self.captions, PartReader) else []
        return [*own, *self.features.values()]

    @property
    def broken(self) -> np.ndarray:
        """Items that lack some of it, ascending: int64. A batch must not have them."""
        several = [part.broken for part in (self.captions, *self.features.values()) if part is not None]
        return np.unique(np.concatenate([np.zeros(0, np.int64), *several]).astype(np.int64))

    def gather(self, items: np.ndarray, numbers: np.ndarray, seed: int) -> dict[str, Any]:
        """The columns of a batch: `caption` (list of N), `NAME.PART` of each feature, and the numbers.

        Of several captions the sample number decides which one a batch holds, with what features make of it.

        Args:
            items: (N,) int64.
            numbers: (N,) int64, the sample numbers.
            seed: of the run; of validation `VALIDATION_SEED`.
        """
        batch: dict[str, Any] = {}
        first = which = np.zeros(len(items), np.int64)
        if self.captions is not None:
            which = chosen(seed, numbers, self.captions.counts(items))
            batch[CAPTION] = self.captions.texts(items, which)
        for name, part in self.features.items():
            batch |= part.gather(name, items, which if part.plan.reads == CAPTION else first)
        return batch | {name: torch.from_numpy(column[items]) for name, column in self.numbers.items()}
