"""The rules by which pictures get the size that a network takes. Each changes a distance as much as a network does.

The rule and the size are part of a feature space's name (Parmar et al. 2022, arXiv:2104.11222, on what they change).
Every rule stretches a picture that is not square; a picture of the right size passes unchanged, smaller and larger ones
are interpolated. Pixels stay in [0, 255].
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldm.ranges import Count, Resolution
from ldm.runtime.float64 import double
from ldm.sizes import as_size


class Resize(Protocol):
    """(N, C, H, W) uint8 -> (N, C, h, w) float32 in [0, 255], on the same device."""

    @property
    def name(self) -> str:
        """The rule and the size, such as "clean-224"."""

    def __call__(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Clean:
    """Bicubic, antialiased where it shrinks, in float: clean-fid's rule.

    clean-fid resizes each channel as a float image of Pillow's and clips; torch's antialiased interpolation computes
    the same, within 1e-4, for a whole batch on any device.
    """

    size: Resolution

    @property
    def name(self) -> str:
        return f"clean-{_spelled(self.size)}"

    def __call__(self, images: Tensor) -> Tensor:
        if images.shape[2:] == as_size(self.size):
            return images.float()
        # In float32 torch's own weights of the pixels would be off by 1e-3; Pillow's are in float64 as well.
        resized = F.interpolate(double(images), as_size(self.size), mode="bicubic", antialias=True)
        return resized.clamp(0, 255).float().to(images.device)


@dataclass(frozen=True)
class Pillow:
    """Bicubic, antialiased where it shrinks, rounded to bytes: torchvision's Resize on images of Pillow's.

    The published distances in the spaces of DINOv2 and CLIP were computed with it. Runs on the CPU, picture by picture.
    """

    size: Resolution

    @property
    def name(self) -> str:
        return f"pillow-{_spelled(self.size)}"

    def __call__(self, images: Tensor) -> Tensor:
        height, width = as_size(self.size)
        if images.shape[2:] == (height, width):
            return images.float()
        channels = images.flatten(0, 1).cpu().numpy()  # (N C, H, W): Pillow resizes each channel by itself as well
        resized = [
            np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC)) for one in channels
        ]
        return torch.from_numpy(np.stack(resized)).to(images.device).float().unflatten(0, images.shape[:2])


@dataclass(frozen=True)
class TensorFlow1:
    """Bilinear as TensorFlow 1 had it: corners unaligned, no antialiasing, in float: that of published FID tables.

    Shrinking aliases, and everything is shifted by up to half a pixel; the FID is defined with both. The arithmetic is
    that of torch-fidelity's `interpolate_bilinear_2d_like_tensorflow1x`, bit for bit.
    """

    size: Count

    @property
    def name(self) -> str:
        return f"tf1-{self.size}"

    def __call__(self, images: Tensor) -> Tensor:
        pixels = images.float()
        top, bottom, down = self._between(pixels.shape[2], pixels.device)
        left, right, across = self._between(pixels.shape[3], pixels.device)
        rows = [pixels[:, :, row] for row in (top, bottom)]
        upper, lower = (row[..., left] + (row[..., right] - row[..., left]) * across for row in rows)
        return upper + (lower - upper) * down[:, None]

    def _between(self, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The two source pixels of each target pixel, and how far it lies from the first to the second."""
        place = torch.arange(self.size, dtype=torch.float32, device=device) * torch.tensor(side / self.size)
        first = place.long()
        return first, (first + 1).clamp_max(side - 1), place - first.float()


def _spelled(size: Resolution) -> str:
    height, width = as_size(size)
    return str(height) if height == width else f"{height}x{width}"
