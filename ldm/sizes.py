"""Height and width: how configurations write them, and which sizes a network can divide.

A configuration's `resolution` is one number (a square) or `[height, width]`; code has a `Size` from the constructor on.
"""

from collections.abc import Sequence

from ldm.errors import ConfigError
from ldm.ranges import Resolution

Size = tuple[int, int]
"""(height, width)."""


SIZES = ("original_size", "crop_top_left", "target_size")
"""What a batch may say of a picture's size (ldm/latents/numbers.py), two numbers each."""


class SizeError(ConfigError):
    """A picture or latent whose size a network cannot take.

    Attributes:
        factor: each side must be a multiple of it.
    """

    def __init__(self, message: str, factor: int) -> None:
        super().__init__(message)
        self.factor = factor


def as_size(resolution: Resolution) -> Size:
    """(height, width) of a `resolution` as written or stored."""
    if isinstance(resolution, int):
        return resolution, resolution
    height, width = resolution
    return int(height), int(width)


def as_resolution(size: Size) -> int | list[int]:
    """As facts, manifests and configurations store it: a square by one number, so that what was stored stays equal."""
    height, width = size
    return height if height == width else [height, width]


def is_multiple(size: Sequence[int], of: Sequence[int]) -> bool:
    """Whether each side of `size` is a whole multiple, at least once, of the same side of `of`."""
    return all(side > 0 and side % unit == 0 for side, unit in zip(size, of, strict=True))


def same_proportions(one: Size, other: Size) -> bool:
    """Whether one size is the other one times a number, each side rounded up or down."""
    (rows, columns), (height, width) = sorted((one, other))
    if min(rows, columns) < 1:
        return False
    return (rows - 1) * width < (columns + 1) * height and (columns - 1) * height < (rows + 1) * width


def spell(size: Size) -> str:
    """In messages: "64" for a square, else "48 x 80", the height first."""
    height, width = size
    return str(height) if height == width else f"{height} x {width}"


def nearest(size: Size, factor: int) -> str:
    """The nearest multiples of `factor` below and above each side that is none: "28 or 32", "height 48 or 56"."""
    wrong = {name: side for name, side in zip(("height", "width"), size, strict=True) if side % factor}
    found = {name: _multiples(side, factor) for name, side in wrong.items()}
    if size[0] == size[1]:
        return found.get("height", "")
    return " and ".join(f"{name} {sides}" for name, sides in found.items())


def _multiples(side: int, factor: int) -> str:
    lower = side // factor * factor
    return " or ".join(str(multiple) for multiple in (lower, lower + factor) if multiple)


def uncropped(size: Size) -> dict[str, list[float]]:
    """The `SIZES` of a picture of which nothing was cropped, as samples are to look."""
    whole = [float(side) for side in size]
    return dict(zip(SIZES, (whole, [0.0, 0.0], whole), strict=True))
