"""From a data set's item to a row of a batch: transforms, the view that loaders read, and collation.

A data set decodes (images.py); a view makes pixels of it: float32 (C,H,W) in [-1,1]. Every random choice is a
function of (seed, sample number), so the number of workers, a resume and the world size change nothing.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

from ldm.data.elastic_sampler import Address
from ldm.data.sources.folder import MAX_PIXELS, ImageDataset
from ldm.errors import ConfigError, DataError
from ldm.randomness import ambient
from ldm.ranges import Count, CountOrZero, Fraction, Seed

_LEAST_RATIO = 16.0  # of long to short side: no picture below counts as thin, whatever it is resized to

logger = logging.getLogger(__name__)

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
    """Makes the square crop out of a picture too thin to be resized first; leaves others to the steps that follow.

    Resized to 256, a line of 40000 x 1 pixels would become one of 10 million x 256 before the crop. Where that would
    have more than `MAX_PIXELS`, only the part that the crop keeps is computed, to the same values up to
    rounding.

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
    """Deterministic: resize the short side (antialiased), crop the centre, scale to [-1,1].

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
        """What was done to the pixels, in plain values, for a latent cache's manifest."""
        return {
            "resolution": self.resolution,
            "crop": "center",
            "interpolation": self.interpolation.value,
            "pixel_range": [-1.0, 1.0],
        }


class TrainTransform:
    """Resize the short side (antialiased), crop, mirror by chance, scale to [-1,1].

    With `random_crop` off its output is that of `EvalTransform`, or its mirror image.

    Args:
        resolution: side of the square crop, pixels.
        random_crop: crop anywhere along the long side; False: the centre.
        flip: probability of mirroring.
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
    """A decoded image as grey (`channels` 1) or RGB (3), transformed. What goes wrong names `path`.

    Raises:
        DataError: the image has more than 8 bits, which converting would cut off.
    """
    if image.mode.startswith(("I", "F")):
        raise DataError(f"{path}: expected pixels of 8 bits, grey or RGB, found mode {image.mode!r} from the data set")
    try:
        return transform(image.convert("L" if channels == 1 else "RGB"))
    except Exception as error:
        error.add_note(f"The picture was {path}, {image.width} x {image.height} pixels.")
        raise


class View(Dataset[dict[str, Any]]):
    """A data set as rows of a batch, addressed by (sample number, item).

    A row holds `image` (C,H,W), `class_label` and `caption` where the data set has them, `sample_number`, and
    `broken` {item: message}: the unreadable items that stood before the one delivered. An unreadable item is
    replaced by the next readable one, which depends on the data alone: it is the same on every rank, in every
    worker and after a resume. `BrokenImages` reports and counts them where they arrive.

    Args:
        dataset: what to read.
        transform: PIL image -> (channels, resolution, resolution) float32 in [-1,1].
        channels: 1 (grey) or 3 (RGB).
        resolution: expected side of the transformed image.
        seed: the run's seed, for random transforms.
        patience: give up after so many unreadable items in a row and deliver a row without an image.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Transform,
        channels: Count,
        resolution: Count,
        seed: Seed,
        patience: Count = 100,
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.channels = channels
        self.resolution = resolution
        self.seed = seed
        self.patience = patience

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, address: Address) -> dict[str, Any]:
        number, index = address
        broken: dict[int, str] = {}
        while len(broken) < min(self.patience, len(self)):
            candidate = (index + len(broken)) % len(self)
            try:
                item = self.dataset[candidate]
                row: dict[str, Any] = {**item, "image": self._pixels(item["image"], number, candidate)}
            except DataError as error:
                broken[candidate] = str(error)
                continue
            return {**row, "sample_number": number, "broken": broken}
        return {"sample_number": number, "broken": broken}

    def _pixels(self, image: Image.Image, number: int, index: int) -> Tensor:
        """The transformed image (C,H,W); refuses a transform that gives anything else."""
        with ambient(self.seed, "augment", number):
            pixels = transformed(image, self.transform, self.channels, self.dataset.path(index))
        expected = (self.channels, self.resolution, self.resolution)
        if tuple(pixels.shape) != expected or pixels.dtype != torch.float32:
            raise ConfigError(
                f"the transform made {tuple(pixels.shape)} {pixels.dtype} of {self.dataset.path(index)}; "
                f"expected {expected} torch.float32 in [-1,1]: end it with a crop to data.params.resolution, "
                "v2.ToImage, v2.ToDtype(torch.float32, scale=True) and v2.Normalize([0.5], [0.5])"
            )
        return pixels


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows of a `View` -> a batch: `image` (N,C,H,W), `class_label` (N,) int64, `caption` list of N, and what stays
    on the host: `sample_number` (N,) int64 array and `broken`.

    Where a row came without an image the batch holds the last two alone: `BrokenImages.check` must see it first.
    """
    broken = {index: message for row in rows for index, message in row["broken"].items()}
    batch: dict[str, Any] = {"sample_number": np.array([row["sample_number"] for row in rows]), "broken": broken}
    if any("image" not in row for row in rows):
        return batch
    batch["image"] = torch.stack([row["image"] for row in rows])
    if "class_label" in rows[0]:
        batch["class_label"] = torch.tensor([row["class_label"] for row in rows], dtype=torch.int64)
    if "caption" in rows[0]:
        batch["caption"] = [row["caption"] for row in rows]
    return batch


class BrokenImages:
    """Reports each unreadable image of one data set once, counts them, and stops the run when they are too many.

    Args:
        total: items in the data set.
        allowed: the share of them that may be broken.
    """

    def __init__(self, total: CountOrZero, allowed: Fraction) -> None:
        self.total = total
        self.allowed = allowed
        self.found: set[int] = set()

    def check(self, batch: dict[str, Any]) -> None:
        """Take `broken` out of a batch and warn of what is new in it.

        Raises:
            DataError: more than the allowed share is broken.
        """
        broken: dict[int, str] = batch.pop("broken")
        for index, message in broken.items():
            if index not in self.found:
                self.found.add(index)
                logger.warning("%s; the next readable image takes its place (%d so far)", message, len(self.found))
        if broken and (len(self.found) > self.allowed * self.total or "image" not in batch):
            raise DataError(
                f"{len(self.found)} of {self.total} images are broken, more than the share of {self.allowed:g} that "
                f"data.params.max_broken allows; the last: {list(broken.values())[-1]}. "
                "Mend or remove them, or raise data.params.max_broken"
            )
