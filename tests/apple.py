"""A stand-in for Apple's GPU: tensors that say they lie on `mps`, are computed by the CPU, and cannot be float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

MPS = torch.device("mps", 0)


class OnApple(Tensor):
    """Wraps a tensor of the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnApple":
        if inner.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        wrapped: OnApple = Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=MPS
        )
        wrapped.inner = inner
        return wrapped

    def __repr__(self) -> str:
        return f"OnApple({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _apply(function, args, kwargs or {})


def _apply(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    device = kwargs.get("device")
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    ours = [leaf for leaf in leaves if isinstance(leaf, OnApple)]
    others = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, OnApple) and leaf.ndim]
    copies = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    if ours and others and not copies:
        raise RuntimeError(f"{function}: Expected all tensors to be on the same device, found mps and cpu")
    if device is not None:
        there = torch.device(device).type == "mps"
        kwargs = kwargs | {"device": torch.device("cpu")}
    else:
        there = bool(ours) and not (function is torch.ops.aten.copy_.default and args[0] not in ours)
    inputs = tree_map(lambda leaf: leaf.inner if isinstance(leaf, OnApple) else leaf, (args, kwargs))
    out = function(*inputs[0], **inputs[1])
    if not there or function is torch.ops.aten._local_scalar_dense.default:
        return out
    if args and isinstance(args[0], OnApple) and isinstance(out, Tensor) and out is args[0].inner:
        return args[0]
    return tree_map(lambda leaf: OnApple(leaf) if isinstance(leaf, Tensor) else leaf, out)


class _Factories(TorchDispatchMode):
    """What is made on `mps`, or sent there."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _apply(function, args, kwargs or {})


@contextmanager
def apple() -> Iterator[torch.device]:
    """Within the block `mps` is a device, without float64."""
    with _Factories():
        yield MPS
