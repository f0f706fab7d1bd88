"""How an image file becomes pixels: upright, 8 bits, gray, RGB or RGBA, within size limits."""

import errno
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, PngImagePlugin, TiffImagePlugin

from ldm.data import fingerprint
from ldm.data import value_range as ranges
from ldm.errors import DataError
from ldm.runtime.progress import shown

MAX_PIXELS = 50_000_000
PICTURE = "The picture was"
"""The start of the note that is attached to an error about one image."""

_SPREAD = {"L;2": 85, "L;4": 17}
"""What Pillow multiplies gray values of 2 and 4 bits by."""


def read_image(
    path: str | Path,
    max_pixels: int = MAX_PIXELS,
    value_range: tuple[float, float] | None = None,
    keep_alpha: bool = False,
    file: BinaryIO | None = None,
) -> Image.Image:
    """Decode an image file: upright (EXIF), first frame, 8 bits; mode "L" or "RGB", alpha over white.

    Args:
        path: of the file.
        max_pixels: the largest number of pixels allowed.
        value_range: (black, white) of gray images with more than 8 bits; None: 0 and 65535 for 16 bits.
        keep_alpha: mode "RGBA" if the file has transparency.
        file: its content, where it is a part of something else; `path` is then only its name, for messages.

    Raises:
        DataError: the file is not an image, is damaged, or has more than `max_pixels`, which is read from its header
            before decoding; or it is a color image with 16 bits, which is read as 8 bits, and a range is given.
    """
    with _readable(path), _opened(path if file is None else file) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise DataError(f"{path}: {width} x {height} pixels, more than the limit of {max_pixels} (max_pixels)")
        if value_range is not None and ranges.is_wide_color(image):
            raise DataError(f"{path}: value_range is for gray images, this is a color image; convert it to 8 bits")
        return _flatten(ImageOps.exif_transpose(image), value_range, keep_alpha)


def read_indices(path: str | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The numbers in a PNG file, (H,W) int64: indices into its palette, or gray values of 1 to 16 bits as they stand.

    Raises:
        DataError: the file is not an image, is damaged, is of colors, or has more than `max_pixels`.
    """
    with _readable(path), _opened(path) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise DataError(f"{path}: {width} x {height} pixels, more than the limit of {max_pixels}")
        if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
            raise DataError(
                f"{path}: expected a PNG of numbers, with a palette or gray, found mode {image.mode!r}: save the index "
                "of each pixel's class instead of a color"
            )
        stored = image.tile[0].args
        return np.asarray(image).astype(np.int64) // _SPREAD.get(stored if isinstance(stored, str) else "", 1)


def image_size(path: str | Path, file: BinaryIO | None = None) -> tuple[int, int]:
    """(height, width) of an image file as `read_image` decodes it, upright, of its header alone.

    Safe in several threads. Pillow may warn of a large one.

    Args:
        path, file: as for `read_image`.

    Raises:
        DataError: it is not an image, or its header is damaged.
    """
    with _readable(path), Image.open(path if file is None else file) as image:
        width, height = image.size
        return (width, height) if _is_turned(image) else (height, width)


@contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """Around reading an image: DataError, naming it, for whatever decoders raise."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, ValueError, ...
        exhausted = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
        if exhausted or isinstance(error, MemoryError):
            error.add_note(f"{PICTURE} {path}.")
            raise  # a fault of the machine: replacing the image would make the run depend on it
        raise DataError(f"{path}: cannot be read as an image ({type(error).__name__}: {error})") from error


def _opened(file: str | Path | BinaryIO) -> ImageFile.ImageFile:
    with warnings.catch_warnings():
        # Pillow warns above its own limit, which ours replaces; its refusal above twice that limit stays.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file)


def _is_turned(image: ImageFile.ImageFile) -> bool:
    """Whether height and width change places when the image, which is not decoded yet, is made upright."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return False  # Pillow has done it
    if isinstance(image, PngImagePlugin.PngImageFile) and not _says_more_at_its_end(image):
        exif = Image.Image.getexif(image)  # a PNG's own would decode it first, to read on to its end
    else:
        exif = image.getexif()
    return exif.get(ExifTags.Base.Orientation, 1) >= 5


def _says_more_at_its_end(image: PngImagePlugin.PngImageFile) -> bool:
    """Whether a PNG has chunks after its pixels that may hold an orientation."""
    file = image.fp
    assert file is not None
    here = file.tell()
    try:
        file.seek(8)
        seen_pixels = False
        while len(head := file.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if seen_pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            seen_pixels = seen_pixels or kind == b"IDAT"
            file.seek(length + 4, 1)
        return False
    finally:
        file.seek(here)


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


def file_sizes(root: Path, names: Sequence[str], states: np.ndarray, max_pixels: int, silent: bool) -> np.ndarray:
    """Height and width of image files, of their headers alone, (N,2) int64; 0, 0 for one that cannot be read.

    Those of a large folder are kept beside the samples of its fingerprint.

    Args:
        root, names, states: as for `fingerprint.samples`.
        max_pixels: a larger one cannot be read.
        silent: show no progress.
    """

    def read(row: int) -> int:
        try:
            height, width = image_size(os.path.join(root, names[row]))
        except DataError:
            return 0
        return height << 32 | width

    with warnings.catch_warnings(), shown(f"{root}: sizes of its images", silent) as show:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        packed = fingerprint.remembered(root, names, states, ".sizes", read, show)
    sizes = np.stack([packed >> 32, packed & 0xFFFFFFFF], axis=1).astype(np.int64)
    sizes[sizes.prod(1) > max_pixels] = 0
    return sizes
