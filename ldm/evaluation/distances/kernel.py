"""KID: the kernel distance of two sets of images, which has no bias whatever their number is."""

from typing import NamedTuple

import numpy as np
from torchmetrics.image.kid import poly_mmd

from ldm.errors import DataError
from ldm.evaluation.rows import Rows, check, codes, dealt, float64


class Kid(NamedTuple):
    """Mean over the subsets, and the deviation of one subset's value: not the error of the mean, which is smaller.

    The error of the mean is not deviation / sqrt(subsets) either, since the subsets share images.
    """

    mean: float
    deviation: float


def kid(a: Rows, b: Rows, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> Kid:
    """The unbiased squared MMD with the kernel (x.y / D + 1)^3, over random subsets, in fp64.

    Binkowski et al. 2018, "Demystifying MMD GANs"; number and size of the subsets are those of
    torch-fidelity. It may be negative where the sets are very alike. It does not depend on the order of the images.

    Args:
        a: (N, D) features.
        b: (M, D) features.
        subsets: how often a subset of each is drawn.
        subset_size: images in each, drawn without repetition.
        seed: which subsets.

    Raises:
        DataError, NumericError: fewer images than a subset has, or features that are not finite.
    """
    for rows in (a, b):
        check(rows)
        if len(rows) < subset_size:
            raise DataError(
                f"features of {len(rows)} images: expected {subset_size} or more, the size of KID's subsets. "
                "Compare more images or ask for smaller subsets."
            )
    codes_a, codes_b = codes(a), codes(b)
    values = []
    for subset in range(subsets):
        x = float64(a[dealt(codes_a, seed, 2 * subset)[:subset_size]])
        y = float64(b[dealt(codes_b, seed, 2 * subset + 1)[:subset_size]])
        values.append(poly_mmd(x, y).item())
    return Kid(float(np.mean(values)), float(np.std(values)))
