"""IEEE float32, whatever the surroundings allow: what is compared with other numbers must not depend on them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Within the block no autocast on devices of this type, no TF32 or bf16 in convolutions and matrix products.

    Each computes by an algorithm that gives the same bits each time.
    """
    backends: Any = torch.backends
    kernels = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    precisions = [kernel.fp32_precision for kernel in kernels]
    choice = backends.cudnn.benchmark, backends.cudnn.deterministic
    for kernel in kernels:
        kernel.fp32_precision = "ieee"
    backends.cudnn.benchmark, backends.cudnn.deterministic = False, True
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        backends.cudnn.benchmark, backends.cudnn.deterministic = choice
        for kernel, precision in zip(kernels, precisions, strict=True):
            kernel.fp32_precision = precision
