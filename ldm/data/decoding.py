"""How an image file becomes pixels: upright, 8 bits, gray, RGB or RGBA, within size limits."""

import errno
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ldm.data import value_range as ranges
from ldm.errors import DataError

MAX_PIXELS = 50_000_000
PICTURE = "The picture was"
"""The start of the note that is attached to an error about one image."""


def read_image(
    path: str | Path,
    max_pixels: int = MAX_PIXELS,
    value_range: tuple[float, float] | None = None,
    keep_alpha: bool = False,
) -> Image.Image:
    """Decode an image file: upright (EXIF), first frame, 8 bits; mode "L" or "RGB", alpha over white.

    Args:
        path: of the file.
        max_pixels: the largest number of pixels allowed.
        value_range: (black, white) of gray images with more than 8 bits; None: 0 and 65535 for 16 bits.
        keep_alpha: mode "RGBA" if the file has transparency.

    Raises:
        DataError: the file is not an image, is damaged, or has more than `max_pixels`, which is read from its header
            before decoding; or it is a color image with 16 bits, which is read as 8 bits, and a range is given.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns above its own limit, which ours replaces; its refusal above twice that limit stays.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            width, height = image.size
            if width * height > max_pixels:
                raise DataError(f"{path}: {width} x {height} pixels, more than the limit of {max_pixels} (max_pixels)")
            if value_range is not None and ranges.is_wide_color(image):
                raise DataError(f"{path}: value_range is for gray images, this is a color image; convert it to 8 bits")
            return _flatten(ImageOps.exif_transpose(image), value_range, keep_alpha)
    except DataError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, ValueError, ...
        exhausted = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
        if exhausted or isinstance(error, MemoryError):
            error.add_note(f"{PICTURE} {path}.")
            raise  # a fault of the machine: replacing the image would make the run depend on it
        raise DataError(f"{path}: cannot be read as an image ({type(error).__name__}: {error})") from error


def read_array(path: str | Path) -> np.ndarray:
    """A picture (H,W,C) of uint8 from a .npy file; DataError if it holds anything else."""
    try:
        pixels = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a .npy file ({error})") from error
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 3 or pixels.dtype != np.uint8:
        raise DataError(f"{path}: expected one picture (H,W,C) of uint8, found {getattr(pixels, 'shape', 'several')}")
    return pixels


def _flatten(image: Image.Image, value_range: tuple[float, float] | None, keep_alpha: bool) -> Image.Image:
    """Any mode -> "L" or "RGB", or "RGBA" where that is asked for."""
    if image.mode.startswith(("I", "F")):
        return ranges.to_8_bits(image, value_range)
    if image.has_transparency_data:
        return image.convert("RGBA") if keep_alpha else over_white(image)
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def over_white(image: Image.Image) -> Image.Image:
    """An image with transparency as "RGB" over white; others as they are."""
    if not image.has_transparency_data:
        return image
    colors = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", colors.size, "white"), colors).convert("RGB")
