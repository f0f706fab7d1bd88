"""What samples are conditioned on: one mapping for each image, with the keys of a training batch that its model reads.

{"class_label": 3}
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from ldm.errors import ConfigError

Condition = Mapping[str, Any]
"""Numbers, texts, arrays or tensors by key, each as one row of a training batch has it."""


def check_conditions(conditions: Sequence[Condition], reads: Sequence[str], num_classes: int | None) -> None:
    """ConfigError if a condition lacks a key, has one that nobody reads, or names a class that does not exist.

    Args:
        reads: the keys that the model, or the classifier that guides it, reads.
        num_classes: of the training data.
    """
    if not reads:
        raise ConfigError("this model was trained without conditions: request none")
    for number, condition in enumerate(conditions):
        if condition.keys() != set(reads):
            raise ConfigError(
                f"condition {number}: expected the keys that the model reads, {', '.join(reads)}; found "
                f"{', '.join(condition) or 'none'}"
            )
        label = condition.get("class_label", 0)
        if not isinstance(label, int) or isinstance(label, bool):
            raise ConfigError(f"condition {number}: class_label: expected a whole number, found {label!r}")
        if "class_label" in condition and (num_classes is None or not 0 <= label < num_classes):
            known = "none" if num_classes is None else f"0 to {num_classes - 1}, the {num_classes} classes"
            raise ConfigError(f"class {label}: expected {known} of the training data")


def collate_conditions(conditions: Sequence[Condition], device: torch.device) -> dict[str, Any]:
    """The conditions as the columns of a batch: numbers as (N,) tensors, arrays stacked, texts in a list."""
    columns = default_collate([dict(condition) for condition in conditions])
    return {key: _moved(column, device) if isinstance(column, Tensor) else column for key, column in columns.items()}


def _moved(column: Tensor, device: torch.device) -> Tensor:
    # Python's numbers are collated in fp64, which not every device has.
    return column.to(device, torch.float32 if column.is_floating_point() else column.dtype)
