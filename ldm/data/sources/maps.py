"""Semantic maps: the class of each pixel of a picture, as the numbers in a PNG file of the same name."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.decoding import read_indices
from ldm.data.sources.aligned import FilesBeside, demand_size
from ldm.errors import ConfigError, DataError
from ldm.ranges import CountOrZero
from ldm.sizes import Size

_UNLABELED, _UNKNOWN = -1, -2
_MOST_OF_8_BITS, _MOST = 255, 32767
_NUMBERS = 1 << 16


class MapFiles:
    """Maps in a folder: `a/1.png` for the picture `a/1.jpg`.

    A PNG with a palette or of gray values of 1 to 16 bits; what counts are the numbers, not the colors.

    Args:
        root: the folder.
        classes: their names in the order of their numbers: a list, a text file with a name on each line, or a JSON file
            with a list.
        reduce: subtracted from each number, so that class 0 is the number `reduce`; what is then below 0 has no class.
            1 for ADE20K, where 0 is "other".
        unlabeled: numbers in the files that mean no class; None: 255 if there are at most 255 classes, else 65535.

    Raises:
        ConfigError: no classes, or too many.
        DataError: the file with their names cannot be read.
    """

    key = "map"

    def __init__(
        self,
        root: str | Path,
        classes: Sequence[str] | str | Path,
        reduce: CountOrZero = 0,
        unlabeled: Sequence[CountOrZero] | None = None,
    ) -> None:
        self.root = Path(root)
        self.classes = class_names(classes)
        self.reduce = reduce
        self.unlabeled = [*unlabeled] if unlabeled is not None else [self._default]
        where = classes if isinstance(classes, str | Path) else "aligned.map: classes"
        if not 1 <= len(self.classes) <= _MOST:
            raise ConfigError(f"{where}: expected 1 to {_MOST} names of classes, found {len(self.classes)}")

    @property
    def _default(self) -> int:
        return 255 if len(self.classes) <= _MOST_OF_8_BITS else _NUMBERS - 1

    def class_of(self) -> np.ndarray:
        """The class of each number in a file, (65536,) int32; -1: unlabeled, -2: unknown."""
        found = np.arange(_NUMBERS, dtype=np.int32) - self.reduce
        found[found >= len(self.classes)] = _UNKNOWN
        found[: max(0, self.reduce)] = _UNLABELED
        found[[number for number in self.unlabeled if 0 <= number < _NUMBERS]] = _UNLABELED
        return found

    def beside(self, root: Path, pictures: Sequence[str]) -> "_Maps":
        return _Maps(self, FilesBeside(self.root, "map", root, pictures, [".png"]))


class _Maps:
    def __init__(self, source: MapFiles, files: FilesBeside) -> None:
        self.classes: list[str] | None = source.classes
        self.note = ""
        self._source = source
        self._files = files
        self._class_of = source.class_of()

    def of(self, index: int, size: Size) -> np.ndarray:
        path = self._files.path(index)
        numbers = read_indices(path)
        demand_size(path, "map", (numbers.shape[0], numbers.shape[1]), size)
        found = self._class_of[np.minimum(numbers, _NUMBERS - 1)]
        unknown = np.argwhere(found == _UNKNOWN)
        if len(unknown):
            row, column = unknown[0].tolist()
            first, last = self._source.reduce, self._source.reduce + len(self._source.classes) - 1
            raise DataError(
                f"{path}: {len(unknown)} pixels are of no known class, the first, in row {row}, column {column}, has "
                f"the number {numbers[row, column]}; expected {first} to {last}, or {self._source.unlabeled} for none: "
                "add names to `classes`, or set `reduce` or `unlabeled`"
            )
        small = len(self._source.classes) <= _MOST_OF_8_BITS  # -1 becomes 255
        return found.astype(np.int16).astype(np.uint8) if small else found.astype(np.int16)

    def fingerprint(self) -> str:
        source = self._source
        return self._files.fingerprint(["map", source.classes, source.reduce, sorted(source.unlabeled)])


def class_names(classes: Sequence[str] | str | Path) -> list[str]:
    """Names from a list, or from a file: JSON with a list, or a text with one on each line.

    Raises:
        DataError: the file cannot be read, or holds something else; or a name is empty, but for lines at its end.
    """
    if not isinstance(classes, str | Path):
        return [str(name) for name in classes]
    path = Path(classes)
    try:
        text = path.read_text(encoding="utf-8-sig")
        found: Any = json.loads(text) if path.suffix.casefold() == ".json" else text.rstrip().split("\n")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: cannot be read as names of classes ({error}); set `classes` to a list of them"
        ) from error
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise DataError(f'{path}: expected a list of names of classes, ["sky", ...], found {str(found)[:80]!r}')
    names = [name.strip() for name in found]
    if "" in names:
        where = names.index("")
        raise DataError(
            f"{path}: the name of class {where} is empty; write one: the next names are of the next classes"
        )
    return names
