"""The Fréchet distance of two sets of images in a feature space: the FID where the features are Inception's.

Its bias falls with the number of images (spread.py), so that only distances of equally many images in the same features
to the same reference can be compared.
"""

from collections.abc import Callable

import numpy as np

from ldm.errors import DataError
from ldm.evaluation.moments import Moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet (2-Wasserstein) distance of the Gaussians with these moments, in fp64; symmetric.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2)  (Dowson and Landau 1982, "The Fréchet distance between multivariate
    normal distributions", eq. 4; Heusel et al. 2017 use it on Inception's features).

    Raises:
        DataError: features of another size, or fewer than two images.
    """
    return distance_to(b)(a)


def distance_to(reference: Moments) -> Callable[[Moments], float]:
    """`frechet_distance` to one reference, the root of whose covariance is taken once: half the time of each."""
    covariance = reference.covariance
    # C1 C2 has the eigenvalues of the symmetric R C1 R, where R = C2^1/2: no complex square root is needed, and it
    # stays accurate where a covariance is singular (fewer images than features, or a dead feature).
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T

    def distance(moments: Moments) -> float:
        if moments.size != reference.size:
            raise DataError(
                f"the reference has {reference.size} features and the images have {moments.size}. "
                "Compare them in the same features."
            )
        shift, own = moments.mean - reference.mean, moments.covariance
        # Of n images a covariance has rank n - 1 at most: what lies beyond is rounding, and its root is not small.
        rank = min(_rank(reference), _rank(moments))
        products = np.linalg.eigvalsh(root @ own @ root)[reference.size - rank :]
        cross = np.sqrt(products.clip(min=0)).sum()
        return max(0.0, float(shift @ shift + np.trace(own) + np.trace(covariance) - 2 * cross))  # rounding goes below

    return distance


def _rank(moments: Moments) -> int:
    return moments.size if moments.count is None else min(moments.size, moments.count - 1)
