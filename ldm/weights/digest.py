"""What weights are, apart from the file that they came in: a hash of the tensors."""

from collections.abc import Mapping
from hashlib import sha256

import torch
from torch import Tensor


def weight_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, types, shapes and bytes: the same on every device, in any order, from any file."""
    digest = sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
