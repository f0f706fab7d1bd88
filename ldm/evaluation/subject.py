"""What is measured: pictures, and what only pictures of their kind have."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm.evaluation.feature_store import Column, FeatureStore, Table, column, key
from ldm.evaluation.features.base import Features
from ldm.evaluation.fidelity import RECONSTRUCTION, Fidelity
from ldm.evaluation.followed import Followed, Measure, Task, followed
from ldm.evaluation.measure import Measured, measure
from ldm.evaluation.pictures.base import Pictures, digest
from ldm.evaluation.pictures.made import Generated, Reconstruction, Reconstructions
from ldm.evaluation.reference import Reference
from ldm.evaluation.sheets import ROWS, asked_sheet, seeds_sheet
from ldm.evaluation.values import Value


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

    def column_of(self, space: Features) -> Column:
        """A space's features of the pictures, computed of what `make` makes."""
        return column(space)

    def columns(self, spaces: Sequence[Features]) -> list[Column]:
        """All that is to be known: features, and what only this kind of pictures has."""
        return [self.column_of(space) for space in spaces]

    def completed(
        self, measured: Measured, store: FeatureStore, spaces: Sequence[Features], reference: Reference
    ) -> Measured:
        """With what only this kind of pictures has."""
        return measured

    def sheet(self, number: int) -> np.ndarray:
        """The first pictures, to look at: (H, W, C) uint8."""
        return seeds_sheet(self.pictures, number)


@dataclass
class Reconstructed(Subject):
    """Of a stage-1 run: each picture is encoded and decoded once, for its features and all else."""

    fidelity: Fidelity | None = None
    notes: Sequence[str] = ()

    def make(self, indices: Sequence[int]) -> Reconstruction:
        assert isinstance(self.pictures, Reconstructions)
        return self.pictures.batch(indices)

    def column_of(self, space: Features) -> Column:
        return _of_images(space)

    def columns(self, spaces: Sequence[Features]) -> list[Column]:
        assert self.fidelity is not None
        return [*map(self.column_of, spaces), self.fidelity.column]

    def completed(
        self, measured: Measured, store: FeatureStore, spaces: Sequence[Features], reference: Reference
    ) -> Measured:
        assert self.fidelity is not None
        rows = store.table(self.fidelity.column.key).array()
        values = [replace(one, metric=f"r{one.metric}") for one in measured.values]
        own = [one for one in self.fidelity.values(rows) if self._wanted(one.metric)]
        return Measured([*values, *own], [*self.notes, *measured.notes], measured.pairs)

    def _wanted(self, metric: str) -> bool:
        name = metric.split("-")[0].lower()
        return name in self.metrics if name in RECONSTRUCTION else "latents" in self.metrics


@dataclass
class Asked(Subject):
    """Samples that items ask for by what lies on their pictures: each is made once, and compared with its item.

    Attributes:
        task: what samples have to be like the pictures of their items in; None: in nothing.
        measures: of samples and what they were asked by.
        notes: on what is left out.
    """

    task: Task | None = None
    measures: Sequence[Measure] = ()
    notes: Sequence[str] = ()

    def make(self, indices: Sequence[int]) -> Followed:
        assert isinstance(self.pictures, Generated)
        return followed(self.pictures, indices)

    def column_of(self, space: Features) -> Column:
        return _of_images(space)

    def columns(self, spaces: Sequence[Features]) -> list[Column]:
        baseline = [*map(self._of_baseline, spaces)] if self._has_baseline else []
        return [*map(self.column_of, spaces), *baseline, *(one.column for one in self.measures)]

    @property
    def _has_baseline(self) -> bool:
        """Whether distances of the baseline stand beside those of the samples."""
        return "fd" in self.metrics and self.task is not None and self.task.without is not None

    def _of_baseline(self, space: Features) -> Column:
        """The column of a feature space, of the baseline's pictures."""
        assert self.task is not None
        assert self.task.without is not None
        name, without = self.task.baseline, self.task.without
        return Column(digest({"space": key(space), "of": name}), lambda made: space(without(made)), name)

    def completed(
        self, measured: Measured, store: FeatureStore, spaces: Sequence[Features], reference: Reference
    ) -> Measured:
        values = [*measured.values]
        if self._has_baseline:
            tables = [store.table(self._of_baseline(space).key) for space in spaces]
            values = self._beside(values, spaces, tables, reference)
        notes = [*self.notes, *measured.notes]
        for one in self.measures:
            rows = store.table(one.column.key).array()
            values += one.values(rows)
            notes += one.notes(rows)
        return Measured(values, notes, measured.pairs)

    def _beside(
        self, values: Sequence[Value], spaces: Sequence[Features], tables: Sequence[Table], reference: Reference
    ) -> list[Value]:
        """Each Fréchet distance of the samples, with that of the baseline behind it."""
        assert self.task is not None
        of_baseline = {(one.metric, one.features): one for one in measure(spaces, tables, reference, ["fd"]).values}
        found = []
        for value in values:
            found.append(value)
            if (beside := of_baseline.get((value.metric, value.features))) is not None:
                found.append(replace(beside, metric=f"{value.metric}, {self.task.baseline}", better=""))
        return found

    def sheet(self, number: int) -> np.ndarray:
        """A row a sample: what it was asked by, itself, the baseline where there is one, and its item's picture."""
        assert isinstance(self.pictures, Generated)
        made = self.make(range(min(number, ROWS, len(self.pictures))))
        without = None if self.task is None else self.task.without
        pipeline = self.pictures.pipeline
        baseline = None if without is None else without(made)
        return asked_sheet(made, baseline, pipeline.dense, pipeline.manifest.plan.class_names)


def _of_images(space: Features) -> Column:
    """The column of a feature space, of what was made, beside which there is more."""
    own = column(space)
    return replace(own, compute=lambda made: own.compute(made.images))
