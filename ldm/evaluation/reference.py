"""What pictures are compared with: other pictures, whose features are computed once, or statistics in ADM's `.npz`.

The features of a reference lie in its store (ldm/evaluation/feature_store.py), whose name is a hash of the pictures'
fingerprint and preprocessing, and of the space's name and weights: a reference that has changed is another one, and is
computed anew.
"""

import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from ldm.errors import DataError
from ldm.evaluation.feature_store import ROOT, FeatureStore, Table, column, key
from ldm.evaluation.features.base import MAIN, SPATIAL, Features, size
from ldm.evaluation.moments import Moments
from ldm.evaluation.pictures.base import Description, Pictures, digest
from ldm.files import crc32
from ldm.ranges import Count


class Reference(Protocol):
    """One side of a comparison, in as many feature spaces as are asked for."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def number(self) -> int | None:
        """Of pictures that its moments are of; None: unknown."""

    @property
    def pictures(self) -> Pictures | None:
        """Those that its table is of, and perhaps more behind them; None: there are only moments."""

    def description(self) -> Description:
        """What decides its features."""

    def prepare(self, spaces: Sequence[Features], batch_size: int) -> None:
        """Compute what is missing, together with all other ranks."""

    def has(self, part: str) -> bool:
        """Whether `moments` of that part can be known, in spaces that have it."""

    def moments(self, space: Features, part: str = MAIN) -> Moments:
        """Of the features in a space.

        Raises:
            DataError: they are not known.
        """

    def table(self, space: Features) -> Table | None:
        """Features picture by picture; None: there are only their moments."""


class PicturesReference:
    """Pictures as a reference.

    Args:
        pictures: all that there are.
        name: for people.
        number: how many of them are used, the first ones; None: all.
        root: where stores lie.
    """

    def __init__(self, pictures: Pictures, name: str, number: Count | None = None, root: Path = ROOT) -> None:
        self.pictures = pictures
        self.name = name
        self.number = len(pictures) if number is None else min(number, len(pictures))
        self.store = FeatureStore(pictures.description(), self.number, root)

    def description(self) -> Description:
        return {**self.store.description, "number": self.number}

    def prepare(self, spaces: Sequence[Features], batch_size: int) -> None:
        if self.number < 2:
            raise DataError(
                f"{self.name}: {self.number} picture, expected 2 or more of a reference: they have a spread"
            )
        columns = [column(space) for space in spaces]
        self.store.fill(self.pictures.images, columns, batch_size, f"reference {self.name}")

    def has(self, part: str) -> bool:
        return True

    def moments(self, space: Features, part: str = MAIN) -> Moments:
        """Kept beside the features: those of a million pictures take minutes."""
        file = self.store.folder / f"moments.{key(space)}.{part}.{self.number}.npz"
        if file.is_file():
            with suppress(DataError):  # a damaged file is made again
                return Moments.load(file)
        found = moments(self.table(space), space, part)
        with suppress(OSError):  # of a store that others may only read
            found.save(file)
            return Moments.load(file)  # what later calls get, to the last bit
        return found

    def table(self, space: Features) -> Table:
        return self.store.table(key(space))


class StatisticsReference:
    """Mean and covariance of features in an `.npz`, as ADM's evaluation has them: `mu`, `sigma`, `mu_s`, `sigma_s`.

    In which space they are, only files that `save` has written say. Others' are taken to be in the one that is asked
    for, if the sizes agree.

    Args:
        path: the file.
        sample: pictures that the file holds besides, as those of ADM's hold a part of theirs: what is computed picture
            by picture is computed of these. None: there are none, or none are needed.

    Raises:
        DataError: the file is truncated, or holds something else.
    """

    number: int | None

    def __init__(self, path: Path, sample: PicturesReference | None = None) -> None:
        self.path = path
        self.sample = sample
        self.pictures = None if sample is None else sample.pictures
        self.name = str(path)
        self.number = Moments.load(path).count

    def description(self) -> Description:
        return {"kind": "statistics", "crc32": crc32(self.path), "number": self.number}

    def prepare(self, spaces: Sequence[Features], batch_size: int) -> None:
        """Refuses other spaces than the file's, before anything is made."""
        own = Moments.features_of(self.path)
        for space in spaces:
            self.moments(space)
            if own not in (None, _called(space)):
                raise DataError(
                    f"{self.path}: expected statistics of the features {_called(space)}, found those of {own}. "
                    "Name others, or measure in these features."
                )
        if self.sample is not None:
            self.sample.prepare(spaces, batch_size)

    def has(self, part: str) -> bool:
        return Moments.stored(self.path, part)

    def moments(self, space: Features, part: str = MAIN) -> Moments:
        columns = space.parts[part]
        return Moments.load(self.path, part, size(columns))

    def table(self, space: Features) -> Table | None:
        return None if self.sample is None else self.sample.table(space)


def holds_statistics(path: Path) -> bool:
    """Whether a file is an `.npz` of statistics, perhaps with pictures beside them; a damaged one is not."""
    return holds(path, "mu", "sigma")


def holds(path: Path, *names: str) -> bool:
    """Whether a file is an `.npz` with arrays of these names."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {f"{name}.npy" for name in names} <= {*archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        return False


def moments(table: Table, space: Features, part: str = MAIN) -> Moments:
    """Of a part of the features, block by block in order."""
    columns = space.parts[part]
    found = Moments(size(columns))
    for block in table.blocks(columns):
        found.add(block)
    return found


def save(reference: Reference, space: Features, path: Path) -> None:
    """Write the reference's statistics in a space as ADM's evaluation reads them, those of sFID with them.

    Raises:
        DataError: they are not known.
    """
    spatial = reference.moments(space, SPATIAL) if SPATIAL in space.parts else None
    path.parent.mkdir(parents=True, exist_ok=True)
    reference.moments(space).save(path, spatial, _called(space))


def _called(space: Features) -> str:
    return f"{space.name} ({space.weights[:16]})"


def identity(reference: Reference) -> str:
    """A hash by which two records tell whether they compare with the same."""
    return digest(reference.description())
