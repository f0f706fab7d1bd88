"""Columns of a batch that are drawn anew each time a picture is seen: masks, degradations.

What is drawn for a sample is a function of (seed, name of the column, sample number) and of its picture alone, so that
neither the world size, nor workers, nor a resume changes a bit.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ldm.errors import ConfigError
from ldm.randomness import keys


@runtime_checkable
class Drawn(Protocol):
    """What makes one column of a batch, row by row, of columns that are there and of random numbers."""

    @property
    def reads(self) -> Sequence[str]:
        """The columns that it is made of, such as ("image",)."""

    def describe(self) -> dict[str, Any]:
        """All that decides what is drawn, in plain values."""

    def columns(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Meta tensors (N,...) of the columns it reads -> one meta tensor (N,...), under the usual name of the column.

        Raises ConfigError where it cannot be made of such pictures.
        """

    def draw(self, row: Mapping[str, Tensor], random: np.random.Generator) -> Tensor:
        """One row without the batch dimension, on the CPU, uint8 pixels in and out; in the form of `columns`."""


def generator(seed: int, name: str, number: int) -> np.random.Generator:
    """The random numbers of the column `name` for the sample `number`."""
    return _generators(seed, name, [number])[0]


def _generators(seed: int, name: str, numbers: Sequence[int] | np.ndarray) -> list[np.random.Generator]:
    addresses = keys(seed, f"drawn/{name}", numbers).tolist()
    return [np.random.Generator(np.random.Philox(key=address)) for address in addresses]


def draw_rows(
    name: str, drawn: Drawn, rows: Mapping[str, Tensor], seed: int, numbers: Sequence[int] | np.ndarray
) -> Tensor:
    """The column of a batch: (N,...) uint8, on the CPU.

    Args:
        name: of the column, that is its key in data.params.drawn.
        rows: (N,...), on the CPU, at least what it reads.
        numbers: (N,) sample numbers.

    Raises:
        ConfigError: a column that it reads is missing, or what it makes is not what it says it makes.
    """
    expected = meta_column(name, drawn, rows)
    out = torch.empty_like(expected, device="cpu")
    for place, random in enumerate(_generators(seed, name, numbers)):
        made = drawn.draw({key: rows[key][place] for key in drawn.reads}, random)
        if made.shape != expected.shape[1:] or made.dtype != expected.dtype:
            raise ConfigError(
                f"data.params.drawn.{name}: {type(drawn).__name__} drew {_spell(made)} for sample {numbers[place]}, "
                f"expected {_spell(expected[0])} as its columns() say: mend one of the two"
            )
        out[place] = made
    return out


def meta_column(name: str, drawn: Drawn, rows: Mapping[str, Tensor]) -> Tensor:
    """What `draw_rows` makes of such rows, as a meta tensor: (N,...) uint8.

    Raises:
        ConfigError: as `draw_rows`.
    """
    if missing := [key for key in drawn.reads if key not in rows]:
        raise ConfigError(
            f"data.params.drawn.{name}: {type(drawn).__name__} reads '{missing[0]}', found only "
            f"{', '.join(sorted(rows)) or 'no columns'}: have data.params.aligned keep '{missing[0]}'"
        )
    made = drawn.columns({key: rows[key].to("meta") for key in drawn.reads})
    if len(made) != 1:
        raise ConfigError(
            f"data.params.drawn.{name}: expected one column from {type(drawn).__name__}.columns(), found "
            f"{', '.join(sorted(made)) or 'none'}: give each column a class of its own"
        )
    (column,) = made.values()
    if column.dtype != torch.uint8 or column.device.type != "meta":
        raise ConfigError(
            f"data.params.drawn.{name}: expected a meta tensor of uint8 from {type(drawn).__name__}.columns(), found "
            f"{_spell(column)} on {column.device}: pixels stay uint8 until they are on the device"
        )
    return column


def _spell(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
