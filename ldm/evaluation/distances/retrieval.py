"""Whether a sample is found by what it was asked for: the rank of its own item's picture among all pictures.

The sample that was asked for by the caption of item i should be nearer to the picture of item i than to others. Only a
feature space judges, which need not know any language (as R-precision, Xu et al. 2018, "AttnGAN", does with one).
"""

from typing import NamedTuple

import numpy as np
import torch

from ldm.evaluation.distances.neighbors import blocks
from ldm.evaluation.rows import Rows, check
from ldm.randomness import permutation

AT = 10
"""The first so many ranks count as found, besides the first."""


class Retrieval(NamedTuple):
    """Of the samples.

    Attributes:
        first: the share of samples whose own picture is the nearest of all, in [0, 1].
        among: the share of samples whose own picture is among the `AT` nearest.
        median: the median rank of the own picture, 1 for the nearest.
    """

    first: float
    among: float
    median: float


def ranks(features: Rows, reference: Rows, own: np.ndarray) -> np.ndarray:
    """The rank of row `own[i]` of `reference` (M, D) by its distance from row i of `features` (N, D): (N,), from 1 on.

    Where others are equally far, it is in the middle of them.

    Raises:
        DataError, NumericError: features that do not fit together, or are not finite.
    """
    check(features)
    check(reference)
    chosen = torch.from_numpy(own)
    mine = torch.empty(len(own), dtype=torch.float64)
    for rows, columns, squared in blocks(features, reference):
        here = torch.nonzero((chosen[rows] >= columns.start) & (chosen[rows] < columns.start + squared.shape[1]))[:, 0]
        mine[here + rows.start] = squared.cpu()[here, chosen[rows][here] - columns.start]
    nearer, equal = torch.zeros(len(own)), torch.zeros(len(own))
    for rows, _, squared in blocks(features, reference):  # the same products again, so that equal distances are equal
        nearer[rows] += (squared.cpu() < mine[rows, None]).sum(1)
        equal[rows] += (squared.cpu() == mine[rows, None]).sum(1)
    return (nearer + (equal + 1) / 2).numpy()


def retrieval(features: Rows, reference: Rows, own: np.ndarray) -> Retrieval:
    """How well the samples' own pictures are found; arguments and errors as of `ranks`."""
    found = ranks(features, reference, own)
    return Retrieval(float((found <= 1).mean()), float((found <= AT).mean()), float(np.median(found)))


def shuffled(own: np.ndarray) -> np.ndarray:
    """The same items, each given to another sample: what is found of these is found by chance."""
    return own[permutation(0, 0, len(own))]
