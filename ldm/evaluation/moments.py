"""Mean and covariance of features, gathered batch by batch in fp64: what a Fréchet distance needs of a set of images.

Neither the size of the batches, nor their order, nor the number of ranks enters the result, beyond the rounding of
fp64 sums. Products are taken about the mean of what has been seen, not about zero: features far from zero would lose
their covariance otherwise (Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance").
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from ldm.errors import DataError
from ldm.evaluation.features.base import MAIN, SPATIAL
from ldm.evaluation.rows import Rows, array, check
from ldm.files import DAMAGED_NPZ, published
from ldm.ranges import Count
from ldm.runtime.distributed import sum_over_ranks

_KEYS = {MAIN: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}
"""Mean and covariance of each part in the reference files of guided-diffusion (ADM)."""


_BLOCK = 4096  # rows that are in memory in fp64 at once


class Moments:
    """Count, mean and scatter of the feature vectors of a set of images.

    Attributes:
        count: how many images; None where a file of others does not say.
        mean: (D,) float64.
        scatter: (D, D) float64, the sum over images of the outer product of (features - mean) with itself.

    Args:
        size: D; a new object has seen no image.
    """

    def __init__(self, size: Count) -> None:
        self.count: int | None = 0
        self.mean = np.zeros(size)
        self.scatter = np.zeros((size, size))

    @classmethod
    def of(cls, features: Rows) -> Self:
        """Of all rows of `features` (N, D)."""
        moments = cls(features.shape[-1])
        moments.add(features)
        return moments

    @property
    def size(self) -> int:
        """D."""
        return len(self.mean)

    @property
    def covariance(self) -> np.ndarray:
        """(D, D) float64, unbiased.

        Raises:
            DataError: fewer than two images.
        """
        if self.count is None:
            return self.scatter
        if self.count < 2:
            raise DataError(f"{self.count} images have no covariance: expected 2 or more. Compare more images.")
        return self.scatter / (self.count - 1)

    @property
    def rank_deficient(self) -> bool:
        """Whether there are too few images for a covariance of full rank.

        Distances are defined all the same, and their bias is large and no longer falls as 1 / count.
        """
        return self.count is not None and self.count <= self.size

    def add(self, features: Rows) -> None:
        """Take in more images; `features` (N, D), any N.

        Raises:
            ValueError, NumericError: see rows.check.
        """
        check(features)
        for start in range(0, len(features), _BLOCK):
            rows = array(features[start : start + _BLOCK]).astype(np.float64)
            mean = rows.mean(axis=0)
            self._take_in(len(rows), mean, rows - mean)

    def merge(self, *others: "Moments") -> None:
        """Take in the images of `others`."""
        for other in others:
            count = _counted(other)
            self._take_in(count, other.mean, np.empty((0, self.size)))
            self.scatter += other.scatter

    def without(self, part: "Moments") -> "Moments":
        """New moments, of these images but for those of `part`, which are among them."""
        rest, removed = _counted(self) - _counted(part), _counted(part)
        left = Moments(self.size)
        left.count = rest
        left.mean = (_counted(self) * self.mean - removed * part.mean) / rest
        shift = part.mean - left.mean
        left.scatter = self.scatter - part.scatter - rest * removed / _counted(self) * np.outer(shift, shift)
        return left

    def over_ranks(self) -> "Moments":
        """New moments, of the images of all ranks; every rank calls it, once, also one that has seen no image."""
        own = _counted(self)
        sums = sum_over_ranks(torch.from_numpy(np.concatenate([[own], own * self.mean])))
        total = Moments(self.size)
        total.count = int(sums[0])
        total.mean = sums[1:].numpy() / max(total.count, 1)
        shift = self.mean - total.mean
        total.scatter = sum_over_ranks(torch.from_numpy(self.scatter + own * np.outer(shift, shift))).numpy()
        return total

    def _take_in(self, count: int, mean: np.ndarray, deviations: np.ndarray) -> None:
        """`count` images of that mean; `deviations` (any, D), whose products with themselves add to the scatter."""
        if mean.shape != self.mean.shape:
            raise ValueError(f"features of {len(mean)} numbers do not go with those of {self.size}")
        before, shift = _counted(self), mean - self.mean
        self.count = before + count
        if count == 0:
            return
        # The distance of the two means adds one more product: as another row it costs nothing.
        rows = np.concatenate([deviations, np.sqrt(before * count / self.count) * shift[None]])
        self.scatter += rows.T @ rows
        self.mean = self.mean + shift * (count / self.count)

    # ---- files ----

    @classmethod
    def load(cls, path: Path, part: str = MAIN, size: int | None = None) -> "Moments":
        """Read statistics as guided-diffusion (ADM) and pytorch-fid write them: `mu`, `sigma`, an `.npz`.

        Args:
            path: the file.
            part: MAIN, or SPATIAL for sFID's (`mu_s`, `sigma_s`, which ADM's files have too).
            size: the D that is needed; None: any.

        Raises:
            DataError: the file is missing, truncated, or holds something else.
        """
        mean_key, covariance_key = _KEYS[part]
        found = _read(path, (mean_key, covariance_key, "count"))
        mean, covariance = found[mean_key], found[covariance_key]
        expected = f"({size or len(np.atleast_1d(mean))},)"
        if mean.ndim != 1 or size not in (None, len(mean)):
            raise DataError(
                f"{path}: {mean_key}: expected the shape {expected}, found {mean.shape}. "
                "Name statistics of the same features."
            )
        if covariance.shape != 2 * mean.shape:
            raise DataError(
                f"{path}: {covariance_key}: expected the shape {2 * mean.shape}, found {covariance.shape}. "
                "The file is damaged: make it again."
            )
        for key, values in found.items():
            if not (np.issubdtype(values.dtype, np.number) and np.isfinite(values).all()):
                raise DataError(f"{path}: {key}: expected numbers, found NaN, infinity or text. Make the file again.")
        _check_covariance(covariance, f"{path}: {covariance_key}")
        if (number := found.get("count", mean)).ndim == 0 and number < 2:
            raise DataError(f"{path}: count: expected 2 pictures or more, found {number}. Make it of more pictures.")
        moments = cls(len(mean))
        moments.count = int(found["count"]) if found.get("count", mean).ndim == 0 else None
        moments.mean = mean.astype(np.float64)
        moments.scatter = covariance.astype(np.float64) * (1 if moments.count is None else moments.count - 1)
        return moments

    @staticmethod
    def stored(path: Path, part: str) -> bool:
        """Whether a file that `load` reads has the statistics of that part."""
        with np.load(path, allow_pickle=False) as archive:
            return {*_KEYS[part]} <= {*archive.keys()}

    @staticmethod
    def features_of(path: Path) -> str | None:
        """The name of the features that `save` stored in a file; None if it stored none."""
        with np.load(path, allow_pickle=False) as archive:
            return str(archive["features"]) if "features" in archive else None

    def save(self, path: Path, spatial: "Moments | None" = None, features: str | None = None) -> None:
        """Write an `.npz` that ADM's and pytorch-fid's evaluators read; it is there whole or not at all.

        `count` and `features` are more keys, which others do not look at.

        Args:
            path: the file.
            spatial: the moments of the spatial features, for sFID.
            features: which they are.
        """
        stored: dict[str, Any] = {}
        for part, moments in ((MAIN, self), (SPATIAL, spatial)):
            if moments is not None:
                stored |= zip(_KEYS[part], (moments.mean, moments.covariance), strict=True)
        if self.count is not None:
            stored["count"] = np.array(self.count)
        if features is not None:
            stored["features"] = np.array(features)
        with published(path) as aside, aside.open("wb") as file:
            np.savez(file, **stored)


def _counted(moments: Moments) -> int:
    if moments.count is None:
        raise ValueError("moments of an unknown number of images cannot be merged")
    return moments.count


def _check_covariance(covariance: np.ndarray, place: str) -> None:
    """DataError for what no covariance is. (Float32's rounding leaves those of other programs slightly asymmetric.)"""
    if not np.allclose(covariance, covariance.T, rtol=1e-3, atol=1e-6 * np.abs(covariance).max(initial=0)):
        raise DataError(f"{place}: expected a symmetric matrix. The file is damaged: make it again.")
    if (smallest := covariance.diagonal().min(initial=0)) < 0:
        raise DataError(f"{place}: expected variances of 0 or more, found {smallest:g}. Make the file again.")


def _read(path: Path, names: tuple[str, str, str]) -> Mapping[str, np.ndarray]:
    """The arrays of these names; the last may be missing."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = list(archive.keys())
            found = {name: archive[name] for name in names if name in keys}
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file. Expected statistics of features, an .npz.") from error
    except DAMAGED_NPZ as error:
        raise DataError(
            f"{path}: expected an .npz with {names[0]} and {names[1]}, found a file that is truncated or of another "
            f"kind ({error}). Copy or make it again."
        ) from error
    if missing := [name for name in names[:2] if name not in found]:
        images = " It holds images: name it as pictures, not as statistics." if "arr_0" in keys else ""
        raise DataError(
            f"{path}: expected the keys {names[0]} and {names[1]}, found {', '.join(keys) or 'none'}; "
            f"{' and '.join(missing)} missing.{images}"
        )
    return found
