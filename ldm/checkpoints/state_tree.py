"""Plain data: tensors, numbers, strings and containers of them; all that a checkpoint holds, so that it runs no code.

A leaf's key is its dotted path: `state_dict.denoiser.weight`, `optimizer_states[0].state.3.exp_avg`.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.errors import CheckpointError, NumericError

_LEAVES = (type(None), bool, int, float, complex, str, bytes, Tensor, torch.nn.Parameter, torch.dtype, torch.device)
_CONTAINERS = (dict, OrderedDict, list, tuple, set, torch.Size)


def walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its key; a container of any other type counts as a leaf."""
    if type(value) not in _CONTAINERS:
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield f"{key}: a key", name
            yield from walk(item, _under(key, name))
    else:
        for index, item in enumerate(value):
            yield from walk(item, f"{key}[{index}]")


def replaced(value: Any, change: Callable[[str, Any], Any], key: str = "") -> Any:
    """A copy of the containers, in their order, with `change(key, leaf)` in each leaf's place."""
    if isinstance(value, dict):
        new = copy.copy(value)  # keeps the attributes of a state dict
        for name, item in value.items():
            new[name] = replaced(item, change, _under(key, name))
        return new
    if type(value) in (list, tuple):
        return type(value)(replaced(item, change, f"{key}[{index}]") for index, item in enumerate(value))
    return change(key, value)


def check_plain(state: Mapping[str, Any]) -> None:
    """Raises CheckpointError, naming the key, if a value could not be loaded again with `weights_only=True`."""
    for key, value in walk(state):
        if type(value) not in _LEAVES and type(value) not in _CONTAINERS:
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise CheckpointError(
                f"checkpoint key {key}: {kind} cannot be saved; expected a tensor, number, string or a plain "
                f"container of them, which load without running code. Convert it (float(x), str(x), dict(x), ...)."
            )


def check_finite(tensors: Mapping[str, Any]) -> None:
    """Raises NumericError, naming the tensor, if one holds a value that is not finite."""
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise NumericError(f"checkpoint key {name}: not finite, so nothing was saved; the last checkpoint stands.")


def size(state: Mapping[str, Any]) -> int:
    """Approximate size of `state` in a file, in bytes: each storage once, and a margin for keys and headers."""
    storages, leaves = {}, 0
    for _, value in walk(state):
        leaves += 1
        if isinstance(value, Tensor) and value.device.type != "meta":
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()) + 256 * leaves + (1 << 20)


def _under(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)
