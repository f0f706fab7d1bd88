"""Classes as labels, from what a table says of each item."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ldm.data.sources.listing import natural
from ldm.errors import DataError


def labeled(
    values: Sequence[Any], class_names: Sequence[str] | None, place: Callable[[int], str]
) -> tuple[np.ndarray, list[str] | None, int]:
    """Labels (N,) int64, the name of each class, if they have some, and the number of classes.

    Whole numbers, also as text, are labels if all values are; otherwise the values are names, in natural order. Of
    `class_names` that are numbers themselves, values are names, too.

    Args:
        values: of each item.
        class_names: of all classes, in their order; None: as found.
        place: where a value stands, for messages.

    Raises:
        DataError: a value that is missing, of another kind, out of range or not among the names.
    """
    if not set(map(type, values)) <= {int, str} or "" in values:
        values = [_plain(value, place, row) for row, value in enumerate(values)]
    text_of = {value: str(value) for value in set(values)}  # a million items have few classes
    names = None if class_names is None else [str(name) for name in class_names]
    are_names = names is not None and names and set(text_of.values()) <= set(names)
    if not are_names and all(_is_label(text) for text in text_of.values()):
        return in_range([int(value) for value in values], names, place)
    names = sorted(set(text_of.values()), key=natural) if names is None else names
    label_of = {name: label for label, name in enumerate(names)}
    unknown = [value for value, text in text_of.items() if text not in label_of]
    if unknown:
        first = min(map(values.index, unknown))
        raise DataError(
            f"{place(first)}: class {values[first]!r} is not among `class_names` ({', '.join(names[:10])}); add it"
        )
    label_by_value = {value: label_of[text] for value, text in text_of.items()}
    return np.fromiter(map(label_by_value.__getitem__, values), np.int64, len(values)), names, len(names)


def in_range(
    values: Sequence[int | None], names: list[str] | None, place: Callable[[int], str]
) -> tuple[np.ndarray, list[str] | None, int]:
    """The same of values that are labels; None: missing. Raises DataError if one is missing or out of range."""
    labels = np.array([-1 if value is None else value for value in values], dtype=np.int64)
    count = int(labels.max(initial=-1)) + 1 if names is None else len(names)
    wrong = np.flatnonzero((labels < 0) | (labels >= count))
    if len(wrong):
        raise DataError(f"{place(int(wrong[0]))}: class {values[wrong[0]]}; expected 0 to {count - 1}")
    return labels, names, count


def _plain(value: Any, place: Callable[[int], str], row: int) -> int | str:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(f"{place(row)}: expected a class, a name or a whole number, found {value!r}")
    return value


def _is_label(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and len(text) < 19  # else it is a name, as an item's long number may be
