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

    Whole numbers, also as text, are labels if all values are; otherwise the values are names, in natural order.

    Args:
        values: of each item.
        class_names: of all classes, in their order; None: as found.
        place: where a value stands, for messages.

    Raises:
        DataError: a value that is missing, of another kind, out of range or not among the names.
    """
    texts = [_text(value, place, row) for row, value in enumerate(values)]
    names = None if class_names is None else [str(name) for name in class_names]
    by_name = names is not None and set(texts) <= set(names)  # such as digits that are named, in another order
    if not by_name and all(text.removeprefix("-").isdecimal() for text in set(texts)):
        labels = np.array([int(text) for text in texts], dtype=np.int64)
        count = int(labels.max(initial=-1)) + 1 if names is None else len(names)
        wrong = np.flatnonzero((labels < 0) | (labels >= count))
        if len(wrong):
            raise DataError(f"{place(int(wrong[0]))}: class {labels[wrong[0]]}; expected 0 to {count - 1}")
        return labels, names, count
    names = sorted(set(texts), key=natural) if names is None else names
    label_of = {name: label for label, name in enumerate(names)}
    unknown = next((row for row, text in enumerate(texts) if text not in label_of), None)
    if unknown is not None:
        raise DataError(
            f"{place(unknown)}: class {texts[unknown]!r} is not among `class_names` ({', '.join(names[:10])}); add it"
        )
    return np.array([label_of[text] for text in texts], dtype=np.int64), names, len(names)


def _text(value: Any, place: Callable[[int], str], row: int) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(f"{place(row)}: expected a class, a name or a whole number, found {value!r}")
    return str(value)
