"""Starting from an image instead of noise: image-to-image and inpainting."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.dataset import Picture
from ldm.data.decoding import read_array, read_image
from ldm.data.value_range import checked
from ldm.errors import ConfigError
from ldm.latents.manifest import Manifest
from ldm.sampling.guidance import Denoiser
from ldm.sizes import Size


@dataclass(frozen=True)
class InitImage:
    """An image that sampling starts from.

    Args:
        image: (C,H,W) float in [-1, 1], of the size that the model generates.
        strength: 0 < strength <= 1: how far toward noise the image is taken, as a fraction of the way, and hence the
            fraction of the sampler's steps; the lower, the more of the image is kept.
        mask: (H,W) bool: what may change; the rest stays the same, pixel for pixel. None: all of it.

    Raises:
        ConfigError: a strength out of range, or an empty mask.
    """

    image: Tensor
    strength: float = 1.0
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ConfigError(f"strength: expected more than 0 and at most 1, found {self.strength:g}")
        if self.mask is not None and not bool(self.mask.any()):
            raise ConfigError("mask: all of it is black, so there is nothing to inpaint; white is what may change")

    @classmethod
    def read(
        cls, manifest: Manifest, image: Path, strength: float, mask: Path | None = None, size: Size | None = None
    ) -> "InitImage":
        """From files, decoded and resized as the model's training images were; white in the mask is what may change.

        The image is a picture file or, with any number of channels, a .npy file (H,W,C) of uint8.

        Args:
            size: (height, width) to resize and crop to, pixels; None: that of the training images.

        Raises:
            ConfigError: the mask and the image differ in size.
            DataError: a file that cannot be read.
        """
        # Imported here: torchvision loads torch's compiler, half of a sampler's start, and only pictures need it.
        from ldm.data.transforms import EvalTransform, transformed

        pixels = manifest.plan.pixels
        transform = EvalTransform(size or pixels["resolution"], pixels.get("interpolation", "bicubic"))
        value_range = checked(pixels.get("value_range"))
        picture: Picture
        if image.suffix == ".npy":
            picture = read_array(image)
        else:
            picture = read_image(image, value_range=value_range, keep_alpha=True)
        free = None
        if mask is not None:
            stencil = read_image(mask)
            height, width = np.asarray(picture).shape[:2]
            if stencil.size != (width, height):
                raise ConfigError(
                    f"{mask}: expected the size of {image}, {width} x {height}, found "
                    f"{stencil.width} x {stencil.height}"
                )
            free = transformed(stencil, transform, 1, str(mask))[0] > 0
        return cls(transformed(picture, transform, pixels["channels"], str(image)), strength, free)

    def require(self, factor: int, shape: tuple[int, int, int]) -> None:
        """ConfigError unless the image is that of a latent (c, h, w), whose autoencoder divides by `factor`."""
        found, wanted = tuple(self.image.shape[1:]), (shape[1] * factor, shape[2] * factor)
        if found != wanted:
            raise ConfigError(
                f"image to start from: expected {wanted[0]} x {wanted[1]} pixels, found {found[0]} x {found[1]}"
            )

    def times(self, times: Tensor) -> Tensor:
        """The part of a sampler's (steps + 1,) times that is left, at least one step."""
        return times[-self.steps(len(times) - 1) - 1 :]

    def steps(self, steps: int) -> int:
        """How many of a sampler's steps are left."""
        return max(1, round(self.strength * steps))

    def latent_mask(self, shape: tuple[int, int, int]) -> Tensor | None:
        """Where a latent (c, h, w) is kept: (h, w) bool; a position with any pixel that may change may change."""
        if self.mask is None:
            return None
        return F.adaptive_max_pool2d(self.mask[None].float(), shape[1:])[0] == 0

    def composite(self, images: Tensor) -> Tensor:
        """`images` (N,C,H,W) where they may change, the initial image elsewhere."""
        if self.mask is None:
            return images
        return torch.where(self.mask.to(images.device), images, self.image.to(images.device))


def inpaint(denoise: Denoiser, known: Tensor, mask: Tensor) -> Denoiser:
    """`known` (N, ...) where `mask` is true, the estimate elsewhere; every sampler then ends at the known values."""
    return lambda x, t: torch.where(mask, known, denoise(x, t))
