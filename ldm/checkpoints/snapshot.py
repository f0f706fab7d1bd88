"""A copy of a state on the host, for a background thread to write while training changes the original."""

from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints import state_tree


class HostMemory:
    """Copies states into its own memory, reused between copies, since allocating costs more than copying.

    Copies from a GPU run concurrently into pinned memory. A copy is valid until the next one is made.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """`state` with its tensors copied, shared ones still shared; waits for the device."""
        old, self._memory = self._memory, {}
        seen: dict[tuple[Any, ...], Tensor] = {}
        devices: set[torch.device] = set()

        def copied(key: str, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            source = leaf.detach()
            place = (source.device, source.data_ptr(), source.shape, source.stride(), source.dtype)
            if place not in seen or not source.numel():
                seen[place] = self._memory[key] = _room(source, old.get(key)).copy_(source, non_blocking=True)
                devices.add(source.device)
            return seen[place]

        copy: dict[str, Any] = state_tree.replaced(state, copied)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return copy

    def release(self) -> None:
        """Free the memory."""
        self._memory = {}


def _room(source: Tensor, old: Tensor | None) -> Tensor:
    """`old` if it fits, else new memory on the host."""
    same = old is not None and old.shape == source.shape and old.dtype == source.dtype
    if old is not None and same and old.stride() == source.stride() and old.is_pinned() == source.is_cuda:
        return old
    return torch.empty_like(source, device="cpu", pin_memory=source.is_cuda)
