"""What a low-resolution picture has gone through, a class for each step: blur, resizing, noise, JPEG.

Every step takes and gives uint8, as a camera's chain and files do. Rounding adds an error of 0.3 of 255 levels a step,
and in return the arithmetic is that of whole numbers, which is equal on all machines:

- Blur convolves whole numbers with whole weights; the sum is exact before it is rounded once.
- Pillow resizes with fixed-point numbers.
- JPEG is that of Pillow's libjpeg-turbo: another version of the library may encode differently.
- Noise and the weights of a blur are computed in double precision with exponentials and logarithms, whose last bit may
  differ between processors or C libraries; it decides about one pixel in 10^10. Another version of numpy may draw other
  numbers.
"""

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ldm.data.chances import Choice, integer, require_spans, uniform
from ldm.errors import ConfigError
from ldm.ranges import Count, Fraction, NotNegative, Positive
from ldm.sizes import Size

KERNELS = ("bilinear", "bicubic", "box", "nearest")
"""Of Pillow; all but the last are antialiased (cv2's, which others use, are not: nearest stands for aliasing)."""

_BITS = 16  # of a blur's weights, which sum to 2^16
_COLUMN = 32  # lengths of Fourier transforms are multiples of it, since those of large primes are slow


class Step(ABC):
    """Something that happens to a picture."""

    @abstractmethod
    def __call__(self, pixels: np.ndarray, full: Size, random: np.random.Generator) -> np.ndarray:
        """(C,h,w) uint8 -> uint8, of the same size unless the step is there to change it.

        Args:
            full: the size of the picture before all steps.
        """

    def check(self, channels: int) -> None:  # noqa: B027 - most steps take any number
        """ConfigError if it cannot be done to pictures of so many channels."""


def gaussian_kernel(variances: tuple[float, float], angle: float) -> np.ndarray:
    """A Gaussian as (2r+1, 2r+1) int64 weights that sum to 2^16; r is three standard deviations of the wider axis.

    Args:
        variances: along the kernel's own two axes, square pixels; 0 is no blur.
        angle: of the first axis to the picture's horizontal one, radians.
    """
    radius = math.ceil(3 * math.sqrt(max(variances)))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float64)
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    first, second = (max(variance, 1e-4) for variance in variances)  # far below a pixel: only the center remains
    weights = np.exp(-0.5 * (along**2 / first + across**2 / second))
    kernel = np.rint(weights / weights.sum() * 2**_BITS).astype(np.int64)
    kernel[radius, radius] += 2**_BITS - kernel.sum()
    return kernel


