"""Gray images of more than 8 bits: how their values are converted to 8 bits, and how a wrong range is noticed.

A 16-bit file does not say how many of its bits are used. Scanners and cameras often use 10, 12 or 14 of them; read
as 16, such images are nearly black.
"""

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFile

from ldm.errors import ConfigError

FULL = (0, 65535)
_WIDE_EXTENSIONS = (".png", ".tif", ".tiff", ".pgm", ".jp2", ".j2k")
_OPENED, _LOOKED_AT = 64, 16
_DARK = 1 << 14  # a quarter of white


def checked(value_range: Sequence[float] | None) -> tuple[float, float] | None:
    """Raises ConfigError unless it is two increasing numbers, or None."""
    if value_range is None:
        return None
    values = [float(value) for value in value_range]
    if len(values) != 2 or not np.isfinite(values).all() or values[0] >= values[1]:
        raise ConfigError(
            f"value_range: expected [black, white], two increasing numbers such as [0, 4095], found {value_range}"
        )
    return values[0], values[1]


def to_8_bits(image: Image.Image, value_range: tuple[float, float] | None) -> Image.Image:
    """An image of mode "I;16", "I" or "F" -> "L": [black, white] to [0, 255], rounded; values outside are clipped.

    Raises:
        ValueError: no range is given and the mode has no default, or a value is NaN.
    """
    if value_range is None and not image.mode.startswith("I;16"):
        raise ValueError(
            f"pixels of mode {image.mode!r} have no known range; set `value_range` of the data set, "
            "or convert the file to 8 or 16 bits"
        )
    black, white = value_range or FULL
    values = np.asarray(image, dtype=np.float64)
    if np.isnan(values).any():
        raise ValueError("some pixels are not a number (NaN)")
    return Image.fromarray(np.rint((values.clip(black, white) - black) * (255 / (white - black))).astype(np.uint8))


def is_wide_color(image: Image.Image) -> bool:
    """Whether a file, opened but not yet decoded, is a color image with more than 8 bits; Pillow keeps the upper 8."""
    if image.mode.startswith(("I", "F")) or not isinstance(image, ImageFile.ImageFile):
        return False
    return any(";16" in str(tile[3]) for tile in image.tile)


def warning(paths: Sequence[str], max_pixels: int) -> str:
    """A warning if the 16-bit images among `paths` use only a small part of their range; "" otherwise.

    Looks at up to 16 of them, spaced evenly, and warns only if all are darker than a quarter of white: one night scene
    among daylight scenes is not a fault. A few pixels of an image, such as a sensor's hot pixels, do not count.
    """
    wide = [path for path in paths if os.path.splitext(path)[1].casefold() in _WIDE_EXTENSIONS]
    found: list[tuple[int, int]] = []
    for path in wide[:: max(1, len(wide) // _OPENED)][:_OPENED]:
        extrema = _extent(path, max_pixels) if len(found) < _LOOKED_AT else None
        found += [extrema] if extrema else []
    low, high = min((low for low, _ in found), default=0), max((high for _, high in found), default=FULL[1])
    if high >= _DARK:
        return ""
    white = (1 << max(8, high.bit_length())) - 1
    return (
        f"the 16-bit images are nearly black: the {len(found)} examined have values from {low} to {high}, where "
        f"white is {FULL[1]}. If white is {white}, set `value_range: [0, {white}]` of the data set (gray images), or "
        f"convert them to 8 bits; if they really are this dark, set `value_range: [0, {FULL[1]}]`"
    )


def _extent(path: str, max_pixels: int) -> tuple[int, int] | None:
    """The range of values of a 16-bit image, except for a few hot pixels; None for other or unreadable files."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > max_pixels:
                return None
            if is_wide_color(image):
                low, high = _bulk(np.asarray(image.convert("RGB")).max(2))
                return 256 * low, 256 * high + 255
            return _bulk(np.asarray(image)) if image.mode.startswith("I;16") else None
    except Exception:  # whatever decoders raise; the code that reads the image reports what is wrong with it
        return None


def _bulk(values: np.ndarray) -> tuple[int, int]:
    """The smallest of (H,W) values, and the largest without the brightest thousandth (at least four pixels).

    In an image of fewer than 100 pixels none is left out.
    """
    flat = values.ravel()
    left_out = max(flat.size // 1000, 4 if flat.size >= 100 else 0)
    return int(flat.min()), int(np.partition(flat, -1 - left_out)[-1 - left_out])
