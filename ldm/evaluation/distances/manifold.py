"""Precision and recall, density and coverage: how much of one set of images lies where the other does.

Each image of a set has a ball around it that reaches to its k-th nearest neighbor of the same set; the balls together
stand for where the set lies.
"""

from typing import NamedTuple

import torch

from ldm.evaluation.distances.neighbors import blocks, nearest_squared
from ldm.evaluation.rows import Rows, float64
from ldm.runtime.float64 import double

_ROUNDING = 1e-12  # of the largest squared norm: squared distances that differ by less are equal


class Manifold(NamedTuple):
    """Attributes:
    precision: the share of images that lie in a ball of the reference, in [0, 1].
    recall: the share of the reference that lies in a ball of the images, in [0, 1].
    density: in how many balls of the reference an image lies, over k: about 1 for real images, without an upper end.
    coverage: the share of balls of the reference with an image in them, in [0, 1].
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(features: Rows, reference: Rows, k: int = 3, density_k: int = 5) -> Manifold:
    """Exactly, in fp64 and in blocks: memory does not grow with the number of images, time does with its square.

    Precision and recall: Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative
    Models", eq. 1 and 2; balls contain their border, as in the authors' code. Density and coverage: Naeem et al. 2020,
    "Reliable Fidelity and Diversity Metrics for Generative Models"; balls do not contain their border, as
    in the authors' code (`prdc`). That only matters where images repeat, and there rounding does not decide: distances
    that are equal but for it count as equal.

    Args:
        features: (N, D) of the images under test.
        reference: (M, D) of real images; values are comparable only for equal N and M.
        k: the neighbor that ends a ball for precision and recall; 3 is the authors'.
        density_k: the same for density and coverage; 5 is the authors'.

    Raises:
        DataError, NumericError: fewer images than neighbors, or features that are not finite.
    """
    of_reference, _ = nearest_squared(reference, reference, max(k, density_k), others=True)
    of_features, _ = nearest_squared(features, features, k, others=True)
    rounding = _ROUNDING * max(_largest(features), _largest(reference))
    reach, own_reach = of_reference[:, k - 1] + rounding, of_features[:, k - 1] + rounding
    inner_reach = of_reference[:, density_k - 1] - rounding
    precise, recalled, covered = (torch.zeros(len(rows), dtype=torch.bool) for rows in (features, reference, reference))
    inside = 0
    for rows, columns, squared in blocks(reference, features):
        precise[columns] |= (squared <= reach[rows, None]).any(0).cpu()
        recalled[rows] |= (squared <= own_reach[columns]).any(1).cpu()
        within = squared < inner_reach[rows, None]
        covered[rows] |= within.any(1).cpu()
        inside += int(within.sum())
    precision, recall, coverage = (double(hits).mean().item() for hits in (precise, recalled, covered))
    return Manifold(precision, recall, inside / (density_k * len(features)), coverage)


def _largest(rows: Rows) -> float:
    """The largest squared norm."""
    return max(float64(rows[i : i + 2048]).square().sum(1).max().item() for i in range(0, len(rows), 2048))
