"""Image grids for viewing."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

LEGIBLE = 64
"""Pixels: the side below which a picture on a screen is hard to make out."""


def grid(images: Sequence[np.ndarray], columns: int, gap: int = 2) -> np.ndarray:
    """Pictures (H,W,C) uint8 of one size, row by row on white, `gap` pixels apart: one picture (H',W',C).

    Small ones are enlarged by whole pixels, to about `LEGIBLE`.
    """
    times = max(1, LEGIBLE // max(images[0].shape[:2]))
    images = [image.repeat(times, axis=0).repeat(times, axis=1) for image in images]
    height, width, channels = images[0].shape
    rows = -(-len(images) // columns)
    shape = (rows * (height + gap) + gap, columns * (width + gap) + gap, channels)
    sheet = np.full(shape, 255, dtype=np.uint8)
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def picture(image: np.ndarray) -> Image.Image:
    """(H,W,1 or 3) uint8 -> PIL."""
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def to_uint8(images: Tensor) -> list[np.ndarray]:
    """(N, C, H, W) in [-1, 1], C = 1 or 3 -> N pictures (H, W, C) uint8; values beyond are clamped."""
    levels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return list(levels.permute(0, 2, 3, 1).cpu().numpy())
