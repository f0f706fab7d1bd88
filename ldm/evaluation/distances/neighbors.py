"""Nearest neighbors in a feature space, and what they say of memorization: are samples copies of training pictures?

Distances are exact and in fp64, in blocks, so that memory does not grow with the number of images. fp32 would do for
most features and halve the time, and would make the distance of a picture to its copy the rounding of two large
numbers instead of zero.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.errors import DataError
from ldm.evaluation.rows import Rows, check, float64

_BLOCK = 2048  # rows and columns of the distances that are in memory at once


def blocks(a: Rows, b: Rows) -> Iterator[tuple[slice, slice, Tensor]]:
    """Squared distances of all pairs of rows of `a` (N, D) and `b` (M, D): (rows of a, rows of b, (n, m) float64)."""
    if a.shape[1] != b.shape[1]:
        raise DataError(
            f"features of {a.shape[1]} and of {b.shape[1]} numbers: expected the same features of both sets."
        )
    for start in range(0, len(a), _BLOCK):
        left = float64(a[start : start + _BLOCK])
        for other in range(0, len(b), _BLOCK):
            right = float64(b[other : other + _BLOCK])
            norms = left.square().sum(1)[:, None] + right.square().sum(1)
            squared = torch.addmm(norms, left, right.T, alpha=-2).clamp_(min=0)
            yield slice(start, start + len(left)), slice(other, other + len(right)), squared


def nearest_squared(a: Rows, b: Rows, number: int, *, others: bool = False) -> tuple[Tensor, Tensor]:
    """The `number` smallest squared distances of each row of `a` to rows of `b`, and which rows: (N, number) each.

    Args:
        others: `a` is `b`, and no row counts as its own neighbor.

    Raises:
        DataError, NumericError: fewer rows than neighbors, or features that are not finite.
    """
    check(a)
    check(b, least=number + others)
    found: list[tuple[Tensor, Tensor]] = []
    for rows, columns, squared in blocks(a, b):
        if others and rows == columns:
            squared.fill_diagonal_(torch.inf)
        values, indices = squared.topk(min(number, squared.shape[1]), largest=False)
        indices += columns.start
        if columns.start:
            before = found.pop()
            values, order = torch.cat([before[0], values], 1).topk(number, largest=False)
            indices = torch.cat([before[1], indices], 1).gather(1, order)
        found.append((values, indices))
    return torch.cat([values for values, _ in found]), torch.cat([indices for _, indices in found])


class Nearest(NamedTuple):
    """Of each image its nearest in the reference, the nearest first: (N, number) float64 and int64."""

    distances: np.ndarray
    indices: np.ndarray


def nearest(features: Rows, reference: Rows, number: int = 1, *, others: bool = False) -> Nearest:
    """Euclidean distances of `features` (N, D) to the nearest of `reference` (M, D); a copy has distance 0 exactly.

    Args:
        others: both are the same images, and none counts as its own neighbor.

    Raises:
        DataError, NumericError: fewer images than neighbors, or features that are not finite.
    """
    _, indices = (one.cpu() for one in nearest_squared(features, reference, number, others=others))
    distances = torch.empty(indices.shape, dtype=torch.float64)
    for start in range(0, len(indices), _BLOCK):
        own, rows = float64(features[start : start + _BLOCK]), slice(start, start + _BLOCK)
        for column in range(number):
            # By differences: the products that found them have rounded away the distance of near copies.
            shift = own - float64(reference[indices[rows, column].numpy()])
            distances[rows, column] = shift.square().sum(1).sqrt().cpu()
    distances, order = distances.sort(dim=1, stable=True)
    return Nearest(distances.numpy(), indices.gather(1, order).numpy())


class Pair(NamedTuple):
    """An image, its nearest in the reference, and their distance."""

    image: int
    reference: int
    distance: float


def closest_pairs(found: Nearest, number: int = 10) -> list[Pair]:
    """The images that are nearest to the reference, each with its nearest, the closest first."""
    closest = np.argsort(found.distances[:, 0], kind="stable")[:number]
    return [Pair(int(i), int(found.indices[i, 0]), float(found.distances[i, 0])) for i in closest]


class Memorization(NamedTuple):
    """How near samples are to training pictures, beside held-out real pictures, which cannot be copies.

    Attributes:
        ratio: the median distance to the nearest training picture, of samples over that of held-out pictures. Near 1
            where samples are as new as real pictures, well below 1 where they are copies.
        nearer: how often a sample is nearer to the training pictures than a held-out picture is, in [0, 1]: 1/2 where
            nothing is copied (Meehan, Chaudhuri and Dasgupta 2020, "A Non-Parametric Test to Detect Data-Copying in
            Generative Models": 1 minus their Delta).
    """

    ratio: float
    nearer: float


def memorization(samples: Nearest, held_out: Nearest) -> Memorization:
    """Compare the distances to the nearest training pictures.

    Both measures also fall and rise with quality: blurred samples may lie nearer to everything, or farther from it.
    """
    ours, real = samples.distances[:, 0], np.sort(held_out.distances[:, 0])
    farther = len(real) - (np.searchsorted(real, ours, "left") + np.searchsorted(real, ours, "right")) / 2  # ties: half
    median = float(np.median(real))
    ratio = float(np.median(ours)) / median if median > 0 else float("nan")
    return Memorization(ratio, float(farther.mean() / len(real)))


def authenticity(samples: Nearest, training: Nearest) -> float:
    """The share in [0, 1] of samples that are farther from their training picture than that is from any other one.

    Alaa et al. 2022, "How Faithful is your Synthetic Data?"; it needs no held-out pictures. Real pictures
    have about 1/2.

    Args:
        samples: nearest(samples, training).
        training: nearest(training, training, others=True).
    """
    return float((samples.distances[:, 0] > training.distances[samples.indices[:, 0], 0]).mean())
