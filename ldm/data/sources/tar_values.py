"""What the text files of an item say: captions, a class, numbers."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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


def column_of(key: str, found: Sequence[list[Any]]) -> np.ndarray:
    """(N,) or (N,k) float32. Raises DataError where items have different numbers of them."""
    try:
        return np.concatenate([np.array(part, np.float32) for part in found if part])
    except ValueError as error:
        raise DataError(f"columns: {key!r} of .json is not as many numbers in each item ({error})") from error
