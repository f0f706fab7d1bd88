"""Features: what conditions cost to compute, such as a caption's tokens, computed once for each item.

A feature is a function of one value of an item, with no weights that are trained. A cache keeps what it makes beside
the latents (`data.params.features` names it), and then its network is not in memory while a model trains; where there
is no cache, as in sampling, a conditioner computes the same thing when it is needed. Both give the same bits: a value
is encoded on its own, whatever its neighbors in a batch, and rounded to the type in which it is stored.

In a batch a feature of the name `text` with the parts `tokens` and `vector` fills the columns `text.tokens`,
`text.tokens_mask` (of a part whose rows differ in length) and `text.vector`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """One tensor that a feature makes of a value.

    Args:
        shape: of a row, such as (77, 768); the first side is the largest length if `ragged`.
        dtype: that it is stored in.
        ragged: rows are (l, *shape[1:]) with l <= shape[0], stored without padding; those of a feature have 1 <= l.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float16
    ragged: bool = False


@runtime_checkable
class Feature(Protocol):
    """A function of one value of an item."""

    @property
    def reads(self) -> str:
        """The key of the value in an item, a batch and a condition: "caption", "image"."""
        ...

    @property
    def parts(self) -> Mapping[str, Part]:
        """What it makes, by name."""
        ...

    def describe(self) -> dict[str, Any]:
        """All that determines what it makes, in plain values: hashes of weights and tokenizer, truncation, types.

        Where files lie is no part of it.
        """
        ...

    def encode(self, value: Any, device: torch.device) -> dict[str, Tensor]:
        """The parts of one value, each of its own shape and type, on the CPU; computed on `device`.

        Raises:
            DataError: a value that cannot be encoded.
        """
        ...

    def release(self) -> None:
        """Give the memory of its network back; the next `encode` loads it again."""
        ...


@runtime_checkable
class Cutting(Protocol):
    """A feature that reads a value up to some length, and leaves the rest of it away."""

    def is_cut(self, value: Any) -> bool:
        """Whether a value is longer than that."""
        ...


@runtime_checkable
class WithNull(Protocol):
    """A feature whose null condition is what it makes of one value, such as the empty text; a cache keeps that, too."""

    @property
    def null_value(self) -> Any:
        """The value."""
        ...

    def keep_null(self, made: Mapping[str, Tensor]) -> None:
        """From now on `encode` gives this for the value, without the network."""
        ...


def stacked(feature: Feature, name: str, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What `encode` made of N values, as the columns of a batch, on the CPU.

    Rows of a ragged part are padded with zeros to its largest length, so that every batch has the same shape.
    """
    columns: dict[str, Tensor] = {}
    for part_name, part in feature.parts.items():
        found = [row[part_name] for row in rows]
        if not part.ragged:
            column = found[0].new_empty(len(found), *found[0].shape)  # the CPU's autocast stacks no float16
            for place, row in enumerate(found):
                column[place] = row
            columns[f"{name}.{part_name}"] = column
            continue
        padded = torch.zeros(len(rows), *part.shape, dtype=part.dtype)
        mask = torch.zeros(len(rows), part.shape[0], dtype=torch.bool)
        for place, row in enumerate(found):
            padded[place, : len(row)] = row
            mask[place, : len(row)] = True
        columns[f"{name}.{part_name}"], columns[f"{name}.{part_name}_mask"] = padded, mask
    return columns


def meta_columns(feature: Feature, name: str, rows: int) -> dict[str, Tensor]:
    """The columns of `rows` values without any, on the meta device."""
    columns: dict[str, Tensor] = {}
    for part_name, part in feature.parts.items():
        columns[f"{name}.{part_name}"] = torch.empty(rows, *part.shape, dtype=part.dtype, device="meta")
        if part.ragged:
            columns[f"{name}.{part_name}_mask"] = torch.empty(rows, part.shape[0], dtype=torch.bool, device="meta")
    return columns


def held(feature: Feature, name: str, batch: Mapping[str, Any]) -> bool:
    """Whether a batch has the feature's columns."""
    return meta_columns(feature, name, 0).keys() <= batch.keys()


def columns(feature: Feature, name: str, batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The feature's columns of a batch on `device`: those that are there, otherwise encoded from batch[feature.reads].

    Raises:
        DataError: a value that cannot be encoded.
    """
    if held(feature, name, batch):
        return {key: batch[key].to(device) for key in meta_columns(feature, name, 0)}
    if device.type == "meta":
        return meta_columns(feature, name, len(batch[feature.reads]))
    made = stacked(feature, name, [feature.encode(value, device) for value in batch[feature.reads]])
    return {key: column.to(device) for key, column in made.items()}
