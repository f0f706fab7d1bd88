"""Feature vectors as rows of a matrix: the checks that every statistic makes, blocks in fp64, an order of their own.

A metric that deals images into subsets or splits would depend on the order of the files. `dealt` deals them by the
vectors themselves and a seed, so that no metric here does.
"""

import numpy as np
import torch
from torch import Tensor

from ldm.errors import DataError, NumericError
from ldm.randomness import keys
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


def codes(rows: Rows) -> np.ndarray:
    """A number (N,) int64 for each row that says what is in it, wherever the row stands; copies are counted through.

    Features that differ by rounding, as between two sizes of batches, mostly have the same one: it is made of the sums
    of eight groups of columns, each to 8 bits.
    """
    groups = np.array_split(np.arange(rows.shape[1]), min(8, rows.shape[1]))
    sums = np.concatenate([_sums(array(rows[i : i + _BLOCK]), groups) for i in range(0, len(rows), _BLOCK)])
    mantissa, exponent = np.frexp(sums)
    digits = np.rint(mantissa * 256).astype(np.int64) + 1024 * exponent
    code = (digits * keys(0, "digit", np.arange(len(groups))).astype(np.int64)).sum(axis=1)
    # Among equal codes the rows' own values decide who comes first, so that this does not depend on the order either.
    order = np.lexsort((*array(rows[:, :4]).T, *sums.T, code))
    _, starts, counts = np.unique(code[order], return_index=True, return_counts=True)
    copies = np.empty_like(code)
    copies[order] = np.arange(len(code)) - np.repeat(starts, counts)
    return keys(0, "row", code + copies).astype(np.int64)


def _sums(rows: np.ndarray, groups: list[np.ndarray]) -> np.ndarray:
    doubled = np.ascontiguousarray(rows, dtype=np.float64)
    return np.stack([doubled[:, group[0] : group[-1] + 1].sum(axis=1) for group in groups], axis=1)


def dealt(codes: np.ndarray, seed: int, number: int = 0) -> np.ndarray:
    """Indices (N,) int64 of the rows with these codes in a random order, which does not depend on the one they are in.

    Args:
        seed, number: one order for each.
    """
    return np.argsort(keys(seed, f"dealt {number}", codes))
