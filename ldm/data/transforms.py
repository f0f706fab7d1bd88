"""From a picture to pixels: resized, cropped, perhaps mirrored, as float32 (C,H,W) in [-1,1].

Every random choice is a function of (seed, sample number), so the number of workers, a resume and the world size change
nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from ldm.data.decoding import MAX_PIXELS, PICTURE
from ldm.errors import ConfigError, DataError
from ldm.ranges import Count, Fraction

_LEAST_RATIO = 16.0  # long to short side: no image below this counts as thin, whatever it is resized to

Transform = Callable[[Image.Image], Tensor]
"""PIL image -> float32 (C,H,W) in [-1,1]; may draw from torch's global generator."""


def _to_pixels() -> list[torch.nn.Module]:
    """uint8 [0,255] -> float32 [-1,1], for any number of channels."""
    normalize = v2.Normalize(mean=[0.5], std=[0.5])
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalize, v2.ToPureTensor()]


def _interpolation(name: str) -> InterpolationMode:
    names = [mode.value for mode in InterpolationMode]
    if name not in names:
        raise ConfigError(f"interpolation: expected one of {', '.join(names)}, found {name!r}")
    return InterpolationMode(name)


class _ThinPictures:
    """Computes the square crop of an image too thin to be resized first; leaves others to the steps that follow.

    Resized to 256, a line of 40000 x 1 pixels would become one of 10 million x 256 before the crop. If that would have
    more than `MAX_PIXELS`, only the part that the crop keeps is computed, with the same values up to rounding.

    Args:
        resolution: side of the square crop, pixels.
        random_crop: anywhere along the long side; False: the center.
        interpolation: of the resize.
    """

    def __init__(self, resolution: int, random_crop: bool, interpolation: InterpolationMode) -> None:
        self.resolution = resolution
        self.random_crop = random_crop
        self.resampling = Image.Resampling[interpolation.value.partition("-")[0].upper()]
        self.ratio = max(_LEAST_RATIO, MAX_PIXELS / resolution**2)

    def __call__(self, image: Image.Image) -> Image.Image:
        short, long = sorted(image.size)
        if long <= self.ratio * short:
            return image
        resized = int(self.resolution * long / short)  # as torchvision rounds
        spare = resized - self.resolution
        start = int(torch.randint(spare + 1, ())) if self.random_crop else round(spare / 2)
        first, last = start * long / resized, (start + self.resolution) * long / resized
        box = (first, 0, last, short) if image.width == long else (0, first, short, last)
        return image.resize((self.resolution, self.resolution), self.resampling, box)


class EvalTransform:
    """Deterministic: resize the short side (antialiased), crop the center, scale to [-1,1].

    Args:
        resolution: side of the square crop, pixels.
        interpolation: name of a torchvision `InterpolationMode`, such as "bicubic".
    """

    def __init__(self, resolution: Count, interpolation: str = "bicubic") -> None:
        self.resolution = resolution
        self.interpolation = _interpolation(interpolation)
        resize = v2.Resize(resolution, interpolation=self.interpolation, antialias=True)
        thin = _ThinPictures(resolution, False, self.interpolation)
        self._steps = v2.Compose([thin, resize, v2.CenterCrop(resolution), *_to_pixels()])

    def __call__(self, image: Image.Image) -> Tensor:
        """PIL image -> (C,H,W) float32 in [-1,1]."""
        pixels: Tensor = self._steps(image)
        return pixels

    def describe(self) -> dict[str, Any]:
        """The transform in plain values, for a latent cache's manifest."""
        return {
            "resolution": self.resolution,
            "crop": "center",
            "interpolation": self.interpolation.value,
            "pixel_range": [-1.0, 1.0],
        }


class TrainTransform:
    """Resize the short side (antialiased), crop, flip at random, scale to [-1,1].

    Without `random_crop` its output is that of `EvalTransform`, or its mirror image.

    Args:
        resolution: side of the square crop, pixels.
        random_crop: crop anywhere along the long side; False: the center.
        flip: probability of a horizontal flip.
        interpolation: name of a torchvision `InterpolationMode`, such as "bicubic".
    """

    def __init__(
        self, resolution: Count, random_crop: bool = False, flip: Fraction = 0.5, interpolation: str = "bicubic"
    ) -> None:
        mode = _interpolation(interpolation)
        resize = v2.Resize(resolution, interpolation=mode, antialias=True)
        crop = v2.RandomCrop(resolution) if random_crop else v2.CenterCrop(resolution)
        thin = _ThinPictures(resolution, random_crop, mode)
        self._steps = v2.Compose([thin, resize, crop, v2.RandomHorizontalFlip(flip), *_to_pixels()])

    def __call__(self, image: Image.Image) -> Tensor:
        """PIL image -> (C,H,W) float32 in [-1,1]."""
        pixels: Tensor = self._steps(image)
        return pixels


def transformed(image: Image.Image, transform: Transform, channels: int, path: str) -> Tensor:
    """A decoded image as gray (`channels` 1) or RGB (3), transformed. Errors name `path`.

    Raises:
        DataError: the image has more than 8 bits, which conversion would truncate.
    """
    if image.mode.startswith(("I", "F")):
        raise DataError(f"{path}: expected pixels of 8 bits, gray or RGB, found mode {image.mode!r} from the data set")
    try:
        return transform(image.convert("L" if channels == 1 else "RGB"))
    except Exception as error:
        error.add_note(f"{PICTURE} {path}, {image.width} x {image.height} pixels.")
        raise