def blurred(pixels: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """(C,h,w) uint8 convolved with whole weights that sum to 2^16, mirrored at the edges: uint8."""
    radius = len(kernel) // 2
    if not radius:
        return pixels
    padded = np.pad(pixels, ((0, 0), (radius, radius), (radius, radius)), mode="reflect").astype(np.float64)
    lengths = [-(-side // _COLUMN) * _COLUMN for side in padded.shape[1:]]
    product = np.fft.rfft2(padded, lengths) * np.fft.rfft2(kernel, lengths)
    # Sums are below 2^24, errors of the transforms below 10^-8: rounded to a whole number they are exact.
    sums = np.rint(np.fft.irfft2(product, lengths)[:, 2 * radius : padded.shape[1], 2 * radius : padded.shape[2]])
    return ((sums.astype(np.int64) + 2 ** (_BITS - 1)) >> _BITS).clip(0, 255).astype(np.uint8)


def resized(pixels: np.ndarray, size: Size, kernel: str) -> np.ndarray:
    """(C,h,w) uint8 -> (C,*size) uint8 by a kernel of Pillow, each channel on its own (opacity, too)."""
    if pixels.shape[1:] == size:
        return pixels
    resample = Image.Resampling[kernel.upper()]
    return np.stack([np.asarray(Image.fromarray(plane).resize(size[::-1], resample)) for plane in pixels])


def require_kernels(owner: Step, kernels: Sequence[str]) -> None:
    """ConfigError if one of the `kernels` is none of Pillow's, or there are none."""
    names = [one.name.lower() for one in Image.Resampling]
    if unknown := [name for name in kernels if name not in names] or ([] if kernels else ["none"]):
        known = f"{', '.join(names[:-1])} or {names[-1]}"
        raise ConfigError(f"{type(owner).__name__}.kernels: expected some of {known}, found {unknown[0]}")


@dataclass(frozen=True)
class IsotropicBlur(Step):
    """A round Gaussian.

    Args:
        std: standard deviation, pixels of the picture as the step finds it.
    """

    std: tuple[NotNegative, NotNegative]

    def __post_init__(self) -> None:
        require_spans(self, std=self.std)

    def __call__(self, pixels: np.ndarray, full: Size, random: np.random.Generator) -> np.ndarray:
        variance = uniform(self.std, random) ** 2
        return blurred(pixels, gaussian_kernel((variance, variance), 0.0))


@dataclass(frozen=True)
class AnisotropicBlur(Step):
    """An elliptic Gaussian at any angle.

    Args:
        variance: along each of its axes, square pixels of the picture as the step finds it.
    """

    variance: tuple[NotNegative, NotNegative]

    def __post_init__(self) -> None:
        require_spans(self, variance=self.variance)

    def __call__(self, pixels: np.ndarray, full: Size, random: np.random.Generator) -> np.ndarray:
        variances = uniform(self.variance, random), uniform(self.variance, random)
        return blurred(pixels, gaussian_kernel(variances, uniform((0, math.pi), random)))


@dataclass(frozen=True)
class Resize(Step):
    """To a smaller or larger size, by one of several kernels.

    Args:
        factor: by which the sides of the picture are divided, as they were before all steps.
        kernels: names of Pillow's, each as likely as any other. (Nearest by an even factor shifts by half a pixel of
            the picture that it is given.)
    """

    factor: tuple[Positive, Positive]
    kernels: Sequence[str] = KERNELS

    def __post_init__(self) -> None:
        require_spans(self, factor=self.factor)
        require_kernels(self, self.kernels)

    def __call__(self, pixels: np.ndarray, full: Size, random: np.random.Generator) -> np.ndarray:
        factor = uniform(self.factor, random)
        height, width = (max(1, round(side / factor)) for side in full)
        return resized(pixels, (height, width), self.kernels[integer((0, len(self.kernels) - 1), random)])


@dataclass(frozen=True)
class GaussianNoise(Step):
    """Normal noise of equal strength everywhere.

    Args:
        std: standard deviation, of 255 levels.
        gray: probability that all channels have the same noise, instead of each its own.
    """

    std: tuple[NotNegative, NotNegative]
    gray: Fraction = 0.4

    def __post_init__(self) -> None:
        require_spans(self, std=self.std)

    def __call__(self, pixels: np.ndarray, full: Size, random: np.random.Generator) -> np.ndarray:
        std = uniform(self.std, random)
        channels = 1 if random.random() < self.gray else len(pixels)
        return _to_uint8(pixels + std * random.standard_normal((channels, *pixels.shape[1:])))


@dataclass(frozen=True)
class PoissonNoise(Step):
    """Shot noise: the brighter, the stronger.

    Args:
        photons: base-10 logarithm of how many a white pixel stands for, on average.
        gray: probability that all channels have the same noise, that of their mean, instead of each its own.
    """

    photons: tuple[NotNegative, NotNegative] = (2.0, 4.0)
    gray: Fraction = 0.4

    def __post_init__(self) -> None:
        require_spans(self, photons=self.photons)

    def __call__(self, pixels: np.ndarray, full: Size, random: np.random.Generator) -> np.ndarray:
        scale = 10 ** uniform(self.photons, random) / 255
        seen = pixels.mean(0, keepdims=True) if random.random() < self.gray else pixels
        return _to_uint8(pixels + (random.poisson(seen * scale) / scale - seen))


@dataclass(frozen=True)
class Jpeg(Step):
    """Compressed as JPEG, with colors at half the resolution, and decoded; pictures of 1 or 3 channels.

    Args:
        quality: of Pillow, 1 (worst) to 100; it advises against more than 95, which makes files larger and little else.
    """

    quality: tuple[Count, Count]

    def __post_init__(self) -> None:
        require_spans(self, quality=self.quality)
        if self.quality[1] > 100:
            raise ConfigError(f"Jpeg.quality: expected numbers from 1 to 100, found {list(self.quality)}")

    def check(self, channels: int) -> None:
        if channels not in (1, 3):
            raise ConfigError(
                f"Jpeg: expected pictures of 1 or 3 channels, found {channels}, which JPEG does not have: name `steps` "
                "and `last` of the degradation without it"
            )

    def __call__(self, pixels: np.ndarray, full: Size, random: np.random.Generator) -> np.ndarray:
        picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=integer(self.quality, random))
        decoded = np.asarray(Image.open(file))
        return decoded[None] if len(pixels) == 1 else decoded.transpose(2, 0, 1)


@dataclass(frozen=True)
class Sometimes(Step):
    """A step with a probability."""

    step: Step
    probability: Fraction

    def check(self, channels: int) -> None:
        self.step.check(channels)

    def __call__(self, pixels: np.ndarray, full: Size, random: np.random.Generator) -> np.ndarray:
        return self.step(pixels, full, random) if random.random() < self.probability else pixels


@dataclass(frozen=True)
class OneOf(Step):
    """One of several steps, by weight; without weights all alike."""

    steps: Sequence[Step]
    weights: Sequence[NotNegative] | None = None

    def __post_init__(self) -> None:
        Choice(len(self.steps), self.weights, "OneOf.weights")

    def check(self, channels: int) -> None:
        for step in self.steps:
            step.check(channels)

    def __call__(self, pixels: np.ndarray, full: Size, random: np.random.Generator) -> np.ndarray:
        step = self.steps[Choice(len(self.steps), self.weights, "OneOf.weights").draw(random)]
        return step(pixels, full, random)


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return np.rint(values).clip(0, 255).astype(np.uint8)
