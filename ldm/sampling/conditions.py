"""What samples are conditioned on: one mapping for each image, with the keys of a training batch that its model reads.

{"class_label": 3}
"""

from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from ldm.errors import ConfigError

Condition = Mapping[str, Any]
"""Numbers, texts, arrays, lists of numbers or tensors by key, each as one row of a training batch has it."""

_MAPS = (np.uint8, np.int16)

Columns = dict[str, Tensor | list[str]]


def check_conditions(conditions: Sequence[Condition], reads: Sequence[str], num_classes: int | None) -> Columns:
    """Make sure that a model can be asked for these conditions; returns their columns.

    Layouts of different lengths are padded to the longest: `boxes` (K,5) become (N,K,5) with `boxes_mask` (N,K).

    Args:
        reads: the keys that the model, or the classifier that guides it, reads.
        num_classes: of the training data.

    Raises:
        ConfigError: a condition lacks a key, has one that nobody reads, names a class that does not exist, or has a
            value that cannot be part of a batch.
    """
    if not reads:
        raise ConfigError("this model was trained without conditions: request none")
    if "boxes_mask" in reads:
        conditions = _padded(conditions)
    for number, condition in enumerate(conditions):
        if condition.keys() != set(reads):
            raise ConfigError(
                f"condition {number}: expected the keys that the model reads, {', '.join(reads)}; found "
                f"{', '.join(condition) or 'none'}"
            )
        if "class_label" in condition:
            _check_class(condition["class_label"], number, num_classes)
    return columns(conditions)


def _check_class(label: Any, number: int, num_classes: int | None) -> None:
    if isinstance(label, bool) or not isinstance(label, SupportsIndex):
        raise ConfigError(f"condition {number}: class_label: expected a whole number, found {label!r}")
    if num_classes is None or not 0 <= int(label) < num_classes:
        known = "none" if num_classes is None else f"0 to {num_classes - 1}, the {num_classes} classes"
        raise ConfigError(f"class {label}: expected {known} of the training data")


def columns(conditions: Sequence[Condition]) -> Columns:
    """The conditions as the columns of a batch: texts in a list, everything else as a tensor (N, ...) on the host.

    Whole numbers become int64 and others float32, of all rows alike; maps (H,W) of uint8 or int16, and bool of one
    side or more, stay what they are.

    Raises:
        ConfigError: values of one key that do not fit together, or are none of these.
    """
    keys = conditions[0] if conditions else ()
    return {key: _column(key, [condition[key] for condition in conditions]) for key in keys}


def _column(key: str, values: list[Any]) -> Tensor | list[str]:
    if all(isinstance(value, str) for value in values):
        return values
    try:
        arrays = [np.asarray(value.cpu() if isinstance(value, Tensor) else value) for value in values]
        if any(array.dtype.kind not in "iufb" for array in arrays):
            raise ValueError("neither a text nor numbers")
        array = np.stack(arrays)
    except ValueError as error:
        raise ConfigError(
            f"conditions: {key}: expected a text, a number, or numbers of one shape in each; {error}"
        ) from error
    # The type of a map says which number means unlabeled.
    kept = array.dtype in _MAPS if array.ndim > 2 else array.dtype == np.bool_ and array.ndim > 1
    kind = array.dtype if kept else np.float32 if array.dtype.kind == "f" else np.int64
    return torch.from_numpy(array.astype(kind, copy=False))  # already a copy, of large pictures as well


def _padded(conditions: Sequence[Condition]) -> list[Condition]:
    """Conditions whose layouts have one length: zeros at the end of `boxes`, and `boxes_mask`, where there is none."""
    layouts = [_layout(condition, number) for number, condition in enumerate(conditions) if "boxes" in condition]
    if len(layouts) < len(conditions) or any("boxes_mask" in condition for condition in conditions):
        return [*conditions]
    longest = max(1, *map(len, layouts)) if layouts else 1
    return [
        {
            **condition,
            "boxes": np.pad(boxes, ((0, longest - len(boxes)), (0, 0))),
            "boxes_mask": np.arange(longest) < len(boxes),
        }
        for condition, boxes in zip(conditions, layouts, strict=True)
    ]


def _layout(condition: Condition, number: int) -> np.ndarray:
    """(K,5) float32."""
    value = condition["boxes"]
    try:
        boxes = np.asarray(value.cpu() if isinstance(value, Tensor) else value, dtype=np.float32)
    except (TypeError, ValueError):
        boxes = np.empty(0, np.float32)
    if boxes.ndim != 2 or boxes.shape[1] != 5:
        raise ConfigError(
            f"condition {number}: boxes: expected [left, top, right, bottom, class] of each, corners in fractions of "
            f"the picture, found {np.shape(value)}"
        )
    return boxes


def rows(table: Columns, chosen: slice, device: torch.device) -> dict[str, Any]:
    """Some rows of the columns, as a batch on `device`."""
    few = {key: column[chosen] for key, column in table.items()}
    return {key: column.to(device) if isinstance(column, Tensor) else column for key, column in few.items()}
