"""Standard normal noise as a function of 64 bits for each row. Which way it is drawn is chosen once for a run.

`CounterBased` is the standard. `GeneratorPerRow` is what runs had before there was a choice, and what they keep.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_LOW_31 = 2**31 - 1
_SIGN = -(2**31)


class Normals(ABC):
    """Makes noise."""

    @abstractmethod
    def __call__(
        self, keys: np.ndarray, shape: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Standard normal noise: (N, *shape).

        Args:
            keys: (N,) uint64; each row is a function of its own key alone.
            shape: of a row.
            device: where it is drawn.
            dtype: of the result.
        """


class GeneratorPerRow(Normals):
    """torch's own generator, seeded anew for each row: a kernel a row.

    A GPU's noise differs from the CPU's. That of the CPU reads only 32 bits of its seed, so that of 77,000 rows two are
    likely to be equal.
    """

    def __call__(
        self, keys: np.ndarray, shape: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        out = torch.empty(len(keys), *shape, dtype=dtype, device=device)
        generator = torch.Generator(device)
        for row, key in zip(out, keys.tolist(), strict=True):
            row.normal_(generator=generator.manual_seed(key))
        return out


class CounterBased(Normals):
    """All rows at once, the same bits on every device whose float32 rounds as IEEE 754 says.

    Each number is computed from its row's key and its place in the row (Salmon et al. 2011, "Parallel random numbers:
    as easy as 1, 2, 3"): 64 bits of SplitMix64 for each two numbers, of which Box and Muller's transform makes normals.
    Logarithm, root, sine and cosine are computed here in +, -, * and / of float32, one at a time, since the standard
    says how these round; the functions of libraries do as they like (even torch's square root on the CPU).

    Magnitudes go up to 6.66, which one normal in 4e10 exceeds.
    """

    def __call__(
        self, keys: np.ndarray, shape: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        rows, count = len(keys), math.prod(shape)
        starts = torch.from_numpy(keys.view(np.int64)).to(device, non_blocking=True)
        # A stride of its own, so that no two rows are parts of one sequence (SplittableRandom of the paper below).
        strides = mix(starts.bitwise_not()) | 1
        bits = words(starts, strides, -(-count // 2)).view(torch.int32).unflatten(1, (-1, 2))
        pairs = torch.empty(rows, 2, bits.shape[1], dtype=torch.float32, device=device)
        _box_muller(bits[..., 0], bits[..., 1], pairs)
        return pairs.flatten(1)[:, :count].reshape(rows, *shape).contiguous().to(dtype)


def words(starts: Tensor, strides: Tensor, count: int) -> Tensor:
    """SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), a sequence a row.

    Args:
        starts: (N,) int64, the seeds.
        strides: (N,) int64, odd: 0x9E3779B97F4A7C15 in the generator that is called SplitMix64.
        count: of the words of each sequence.

    Returns:
        (N, count) int64, all 64 bits of which are random.
    """
    places = torch.arange(1, count + 1, device=starts.device)
    return mix((places * strides[:, None]).add_(starts[:, None]))


def mix(z: Tensor) -> Tensor:
    """SplitMix64's finalizer, elementwise on int64, which stands for the uint64 of the same bits."""
    z = (z ^ _shifted(z, 30)).mul_(0xBF58476D1CE4E5B9 - 2**64)
    z ^= _shifted(z, 27)
    z *= 0x94D049BB133111EB - 2**64
    return z.bitwise_xor_(_shifted(z, 31))


def _shifted(z: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left: torch's own shift repeats the sign."""
    return (z >> bits).bitwise_and_(2 ** (64 - bits) - 1)


def _box_muller(radius: Tensor, angle: Tensor, out: Tensor) -> None:
    """Two normals of two times 32 random bits: (N, n) int32 each -> (N, 2, n) float32.

    The first bit of each is a sign, so that a quarter of the circle is left to compute: the points
    R (cos p - sin p, cos p + sin p) with R^2 = -ln u and |p| <= pi/4.
    """
    # In (0, 1], and as fine near 0, whence large numbers come, as float32 can be.
    u = (radius & _LOW_31).float().mul_(2.0**-31).add_(2.0**-32)
    r = _sqrt(_negative_log(u))
    t = (angle << 1).float().mul_(2.0**-32)  # p = pi/2 t
    square = t * t
    # Polynomials of least maximal error: below 5e-9 and 3e-8.
    sine = _polynomial(square, (1.57079632, -0.64596348, 0.07968023, -0.00460218)).mul_(t)
    cosine = _polynomial(square, (0.99999997, -1.23369701, 0.25359864, -0.02040835))
    torch.sub(cosine, sine, out=out[:, 0])
    torch.add(cosine, sine, out=out[:, 1])
    out *= r[:, None]
    signs = out.view(torch.int32)
    signs[:, 0] ^= radius & _SIGN
    signs[:, 1] ^= angle & _SIGN


def _negative_log(u: Tensor) -> Tensor:
    """-ln u of float32 in (0, 1]: relative error below 4e-7; 0 where u is 1."""
    bits = u.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23  # that of sqrt(1/2), so that u = m 2^exponent with m in [sqrt(1/2), sqrt(2))
    m = (bits - (exponent << 23)).view(torch.float32)
    ratio = (1 - m).div_(m + 1)
    # -ln m = 2 artanh(ratio); the polynomial is wrong by 3e-7 at most.
    log = _polynomial(ratio * ratio, (2.00000024, 0.66652192, 0.41297467)).mul_(ratio)
    return log.add_(exponent.float().mul_(-math.log(2)))


def _sqrt(x: Tensor) -> Tensor:
    """Of float32 from 0 on: relative error below 6e-7; about 2e-20 of 0."""
    root = ((x.view(torch.int32) >> 1) + 0x1FBD1DF5).view(torch.float32)  # halves the exponent: wrong by 4%
    for _ in range(2):  # Heron
        root = (x / root).add_(root).mul_(0.5)
    return root


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Of rising powers, by Horner's rule, rounded after each operation."""
    *lower, last = coefficients
    out = x * last
    for coefficient in reversed(lower[1:]):
        out.add_(coefficient).mul_(x)
    return out.add_(lower[0])
