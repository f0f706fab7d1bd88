"""Feature vectors as rows of a matrix: the checks that every statistic makes, blocks in fp64, an order of their own.

A metric that deals images into subsets or splits would depend on the order of the files. `dealt` puts the rows into an
order that is a function of the vectors and a seed alone, so that no metric here does.
"""

import numpy as np
import torch
from torch import Tensor

from ldm.errors import DataError, NumericError
from ldm.randomness import permutation
from ldm.runtime.float64 import double

Rows = np.ndarray | Tensor
"""(N, D) features, one image a row, float; an array may be a memory map, a tensor may lie on any device."""

_BLOCK = 4096


def check(rows: Rows, least: int = 1) -> None:
    """Refuse what no statistic can be made of.

    Raises:
        ValueError: not a matrix.
        DataError: fewer than `least` rows.
        NumericError: NaN or infinity.
    """
    if rows.ndim != 2:
        raise ValueError(f"features must be a matrix (N, D), not {tuple(rows.shape)}")
    if len(rows) < least:
        raise DataError(f"features of {len(rows)} images: expected {least} or more. Compare more images.")
    for start in range(0, len(rows), _BLOCK):
        finite = np.isfinite(array(rows[start : start + _BLOCK])).all(axis=1)
        if not finite.all():
            raise NumericError(
                f"features of image {start + int(finite.argmin())}: expected finite numbers, found NaN or infinity. "
                "Look at that picture, and compute features in float32."
            )


def array(rows: Rows) -> np.ndarray:
    """As a numpy array, without a copy where it is one or lies on the CPU."""
    return rows.detach().cpu().numpy() if isinstance(rows, Tensor) else rows


def float64(rows: Rows) -> Tensor:
    """A copy in float64, on the rows' own device where that has float64."""
    return double(rows.detach()) if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows, dtype=np.float64))


def dealt(rows: Rows, seed: int, number: int = 0) -> np.ndarray:
    """Indices (N,) int64 of the rows in a random order that does not depend on the order they are in.

    They are sorted by their sum and then permuted. Rows with equal sums are sorted by their first columns, so those
    that still change places are all but equal.

    Args:
        seed, number: one order for each.
    """
    sums = np.concatenate([array(rows[i : i + _BLOCK]).astype(np.float64).sum(1) for i in range(0, len(rows), _BLOCK)])
    first = array(rows[:, :4]).T
    return np.lexsort((*first[::-1], sums))[permutation(seed, number, len(rows))]
