"""Pictures for viewing: to bytes, to files, in grids.

How channels are shown: one as gray, three as color; of any other number each in gray, side by side, a white line
between them. (Of four, too: nothing says that the fourth is opacity.)
"""

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

LEGIBLE = 64
"""Pixels: the side below which a picture on a screen is hard to make out."""

FONT_SIZE = 13
"""Pixels, of the titles of a grid's rows."""

_LINES = 4  # of a title

FILED = (1, 3, 4)
"""The numbers of channels that a PNG holds."""


def visible(image: np.ndarray) -> np.ndarray:
    """(H,W,C) uint8 as it is shown (see the top of the file): (H,W,1) or (H,W,3), or (H,W',1) with W' = C W + C - 1."""
    height, width, channels = image.shape
    if channels in (1, 3):
        return image
    planes = np.pad(image, ((0, 0), (0, 1), (0, 0)), constant_values=255)  # (H, W + 1, C)
    return planes.transpose(0, 2, 1).reshape(height, channels * (width + 1), 1)[:, :-1]


def grid(images: Sequence[np.ndarray], columns: int, gap: int = 2, titles: Sequence[str] = ()) -> np.ndarray:
    """Pictures (H,W,C) uint8 of one size, row by row on white, `gap` pixels apart: one picture (H',W',1 or 3).

    Small ones are enlarged by whole pixels, to about `LEGIBLE`.

    Args:
        titles: a text above each of the first rows, such as their captions, broken into lines of the sheet's width.
    """
    if titles:
        sheets = [grid(images[start : start + columns], columns, gap) for start in range(0, len(images), columns)]
        strips = [_written(title, sheets[0].shape[1], gap) for title in titles]
        blank = np.full((0, sheets[0].shape[1]), 255, dtype=np.uint8)
        parts = zip_longest(strips, sheets, fillvalue=blank)
        return np.concatenate([np.concatenate([_like(strip, sheet), sheet]) for strip, sheet in parts])
    times = max(1, LEGIBLE // max(images[0].shape[:2]))
    images = [visible(image.repeat(times, axis=0).repeat(times, axis=1)) for image in images]
    height, width, channels = images[0].shape
    rows = -(-len(images) // columns)
    shape = (rows * (height + gap) + gap, columns * (width + gap) + gap, channels)
    sheet = np.full(shape, 255, dtype=np.uint8)
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def font(size: int) -> ImageFont.FreeTypeFont:
    """Letters of that many pixels: a font that packages carry and that has most alphabets; Pillow's has Latin alone."""
    found = find_spec("matplotlib")
    assert found is not None, "matplotlib is a requirement"
    assert found.origin is not None, "a package with files"
    return ImageFont.truetype(Path(found.origin).with_name("mpl-data") / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _written(text: str, width: int, gap: int) -> np.ndarray:
    """Black on white, in lines of up to `width` pixels: (H, width) uint8. What is too long ends in an ellipsis."""
    letters = font(FONT_SIZE)
    room = width - 2 * gap
    lines = [""]
    for word in " ".join(text.split()).split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and letters.getlength(longer) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], f"{lines[_LINES - 1]} ..."]
    height = FONT_SIZE * 5 // 4
    strip = Image.new("L", (width, height * len(lines) + gap), 255)
    for place, line in enumerate(lines):
        while letters.getlength(line) > room and len(line) > 1:
            line = f"{line[:-2]}…"
        ImageDraw.Draw(strip).text((gap, gap + place * height), line, fill=0, font=letters)
    return np.asarray(strip)


def _like(strip: np.ndarray, sheet: np.ndarray) -> np.ndarray:
    """(H, W) as (H, W, C) of a sheet."""
    return strip[..., None].repeat(sheet.shape[2], axis=2)


def picture(image: np.ndarray) -> Image.Image:
    """(H,W,C) uint8 -> PIL: gray, RGB, RGBA; any other number of channels as it is shown."""
    image = image if image.shape[2] in FILED else visible(image)
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def to_uint8(images: Tensor) -> Tensor:
    """Pixels in [-1, 1] -> uint8, in the same shape; values beyond are clamped."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_arrays(images: Tensor) -> np.ndarray:
    """(N, C, H, W) in [-1, 1] -> (N, H, W, C) uint8 on the host."""
    array: np.ndarray = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
    return array
