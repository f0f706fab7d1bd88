"""Error bars: how far a value would move with other images of the same kind, and what their number alone adds to it.

A Fréchet distance has both. Its noise falls as 1 / sqrt(N), and its bias, always upward, as 1 / N: by how much differs
between models, so that equal numbers of images do not make biased values comparable (Chong and Forsyth 2020,
"Effectively Unbiased FID and Inception Score", arXiv:1911.07023).

Both are read off the jackknife over disjoint blocks of the images: the value is computed again without each block, of
nearly as many images as before. (The values of the blocks themselves have the bias and the noise of fewer images: at
D = 32 and N = 500 their spread overstates the error by half for ten blocks, and doubles it for twenty.) The same values
extrapolate to infinitely many images (Quenouille 1956, "Notes on Bias in Estimation"; Tukey 1958 for the error), with
less noise than a line through distances of smaller sets, which `extrapolated` draws because papers report it.

The reference is taken as given: errors are those of the images under test.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ldm.errors import ConfigError
from ldm.evaluation.distances.frechet import distance_to
from ldm.evaluation.moments import Moments
from ldm.evaluation.rows import Rows, check, codes, dealt

IMAGES_PER_FEATURE = 4
"""How many times as many images as features an extrapolation needs: with fewer the bias does not fall as 1 / N.

With D = 64 and a true distance of 1.34, D images gave -7.5 (measured: 22.7), 2.3 D gave 0.67, 4 D 1.14, 8 D 1.27.
"""


def extrapolates(images: int, size: int) -> bool:
    """Whether there are enough images to extrapolate a Fréchet distance in `size` features; else compare measured ones.

    Those are comparable only for equal numbers of images, and then their errors hold whatever the number is.
    """
    return images >= IMAGES_PER_FEATURE * size


class Estimate(NamedTuple):
    """A value, its standard error, and the degrees of freedom that the error was estimated with."""

    value: float
    error: float
    freedom: float

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The ends between which the true value lies with probability `level`, by Student's distribution.

        Raises:
            ConfigError: scipy is not installed, as the extra `evaluation` does. (Where it is, every start of Lightning
                imports it, for a second.)
        """
        try:
            from scipy.special import stdtrit
        except ImportError as error:
            raise ConfigError("comparing numbers needs the package scipy: pip install -e .[evaluation]") from error
        reach = float(stdtrit(self.freedom, (1 + level) / 2)) * self.error
        return self.value - reach, self.value + reach


class Spread(NamedTuple):
    """Attributes:
    measured: the value as it is published, of these many images, with their bias.
    unbiased: extrapolated to infinitely many: what to compare between models, or between numbers of images.
    """

    measured: Estimate
    unbiased: Estimate


def blocks(features: Rows, number: int = 10, seed: int = 0) -> list[np.ndarray]:
    """`number` disjoint blocks of the images, equally large up to one image, which do not depend on their order.

    Returns:
        Indices, int64, of each block's rows of `features` (N, D).

    Raises:
        DataError, NumericError: fewer than two images a block, or features that are not finite.
    """
    check(features, least=2 * number)
    return np.array_split(dealt(codes(features), seed), number)


def of_blocks(values: Sequence[float]) -> Estimate:
    """Of a statistic without bias (KID, an accuracy, a mean over images) from its values in disjoint blocks."""
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5), len(values) - 1)


def jackknife(value: float, without: Sequence[float]) -> Spread:
    """Of a statistic of all images, and its values without each of the blocks; for what is smooth in the images."""
    number = len(without)
    unbiased = of_blocks([number * value - (number - 1) * one for one in without])
    return Spread(Estimate(value, unbiased.error, unbiased.freedom), unbiased)


def jackknifed(statistic: Callable[[Rows], float], features: Rows, number: int = 10, seed: int = 0) -> Spread:
    """`jackknife` of any statistic of `features` (N, D) that draws nothing at random, such as a precision."""
    parts = blocks(features, number, seed)
    rest = [np.concatenate(parts[:left_out] + parts[left_out + 1 :]) for left_out in range(number)]
    return jackknife(statistic(features), [statistic(features[np.sort(rows)]) for rows in rest])


def frechet_spread(features: Rows, reference: Moments, number: int = 10, seed: int = 0) -> Spread:
    """Of the Fréchet distance of `features` (N, D) to the reference, by `number` + 1 distances.

    `unbiased` is to be trusted where `extrapolates(N, D)`.
    """
    distance = distance_to(reference)
    parts = [Moments.of(features[rows]) for rows in blocks(features, number, seed)]
    total = Moments(reference.size)
    total.merge(*parts)
    return jackknife(distance(total), [distance(total.without(part)) for part in parts])


class Extrapolation(NamedTuple):
    """The line's value at infinitely many images, and the points it was drawn through."""

    unbiased: Estimate
    sizes: np.ndarray
    distances: np.ndarray


def extrapolated(
    features: Rows, reference: Moments, points: int = 12, number: int = 10, seed: int = 0
) -> Extrapolation:
    """FID-infinity: distances of random subsets of several sizes, and a line in 1 / size (Chong and Forsyth 2020).

    Sizes go evenly from a tenth of the images to all of them; if half of the images are enough for it, not below
    IMAGES_PER_FEATURE a feature. The deviation from the line alone would be too small an error, since all
    points share images: 95% intervals held the truth in 60% of trials. The error is that of the jackknife and that of
    the line (MacKinnon and White 1985, HC3: small subsets scatter more) together.

    Args:
        features: (N, D).
        reference: the moments to measure the distance to.
        points: subsets.
        number: blocks of the jackknife.
        seed: which images are in which subset and block.
    """
    check(features, least=2 * points)
    distance, total = distance_to(reference), len(features)
    smallest = max(total // 10, min(IMAGES_PER_FEATURE * reference.size, total // 2), 2)
    sizes = np.linspace(smallest, total, points).round().astype(np.int64)
    images = codes(features)
    subsets = [dealt(images, seed, 1 + subset)[:size] for subset, size in enumerate(sizes)]
    distances = np.array([distance(Moments.of(features[rows])) for rows in subsets])

    design = np.stack([np.ones(points), 1 / sizes], axis=1)
    solve = np.linalg.pinv(design)
    line = solve @ distances
    leverage = np.einsum("ij,ji->i", design, solve)
    of_line = np.sqrt((solve[0] ** 2 * ((distances - design @ line) / (1 - leverage)) ** 2).sum())
    sampling = frechet_spread(features, reference, number, seed).unbiased
    error = float(np.hypot(of_line, sampling.error))
    return Extrapolation(Estimate(float(line[0]), error, sampling.freedom), sizes, distances)


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b of independent images, with the degrees of freedom of Welch (1947)."""
    variances = a.error**2, b.error**2
    parts = sum(v**2 / one.freedom for v, one in zip(variances, (a, b), strict=True))
    freedom = sum(variances) ** 2 / parts if parts else a.freedom + b.freedom
    return Estimate(a.value - b.value, sum(variances) ** 0.5, freedom)


def distinguishable(a: Estimate, b: Estimate, level: float = 0.95) -> bool:
    """Whether two results differ by more than their noise (Welch's t-test, two-sided).

    Of pairs that are equal in truth, a share of 1 - `level` is called different. Among many pairs some always are:
    for the best of n models take a level of 1 - 0.05 / n. Compare `Spread.unbiased` with `Spread.unbiased` where
    `extrapolates` says so, and `measured` with `measured`, of equally many images, elsewhere.
    """
    low, high = difference(a, b).interval(level)
    return not low <= 0 <= high
