"""Rows of tensors on disk, some of which differ in length: without padding, read by memory map.

A shard holds the rows of its items one after another, several or none of each. Its bytes are arrays, each beginning at
a multiple of 64 bytes:

    items               (items + 1,) int64: where the rows of each item begin, and the number of rows
    NAME                of a part of fixed shape: (rows, *shape)
    NAME.offsets        of a ragged part: (rows + 1,) int64: where each row begins in the next array
    NAME                of a ragged part: (sum of all lengths, *shape[1:])

in the order of the parts. Values are kept as integers of their size: NumPy has no bfloat16.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.conditioners.features import Part
from ldm.latents.shards import mapped
from ldm.ranges import Count, CountOrZero

Parts = Mapping[str, Part]
Row = Mapping[str, np.ndarray]
"""Of each part the raw array of one row."""

_ALIGNMENT = 64
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_RAW: dict[int, np.dtype] = {1: np.dtype("u1"), 2: np.dtype("<i2"), 4: np.dtype("<i4"), 8: np.dtype("<i8")}


def to_raw(tensor: Tensor) -> np.ndarray:
    """The values of a tensor on the CPU as integers of their size."""
    array: np.ndarray = tensor.contiguous().view(_INTEGERS[tensor.dtype.itemsize]).numpy()
    return array


def from_raw(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """What `to_raw` was given, of the same memory."""
    return torch.from_numpy(array).view(dtype)


class Layout:
    """Where the arrays of a shard lie.

    Args:
        parts: of each row.
        items: of the shard.
        rows: of all its items.
        lengths: of all rows together, for each ragged part.
    """

    def __init__(self, parts: Parts, items: Count, rows: CountOrZero, lengths: Mapping[str, CountOrZero]) -> None:
        self.arrays: dict[str, tuple[int, np.dtype, tuple[int, ...]]] = {}
        """Where each begins, its type and its shape."""
        self.size = 0
        self._add("items", _RAW[8], (items + 1,))
        for name, part in parts.items():
            raw = _RAW[part.dtype.itemsize]
            if part.ragged:
                self._add(f"{name}.offsets", _RAW[8], (rows + 1,))
                self._add(name, raw, (lengths[name], *part.shape[1:]))
            else:
                self._add(name, raw, (rows, *part.shape))

    def _add(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        begin = -(-self.size // _ALIGNMENT) * _ALIGNMENT
        self.arrays[name] = (begin, dtype, shape)
        self.size = begin + math.prod(shape) * dtype.itemsize

    def views(self, data: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays in the bytes (size,) uint8 of a shard; of the same memory."""
        return {
            name: data[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
            for name, (begin, dtype, shape) in self.arrays.items()
        }


def pack(parts: Parts, rows_of: Sequence[Sequence[Row]]) -> tuple[np.ndarray, int, dict[str, int]]:
    """The rows of each item of a shard -> its bytes (uint8), the number of rows, and the lengths of ragged parts."""
    rows = [row for several in rows_of for row in several]
    lengths = {name: sum(len(row[name]) for row in rows) for name, part in parts.items() if part.ragged}
    layout = Layout(parts, len(rows_of), len(rows), lengths)
    data = np.zeros(layout.size, np.uint8)
    views = layout.views(data)
    np.cumsum([len(several) for several in rows_of], out=views["items"][1:])
    for name, part in parts.items():
        if part.ragged:
            np.cumsum([len(row[name]) for row in rows], out=views[f"{name}.offsets"][1:])
        if rows:
            join = np.concatenate if part.ragged else np.stack
            join([row[name] for row in rows], out=views[name])
    return data, len(rows), lengths


class Shard:
    """A shard on disk, memory-mapped.

    Args:
        path: of its file.
        parts: of each row.
        layout: of its arrays.
    """

    def __init__(self, path: Path, parts: Parts, layout: Layout) -> None:
        self.parts = parts
        self._arrays = layout.views(mapped(path))

    def counts(self, places: np.ndarray) -> np.ndarray:
        """The number of rows of the items at some places of the shard, each 0 .. items - 1: int64."""
        first = self._arrays["items"]
        counts: np.ndarray = first[places + 1] - first[places]
        return counts

    def row(self, places: np.ndarray, which: np.ndarray) -> np.ndarray:
        """The row number of the `which`-th row of the items at some places: int64."""
        rows: np.ndarray = self._arrays["items"][places] + which
        return rows

    def fixed(self, name: str, rows: np.ndarray) -> np.ndarray:
        """The raw rows (n, *shape) of a part of fixed shape, copied."""
        return self._arrays[name][rows]

    def ragged(self, name: str, rows: np.ndarray) -> list[np.ndarray]:
        """The raw rows (l, *shape[1:]) of a ragged part, of the file's own memory."""
        offsets, values = self._arrays[f"{name}.offsets"], self._arrays[name]
        ends = zip(offsets[rows].tolist(), offsets[rows + 1].tolist(), strict=True)
        return [values[begin:end] for begin, end in ends]
