"""Image files that a table names: JSONL, CSV, TSV or parquet, with captions, a class and numbers beside each."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from ldm.data import value_range as ranges
from ldm.data.decoding import MAX_PIXELS
from ldm.data.sources import captions as caption_files
from ldm.data.sources.aligned import Companion
from ldm.data.sources.captions import InTable, empty_ones
from ldm.data.sources.classes import labeled
from ldm.data.sources.image_files import ImageFiles
from ldm.data.sources.table_files import Wanted
from ldm.errors import DataError
from ldm.ranges import Count, Finite

CLASS = "class"


class ImageTable(ImageFiles):
    """The image files that a table names, in its order. How captions are written in it: `CaptionTable`.

    Args:
        file: the table.
        root: the folder that names are relative to; None: that of the table. No name may lead out of it.
        image: the column with the names; None: `file_name`, `path` or `file`.
        captions: the column with captions, or several of them; None: `caption` or `text`, if there is one; True: the
            same, but it must be there; False: there are none.
        classes: the column with classes; None: there are none. Whole numbers are labels if all are; otherwise they are
            names, in natural order.
        class_names: of all classes, in their order; None: as found.
        columns: columns of numbers to keep, such as `[aesthetic]`.
        max_pixels, value_range, aligned: as for `ImageFolder`.

    Raises:
        ConfigError: an invalid `value_range`, or a parquet file without pyarrow.
        DataError: a table that cannot be read, lacks a column, holds something else, or names files outside of `root`;
            no rows; none of its files exists.
    """

    def __init__(
        self,
        file: str | Path,
        root: str | Path | None = None,
        image: str | None = None,
        captions: str | Sequence[str] | bool | None = None,
        classes: str | None = None,
        class_names: Sequence[str] | None = None,
        columns: Sequence[str] = (),
        max_pixels: Count = MAX_PIXELS,
        value_range: Sequence[Finite] | None = None,
        aligned: Mapping[str, Companion] | None = None,
    ) -> None:
        self.file = Path(file)
        folder = self.file.parent if root is None else Path(root)
        checked = ranges.checked(value_range)
        wanted = caption_files.wanted(image, captions, columns, optional=captions is None)
        if classes is not None:
            wanted[CLASS] = Wanted((classes,), "classes")
        read = caption_files.read(self.file, wanted, folder)
        names = list(read.rows_of)
        if not names:
            raise DataError(f"{self.file}: holds 0 rows")
        for name in names:
            _demand_inside(name, folder, read.table.place(read.rows_of[name][0]))
        labels, named, count = None, None, None
        if classes is not None:
            firsts = [rows[0] for rows in read.rows_of.values()]
            values = [read.table.columns[CLASS][row] for row in firsts]
            labels, named, count = labeled(values, class_names, lambda item: read.table.place(firsts[item]))
        texts = InTable(list(read.texts.values())) if read.texts else None
        numbers = read.numbers(columns, names)
        super().__init__(folder, names, labels, count, named, texts, numbers, max_pixels, checked, aligned)
        repeated = f"left out: {len(read.repeated)} lines of images that have another one further down"
        self.say(
            f"{repeated} ({read.repeated[0]})" if read.repeated else "",
            empty_ones(texts.texts, names) if texts else "",
            self._missing(),
        )

    def _missing(self) -> str:
        """A note on files that do not exist, which count as broken."""
        missing = np.flatnonzero(self._states[: len(self), 0] < 0)
        if len(missing) == len(self):
            raise DataError(
                f"{self.file}: none of the {len(self)} files that it names exists, such as {self.path(0)}; set `root` "
                "to the folder that its names are relative to"
            )
        return f"{len(missing)} images of {self.file} do not exist ({self.files[missing[0]]})" if len(missing) else ""

    def covered(self) -> Iterator[bytes]:
        yield f"{self.num_classes}".encode() + (b"" if self._labels is None else self._labels.tobytes())
        yield from super().covered()


def _demand_inside(name: str, root: Path, place: str) -> None:
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise DataError(f"{place}: {name} is outside of {root}; set `root` to a folder that holds all images")
