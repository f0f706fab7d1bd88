"""What is measured: pictures, and what only pictures of their kind have."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm.evaluation.feature_store import Column, FeatureStore, column
from ldm.evaluation.features.base import Features
from ldm.evaluation.fidelity import RECONSTRUCTION, Fidelity
from ldm.evaluation.measure import Measured
from ldm.evaluation.pictures.base import Pictures
from ldm.evaluation.pictures.made import Reconstruction, Reconstructions
from ldm.evaluation.reference import Reference


@dataclass
class Subject:
    """What is measured.

    Attributes:
        name: for people.
        kind: "samples", "reconstructions" or "pictures".
        pictures: all of them.
        home: the folder that records are written to.
        words: how the names of its records begin.
        protocol: how the pictures came about, but for the model behind them.
        metrics: what is asked for.
        own_reference: what it is compared with where nothing is said.
        own_held_out: real pictures that are not in it; None: there are none.
        training: {"checkpoint", "step", "images_seen", "hours"} of the model behind them.
        title: of the progress bar.
        asked: the picture of `own_reference` that each was asked for by, (N,); None: by none.
    """

    name: str
    kind: str
    pictures: Pictures
    home: Path
    words: Sequence[str]
    protocol: Mapping[str, Any]
    metrics: Sequence[str]
    own_reference: Callable[[], Reference] | None = None
    own_held_out: Callable[[], Reference | None] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    title: str = "features"
    asked: np.ndarray | None = None

    @property
    def run(self) -> Path | None:
        """The run folder; None: there is none."""
        return None if not self.training else self.home.parent

    @property
    def step(self) -> int:
        return int(self.training.get("step", 0))

    def make(self, indices: Sequence[int]) -> Any:
        """What columns are computed of."""
        return self.pictures.images(indices)

    def columns(self, spaces: Sequence[Features]) -> list[Column]:
        return [column(space) for space in spaces]

    def completed(self, measured: Measured, store: FeatureStore) -> Measured:
        """With what only this kind of pictures has."""
        return measured


@dataclass
class Reconstructed(Subject):
    """Of a stage-1 run: each picture is encoded and decoded once, for its features and all else."""

    fidelity: Fidelity | None = None
    notes: Sequence[str] = ()

    def make(self, indices: Sequence[int]) -> Reconstruction:
        assert isinstance(self.pictures, Reconstructions)
        return self.pictures.batch(indices)

    def columns(self, spaces: Sequence[Features]) -> list[Column]:
        assert self.fidelity is not None
        return [*map(_of_images, spaces), self.fidelity.column]

    def completed(self, measured: Measured, store: FeatureStore) -> Measured:
        assert self.fidelity is not None
        rows = store.table(self.fidelity.column.key).array()
        values = [replace(one, metric=f"r{one.metric}") for one in measured.values]
        own = [one for one in self.fidelity.values(rows) if self._wanted(one.metric)]
        return Measured([*values, *own], [*self.notes, *measured.notes], measured.pairs)

    def _wanted(self, metric: str) -> bool:
        name = metric.split("-")[0].lower()
        return name in self.metrics if name in RECONSTRUCTION else "latents" in self.metrics


def _of_images(space: Features) -> Column:
    """The column of a feature space, of reconstructions."""
    own = column(space)
    return replace(own, compute=lambda made: own.compute(made.images))
