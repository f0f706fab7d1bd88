"""From a picture to pixels: resized, cropped, perhaps mirrored, as float32 (C,H,W) in [-1,1].

Every random choice is a function of (seed, sample number), so the number of workers, a resume and the world size change
nothing.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from ldm.data.dataset import Picture
from ldm.data.decoding import MAX_PIXELS, PICTURE, over_white
from ldm.errors import ConfigError, DataError
from ldm.ranges import Fraction, Resolution
from ldm.sizes import Size, as_resolution, as_size

_LEAST_RATIO = 16.0  # long to short side: no image below this counts as thin, whatever it is resized to

_Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

Transform = Callable[[Any], Tensor]
"""Picture -> float32 (C,H,W) in [-1,1]; may draw from torch's global generator.

Files come as PIL images, gray, RGB or RGBA; arrays of another number of channels as uint8 tensors (C,H,W).
torchvision's v2 takes both.
"""

TransformOfSize = Callable[[Resolution], Transform]
"""Size of the crop -> transform: a class of this file, or, in a configuration, one with `partial: true`."""


def _to_pixels() -> list[torch.nn.Module]:
    """uint8 [0,255] -> float32 [-1,1], for any number of channels."""
    normalize = v2.Normalize(mean=[0.5], std=[0.5])
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalize, v2.ToPureTensor()]


def _interpolation(name: str) -> InterpolationMode:
    names = [mode.value for mode in InterpolationMode]
    if name not in names:
        raise ConfigError(f"interpolation: expected one of {', '.join(names)}, found {name!r}")
    return InterpolationMode(name)


class _Cover:
    """Resizes a picture (antialiased) to the smallest size that covers the crop and keeps the proportions.

    Resized to 256, a line of 40000 x 1 pixels would become one of 10 million x 256 before the crop. If that would have
    more than `MAX_PIXELS`, only the part that the crop keeps is computed, with the same values up to rounding.

    Args:
        size: of the crop.
        random_crop: the crop is anywhere along the side that is too long; False: in the center.
        interpolation: of the resize.
    """

    def __init__(self, size: Size, random_crop: bool, interpolation: InterpolationMode) -> None:
        self.size = size
        self.random_crop = random_crop
        self.resampling = Image.Resampling[interpolation.value.partition("-")[0].upper()]
        self.ratio = max(_LEAST_RATIO, MAX_PIXELS / (size[0] * size[1]))

    def __call__(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        if isinstance(image, Image.Image):
            return self._resized(image, *self._window(image.width, image.height))
        # Channel by channel, with the same filters for any number of them, as Pillow resizes color without opacity.
        window = self._window(image.shape[2], image.shape[1])
        planes = [self._resized(Image.fromarray(plane.numpy()), *window) for plane in image]
        return torch.stack([torch.from_numpy(np.array(plane)) for plane in planes])

    def _resized(self, image: Image.Image, size: tuple[int, int], box: _Box | None) -> Image.Image:
        return image if box is None and size == image.size else image.resize(size, self.resampling, box)

    def _window(self, width: int, height: int) -> tuple[tuple[int, int], _Box | None]:
        """(width, height) to resize to, and of which part of the picture; None: of all of it."""
        rows, columns = self.size
        wide = width * rows > height * columns
        short, long = sorted((width * rows, height * columns))  # in units in which the crop is a square
        resized = int(rows * width / height) if wide else int(columns * height / width)  # as torchvision rounds
        if long <= self.ratio * short:
            return ((resized, rows) if wide else (columns, resized)), None
        whole, kept = (width, columns) if wide else (height, rows)
        spare = resized - kept
        start = int(torch.randint(spare + 1, ())) if self.random_crop else round(spare / 2)
        first, last = start * whole / resized, (start + kept) * whole / resized
        return (columns, rows), (first, 0, last, height) if wide else (0, first, width, last)


class EvalTransform:
    """Deterministic: resize to cover the crop (antialiased), crop the center, scale to [-1,1].

    Args:
        resolution: of the crop, pixels: the side of a square, or [height, width].
        interpolation: name of a torchvision `InterpolationMode`, such as "bicubic".
    """

    def __init__(self, resolution: Resolution, interpolation: str = "bicubic") -> None:
        self.size = as_size(resolution)
        self.interpolation = _interpolation(interpolation)
        cover = _Cover(self.size, False, self.interpolation)
        self._steps = v2.Compose([cover, v2.CenterCrop(self.size), *_to_pixels()])
        self._nearest = v2.Compose([_Cover(self.size, False, InterpolationMode.NEAREST), v2.CenterCrop(self.size)])

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """PIL image, or uint8 (C,H,W) -> (C,H,W) float32 in [-1,1]."""
        pixels: Tensor = self._steps(image)
        return pixels

    def labels(self, values: np.ndarray) -> np.ndarray:
        """Values (H,W) uint8 or int16 that lie on a picture, cropped as it is: each that of the nearest pixel."""
        # As int32, since Pillow finds another pixel in 16 bits where two are as near.
        raw = np.ascontiguousarray(values if values.itemsize == 1 else values.astype(np.int32))
        cropped: np.ndarray = np.array(self._nearest(Image.fromarray(raw))).astype(values.dtype)
        return cropped

    def corners(self, corners: np.ndarray, size: Size) -> np.ndarray:
        """Where points of a picture lie in its crop, of which [0,1] is inside, in fp64.

        Args:
            corners: (..., 2), x and y, pixels of the picture.
            size: of the picture, height and width.
        """
        (height, width), (rows, columns) = size, self.size
        wide = width * rows > height * columns
        resized = (int(rows * width / height), rows) if wide else (columns, int(columns * height / width))
        start = center_crops(np.array([size]), np.array(self.size))[0, ::-1]
        found: np.ndarray = (corners * (np.array(resized) / (width, height)) - start) / (columns, rows)
        return found

    def describe(self) -> dict[str, Any]:
        """The transform in plain values, for a latent cache's manifest."""
        return {
            "resolution": as_resolution(self.size),
            "crop": "center",
            "interpolation": self.interpolation.value,
            "pixel_range": [-1.0, 1.0],
        }


