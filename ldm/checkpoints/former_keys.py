"""Former keys of checkpoints, and their present names.

Modules' attributes are part of every checkpoint: a renamed layer gets a row here, and rows are never removed.
"""

import re
from collections.abc import Mapping
from typing import Any

_WEIGHTS = [
    (re.compile(r"\bfeed\.widen\b"), "feed.fc1"),
    (re.compile(r"\bfeed\.narrow\b"), "feed.fc2"),
    (re.compile(r"^ema\.others\b"), "ema.extra"),
    (re.compile(r"^quantiser\b"), "quantizer"),
]
"""In a state dict: pattern -> replacement."""

_CALLBACKS = {"FiniteGuard": "SkipNonFinite"}
"""Lightning's key of a callback's state, which is its class name."""


def current(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint with the present keys."""
    if isinstance(weights := state.get("state_dict"), Mapping):
        state = {**state, "state_dict": current_weights(weights)}
    if isinstance(averages := state.get("averages"), list):
        state = {**state, "averages": [current_weights(average) for average in averages]}
    if isinstance(callbacks := state.get("callbacks"), Mapping):
        state = {**state, "callbacks": {_CALLBACKS.get(key, key): value for key, value in callbacks.items()}}
    return state


def current_weights(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with the present keys."""
    renamed = {}
    for key, value in state_dict.items():
        for pattern, now in _WEIGHTS:
            key = pattern.sub(now, key)
        renamed[key] = value
    return renamed
