"""How good generated images are: numbers computed from a classifier's features and logits.

Features come from whatever network the caller chose (see features/classifier.py), so a Fréchet distance from here may
only be compared with another in the same feature space, and with the same number of images on either side: its bias
falls with the number. It is not the FID, which fixes Inception's features, the resizing and the number of images.
"""

import numpy as np
from torch import Tensor

from ldm.runtime.float64 import double


def gaussian(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and unbiased covariance (D, D), both fp64, of `features` (N, D).

    Raises:
        ValueError: fewer than two rows, or not a matrix.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be (N >= 2, D) to have a covariance, not {tuple(features.shape)}")
    rows = double(features.detach().cpu()).numpy()
    return rows.mean(axis=0), np.atleast_2d(np.cov(rows, rowvar=False))


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Squared Fréchet (2-Wasserstein) distance of the Gaussians fitted to two sets of features, in fp64.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2)  (Dowson and Landau 1982, "The Fréchet distance between multivariate
    normal distributions", eq. 4; Heusel et al. 2017 use it on Inception's features).

    Args:
        features: (N, D) of the images under test.
        reference: (M, D) of the real images.
    """
    mean_1, covariance_1 = gaussian(features)
    mean_2, covariance_2 = gaussian(reference)
    # C1 C2 has the eigenvalues of the symmetric R C2 R, where R = C1^1/2: no complex square root is needed, and it
    # stays accurate where a covariance is singular (fewer images than features, or a dead feature).
    values, vectors = np.linalg.eigh(covariance_1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ covariance_2 @ root).clip(min=0)).sum()
    shift = mean_1 - mean_2
    return float(shift @ shift + np.trace(covariance_1) + np.trace(covariance_2) - 2 * cross)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share in [0, 1] of rows of `logits` (N, K) whose largest entry is at `labels` (N,)."""
    return double(logits.argmax(dim=1) == labels).mean().item()
