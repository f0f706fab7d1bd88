"""What the text files of an item say: captions, a class, numbers; and classes as labels."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm.data.sources.listing import natural
from ldm.errors import DataError

_LARGEST = 3e38  # a float32 holds no more; NaN is not less either


def entry_of(raw: bytes) -> Mapping[str, Any] | None:
    """What a .json holds; None: it cannot be read."""
    try:
        entry = json.loads(raw)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def value_of(entry: Mapping[str, Any] | None, key: str, name: str) -> Any:
    """A class (int or str) or a column's number or list; None: there is none that can be used."""
    value = None if entry is None else entry.get(key)
    if name == "classes":
        return value if (isinstance(value, int | str) and not isinstance(value, bool)) and value != "" else None
    numbers = value if isinstance(value, list) and value else [value]
    usable = all(isinstance(one, int | float) and not isinstance(one, bool) and abs(one) < _LARGEST for one in numbers)
    return value if usable else None


def captions_of(entry: Mapping[str, Any] | None, key: str) -> list[str]:
    """The captions under a key; empty if there are none that can be used."""
    value = None if entry is None else entry.get(key)
    several = value if isinstance(value, list) else [value]
    texts = [one.strip() for one in several if isinstance(one, str)]
    return texts if len(texts) == len(several) else []


def read_caption(raw: bytes, key: str | None) -> list[str]:
    """The captions in a text file, or under a key of a .json. Raises ValueError, also where a text is not UTF-8."""
    if key is None:
        return [raw.decode("utf-8").strip()]
    if found := captions_of(entry_of(raw), key):
        return found
    raise ValueError(f"no caption under {key!r}")


def classes_of(found: Sequence[list[Any]]) -> np.ndarray:
    """(N,) int64 if all are whole numbers, otherwise str."""
    try:
        return np.concatenate([np.array([int(value) for value in part], np.int64) for part in found])
    except (ValueError, OverflowError):
        return np.concatenate([np.array([str(value) for value in part], np.str_) for part in found if part])


def column_of(key: str, found: Sequence[list[Any]]) -> np.ndarray:
    """(N,) or (N,k) float32. Raises DataError where items have different numbers of them."""
    try:
        return np.concatenate([np.array(part, np.float32) for part in found if part])
    except ValueError as error:
        raise DataError(f"columns: {key!r} of .json is not as many numbers in each item ({error})") from error


def labels(
    classes: np.ndarray | None, class_names: Sequence[str] | None
) -> tuple[np.ndarray | None, list[str] | None, int | None]:
    """Labels (N,) int64, their names and their number, from what stands in the tars.

    Raises:
        DataError: a class that is not among the names, or a negative number.
    """
    names = None if class_names is None else [str(name) for name in class_names]
    if classes is None:
        return None, None, None
    if classes.dtype.kind == "i":
        count = len(names) if names is not None else int(classes.max()) + 1
        wrong = np.flatnonzero((classes < 0) | (classes >= count))
        if len(wrong):
            found = f"item {wrong[0]} has class {classes[wrong[0]]}"
            raise DataError(f"{found}, expected 0 to {count - 1}; see `class_names`")
        return classes, names, count
    distinct, inverse = np.unique(classes, return_inverse=True)
    names = sorted(distinct.tolist(), key=natural) if names is None else names
    number = {name: label for label, name in enumerate(names)}
    unknown = [name for name in distinct.tolist() if name not in number]
    if unknown:
        raise DataError(f"class {unknown[0]!r} is not among `class_names` ({', '.join(names[:10])}, ...); add it")
    return np.array([number[name] for name in distinct.tolist()], np.int64)[inverse], names, len(names)
