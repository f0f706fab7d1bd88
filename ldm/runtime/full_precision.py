"""IEEE float32, whatever the surroundings allow: what is compared with other numbers must not depend on them."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

_LOCK = Lock()
_inside = 0
_outside: tuple[Any, ...] = ()


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Within the block no autocast on devices of this type, no TF32 or bf16 in convolutions and matrix products.

    Each computes by an algorithm that gives the same bits each time. All but autocast are settings of the process: they
    are what they were as soon as no thread is within such a block.
    """
    global _inside, _outside
    with _LOCK:
        if _inside == 0:
            _outside = _settings()
            _set(("ieee", "ieee", "ieee", "ieee", False, True))
        _inside += 1
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        with _LOCK:
            _inside -= 1
            if _inside == 0:
                _set(_outside)


def _kernels() -> tuple[Any, ...]:
    backends: Any = torch.backends
    return backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv


def _settings() -> tuple[Any, ...]:
    """The precision of each kernel, and cuDNN's choice of algorithms: by trials, and deterministic."""
    cudnn = torch.backends.cudnn
    return *(kernel.fp32_precision for kernel in _kernels()), cudnn.benchmark, cudnn.deterministic


def _set(settings: tuple[Any, ...]) -> None:
    *precisions, benchmark, deterministic = settings
    for kernel, precision in zip(_kernels(), precisions, strict=True):
        kernel.fp32_precision = precision
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, deterministic
