"""Data sets of Hugging Face's library `datasets` on disk (`pip install -e '.[sources]'`); without a network."""

import hashlib
import io
import json
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data import fingerprint
from ldm.data import value_range as ranges
from ldm.data.dataset import CONVERTIBLE, Item
from ldm.data.decoding import MAX_PIXELS, image_size, read_image
from ldm.data.sources import arrow_rows, table_files
from ldm.data.sources.captions import CAPTIONS, hash_of, texts_of
from ldm.data.sources.classes import in_range, labeled
from ldm.errors import DataError
from ldm.ranges import Count, Finite
from ldm.runtime import distributed
from ldm.runtime.progress import shown

logger = logging.getLogger(__name__)


class HuggingFaceImages:
    """A data set of `datasets` on disk: as `save_to_disk` writes it, or parquet files as the hub stores them.

    Args:
        root: the folder; or one parquet file.
        split: of several, such as "train"; the names of parquet files begin with it, or are numbers alone in a folder
            of that name.
        image: the column with pictures; None: the only one of the type `Image`.
        captions: the column with captions, each a text or a list of several, or several columns; None: `caption` or
            `text`, if there is one; True: the same, but it must be there; False: there are none.
        classes: the column with classes; None: the only one of the type `ClassLabel`, if there is one; False: there are
            none. Without names of the type, whole numbers are labels if all are, and otherwise they are names.
        class_names: of all classes, in their order; None: as found.
        columns: columns of numbers to keep, such as `[aesthetic]`.
        folder: where parquet files are kept as Arrow, which can be addressed by row; as large as they are.
        max_pixels, value_range: as for `ImageFolder`.

    Raises:
        ConfigError: an invalid `value_range`, or the package is missing.
        DataError: nothing of the kind is there, it is damaged or empty, lacks a split or a column, or holds something
            else.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        image: str | None = None,
        captions: str | Sequence[str] | bool | None = None,
        classes: str | bool | None = None,
        class_names: Sequence[str] | None = None,
        columns: Sequence[str] = (),
        folder: str | Path = "cache/.hugging_face",
        max_pixels: Count = MAX_PIXELS,
        value_range: Sequence[Finite] | None = None,
    ) -> None:
        self.root = Path(root)
        self.max_pixels = max_pixels
        self.value_range = ranges.checked(value_range)
        self._rows = arrow_rows.opened(self.root, split, Path(folder))
        if not len(self._rows):
            raise DataError(f"{self.root}: holds 0 rows")
        self._image = self._typed("Image", image, "image")
        self._captions = self._caption_columns(captions)
        self._labels, self.class_names, self._num_classes = self._labeled(classes, class_names)
        self._numbers = {name: table_files.numbers(self._column(name, "columns"), name, self.path) for name in columns}
        self._pictures = self._rows.select_columns([self._image]).with_format("arrow")
        self._texts = self._rows.select_columns(self._captions).with_format("arrow") if self._captions else None
        self._caption_hashes, empty = self._read_captions()
        if empty and distributed.is_main():
            logger.warning("%s: %d captions are empty (%s)", self.root, len(empty), self.path(empty[0]))
        if arrow_rows.content(self._pictures[0].column(0)[0]) is None:
            raise DataError(
                f"{self.path(0)}: holds no picture in {self._image!r}, at most where one is; save the data set again "
                "with save_to_disk, which takes pictures in, or use ImageTable"
            )

    @property
    def num_classes(self) -> int | None:
        return self._num_classes

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Item:
        data = arrow_rows.content(self._pictures[index].column(0)[0])
        if data is None:
            raise DataError(f"{self.path(index)}: has no picture")
        file = io.BytesIO(data)
        item: Item = {
            "image": read_image(self.path(index), self.max_pixels, self.value_range, keep_alpha=True, file=file)
        }
        if self._labels is not None:
            item["class_label"] = int(self._labels[index])
        if self._texts is not None:
            several = self.captions(index)
            item["caption"] = several[0] if len(several) == 1 else list(several)
        return item

    def captions(self, index: int) -> Sequence[str]:
        if self._texts is None:
            return []
        return self._texts_of((column[0].as_py() for column in self._texts[index].columns), index)

    def has_captions(self) -> bool:
        return self._texts is not None

    def class_labels(self) -> np.ndarray | None:
        return self._labels

    def columns(self) -> Mapping[str, np.ndarray]:
        return self._numbers

    def decoding(self) -> dict[str, Any]:
        return {} if self.value_range is None else {"value_range": list(self.value_range)}

    def channel_choices(self) -> Sequence[int] | None:
        return CONVERTIBLE

    def path(self, index: int) -> str:
        return f"{self.root}[{index}]"

    def prepare(self) -> None:
        """Nothing to do: it is open."""

    def sizes(self) -> np.ndarray:
        sizes = fingerprint.remembered_array(self._files, f"sizes of {self._image}", self._read_sizes)
        return np.where(sizes.prod(1, keepdims=True) > self.max_pixels, 0, sizes)

    def fingerprint(self) -> str:
        """Covers the pictures' sizes in bytes and samples of these, captions, classes, numbers and the value range.

        Neither place nor name, nor how rows are divided into files.
        """
        if not self._captions:
            return self._fingerprint
        names, contents = fingerprint.parts(self._fingerprint)
        return hashlib.sha256(f"{names} {self.captions_fingerprint()}".encode()).hexdigest() + contents

    def pictures_fingerprint(self) -> str:
        return self._fingerprint

    def captions_fingerprint(self) -> str:
        return fingerprint.digest(self._caption_hashes)

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps([self.class_names, self._num_classes, self.value_range]).encode())
        lengths, samples = fingerprint.remembered_array(self._files, f"samples of {self._image}", self._read_samples)
        for name, column in {"length": lengths, "label": self._labels, **self._numbers}.items():
            if column is not None:
                digest.update(f"{name} {column.shape}".encode() + np.ascontiguousarray(column).tobytes())
        return fingerprint.join(digest.hexdigest(), fingerprint.digest(samples))

    @property
    def _files(self) -> list[str]:
        return [file["filename"] for file in self._rows.cache_files]

    def _read_samples(self) -> np.ndarray:
        """Of every picture the number of bytes and a hash of some of them, (2,N) uint64."""
        found = np.zeros((2, len(self)), dtype=np.uint64)
        for row, data in enumerate(arrow_rows.contents(self._rows, self._image)):
            if data is not None:
                found[:, row] = len(data), _sample(data)
        return found

    def _read_sizes(self) -> np.ndarray:
        sizes = np.zeros((len(self), 2), dtype=np.int64)
        silent = not distributed.is_main()
        with warnings.catch_warnings(), shown(f"{self.root}: sizes of its images", silent) as show:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            for row, data in enumerate(arrow_rows.contents(self._rows, self._image)):
                try:
                    sizes[row] = (0, 0) if data is None else image_size(self.path(row), io.BytesIO(data))
                except DataError:
                    continue
                if row % 1000 == 0:
                    show(row, len(self))
        return sizes

    def _read_captions(self) -> tuple[np.ndarray, list[int]]:
        """A hash of each row's captions, (N,) uint64, and which of them are empty."""
        hashes = np.zeros(len(self) if self._captions else 0, dtype=np.uint64)
        empty = []
        row = 0
        for table in arrow_rows.tables(self._rows, self._captions) if self._captions else ():
            for values in zip(*(column.to_pylist() for column in table.columns), strict=True):
                found = self._texts_of(values, row)
                hashes[row] = hash_of(found)
                if not all(found):
                    empty.append(row)
                row += 1
        return hashes, empty

    def _typed(self, kind: str, wanted: str | None, parameter: str) -> str:
        """The column `wanted`, or the only one of a type of the library."""
        if wanted is not None:
            return self._existing(wanted, parameter)
        found = [name for name, feature in self._rows.features.items() if type(feature).__name__ == kind]
        if len(found) != 1:
            there = ", ".join(map(repr, self._rows.column_names))
            raise DataError(
                f"{self.root}: has {len(found)} columns of the type {kind} among {there}; name one (`{parameter}`)"
            )
        return found[0]

    def _existing(self, name: str, parameter: str) -> str:
        if name not in self._rows.column_names:
            table_files.lacking(self.root, [name], self._rows.column_names, parameter)
        return name

    def _column(self, name: str, parameter: str) -> list[Any]:
        return arrow_rows.values(self._rows, self._existing(name, parameter))

    def _caption_columns(self, wanted: str | Sequence[str] | bool | None) -> list[str]:
        if isinstance(wanted, bool) or wanted is None:
            found = [name for name in CAPTIONS if name in self._rows.column_names and wanted is not False][:1]
            if wanted and not found:
                table_files.lacking(self.root, CAPTIONS, self._rows.column_names, "captions")
            return found
        return [self._existing(name, "captions") for name in ([wanted] if isinstance(wanted, str) else wanted)]

    def _labeled(
        self, wanted: str | bool | None, class_names: Sequence[str] | None
    ) -> tuple[np.ndarray | None, list[str] | None, int | None]:
        typed = [name for name, one in self._rows.features.items() if type(one).__name__ == "ClassLabel"]
        if wanted is False or (wanted is None and not typed):
            return None, None, None
        column = self._typed("ClassLabel", wanted if isinstance(wanted, str) else None, "classes")
        values = self._column(column, "classes")
        if column in typed:
            return in_range(values, list(self._rows.features[column].names), self.path)
        return labeled(values, class_names, self.path)

    def _texts_of(self, values: Iterable[Any], index: int) -> list[str]:
        """The captions in the columns of a row."""
        found = [text for value in values for text in texts_of(value, self.path, index)]
        if not found:
            raise DataError(f"{self.path(index)}: has no caption; write one, or an empty text")
        return found


def _sample(data: memoryview) -> int:
    return fingerprint.sample(len(data), lambda place, length: data[place : place + length])