def center_crops(sizes: np.ndarray, crops: np.ndarray) -> np.ndarray:
    """Where the crop of `EvalTransform` begins in a picture that is resized to cover it: top and left, (N, 2) int64.

    Args:
        sizes: (N, 2), height and width of the pictures, pixels.
        crops: (2,) or (N, 2), height and width of the crop.
    """
    height, width = np.maximum(sizes, 1).T
    rows, columns = np.broadcast_to(crops, sizes.shape).T
    wide = width * rows > height * columns
    # As `_Cover` resizes, and torchvision crops.
    left = np.where(wide, np.floor(rows * width / height) - columns, 0)
    top = np.where(wide, 0, np.floor(columns * height / width) - rows)
    return np.rint(np.stack([top, left], 1) / 2).astype(np.int64)


class TrainTransform:
    """Resize to cover the crop (antialiased), crop, flip at random, scale to [-1,1].

    Without `random_crop` its output is that of `EvalTransform`, or its mirror image.

    Args:
        resolution: of the crop, pixels: the side of a square, or [height, width].
        random_crop: crop anywhere along the side that is too long; False: the center.
        flip: probability of a horizontal flip.
        interpolation: name of a torchvision `InterpolationMode`, such as "bicubic".
    """

    def __init__(
        self, resolution: Resolution, random_crop: bool = False, flip: Fraction = 0.5, interpolation: str = "bicubic"
    ) -> None:
        size = as_size(resolution)
        crop = v2.RandomCrop(size) if random_crop else v2.CenterCrop(size)
        cover = _Cover(size, random_crop, _interpolation(interpolation))
        self._steps = v2.Compose([cover, crop, v2.RandomHorizontalFlip(flip), *_to_pixels()])

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """PIL image, or uint8 (C,H,W) -> (C,H,W) float32 in [-1,1]."""
        pixels: Tensor = self._steps(image)
        return pixels


def transformed(image: Picture, transform: Transform, channels: int, path: str) -> Tensor:
    """A decoded picture with that many channels, transformed: (C,H,W). Errors name `path`.

    Raises:
        DataError: a PIL image has more than 8 bits, which conversion would truncate.
        ConfigError: the picture has another number of channels, which cannot be converted.
    """
    prepared = _with_channels(image, channels, path)
    try:
        return transform(prepared)
    except Exception as error:
        height, width = prepared.shape[1:] if isinstance(prepared, Tensor) else prepared.size[::-1]
        error.add_note(f"{PICTURE} {path}, {width} x {height} pixels.")
        raise


def _with_channels(image: Picture, channels: int, path: str) -> Image.Image | Tensor:
    """Gray or RGB, alpha over white, or RGBA as PIL; arrays of any number of channels as uint8 (C,H,W)."""
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            raise DataError(
                f"{path}: expected pixels of 8 bits, gray or RGB, found mode {image.mode!r} from the data set"
            )
        if channels == 4:
            return image.convert("RGBA")  # whose opacity Pillow takes into account when it resizes
        if channels in (1, 3):
            return over_white(image).convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.dtype != np.uint8 or pixels.shape[2] != channels:
        raise ConfigError(
            f"{path}: expected pixels (H,W,{channels}) of uint8, since the model has pictures of {channels} channels, "
            f"found {pixels.shape} of {pixels.dtype}: change data.params.channels of stage 1, or the data set"
        )
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
