"""Kinds of masks for inpainting, to be mixed by `ldm.data.masks.Masks`: strokes, boxes, halves, squares, outpainting.

Lengths are fractions of the picture's shorter side, so that a kind looks alike at 16 and at 1024 pixels. LaMa's and
DeepFill's are given in pixels of pictures of 256; they are divided by that here.

Where a stroke passes is computed in double precision with sines and cosines, whose last bit may differ between
processors; it is then rounded to whole pixels, so that masks are equal but for about one in 10^11 of them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ldm.data.chances import integer, plain, require_spans, uniform
from ldm.errors import ConfigError
from ldm.ranges import Count, Fraction, FractionAboveZero, NotNegative
from ldm.sizes import Size, spell

HOLE = 255
"""Where the picture may be changed."""

TRIES = 1000
"""Masks that are drawn until one lies within the bounds; at least one in 16 does, see `MaskKind.check`."""

_TRIAL_SIZE = (64, 64)
_TRIALS = 64


@dataclass(frozen=True)
class Bounds:
    """The share of the picture that is hole: from `least` to `most`, and never nothing."""

    least: Fraction
    most: Fraction

    def admit(self, mask: np.ndarray) -> bool:
        """Whether the share of the hole of a mask (H,W) lies within."""
        hole = np.count_nonzero(mask)
        return bool(hole > 0 and self.least * mask.size <= hole <= self.most * mask.size)

    def __str__(self) -> str:
        return f"{self.least} to {self.most}"


class MaskKind(ABC):
    """Draws masks of one kind."""

    reads: ClassVar[tuple[str, ...]] = ()
    """Columns that it needs besides the picture's size."""

    def describe(self) -> dict[str, Any]:
        """All that decides what is drawn, in plain values."""
        described: dict[str, Any] = plain(self)
        return described

    @abstractmethod
    def draw(self, row: Mapping[str, Tensor], size: Size, random: np.random.Generator) -> np.ndarray:
        """(H,W) uint8: `HOLE`, or 0 where the picture stays."""

    def draw_within(
        self, row: Mapping[str, Tensor], size: Size, random: np.random.Generator, bounds: Bounds
    ) -> np.ndarray:
        """As `draw`, with a share of the hole within the bounds: drawn again, from the same generator, until it is.

        Raises:
            ConfigError: none of `TRIES` is, as for pictures of few pixels.
        """
        for _ in range(TRIES):
            if bounds.admit(mask := self.draw(row, size, random)):
                return mask
        raise ConfigError(
            f"{type(self).__name__}: of {TRIES} masks for a picture of {spell(size)} pixels none had a hole of "
            f"{bounds} of it (least, most): widen the bounds, or leave this kind out"
        )

    def check(self, bounds: Bounds) -> None:
        """ConfigError if such masks are hardly ever within the bounds, so that drawing again would take long."""
        random = np.random.Generator(np.random.Philox(key=0))
        found = sum(bounds.admit(self.draw({}, _TRIAL_SIZE, random)) for _ in range(_TRIALS))
        if 16 * found < _TRIALS:
            raise ConfigError(
                f"{type(self).__name__}: {found} of {_TRIALS} masks had a hole of {bounds} of the picture (least, "
                f"most), expected {_TRIALS // 16} or more: widen the bounds, or change what this kind draws"
            )


@dataclass(frozen=True)
class Strokes(MaskKind):
    """Free-form strokes of a brush (Yu et al. 2019, "Free-Form Image Inpainting with Gated Convolution").

    A stroke is a zigzag: it begins anywhere and goes along segments whose directions lie alternately to the left and
    to the right of its own. At 16 pixels narrow strokes look like noise.

    The ranges are those of LaMa's wide masks (Suvorov et al. 2022, "Resolution-robust Large Mask Inpainting with
    Fourier Convolutions"; its `random_thick_256`).

    Args:
        strokes: how many, from low to high, inclusive.
        segments: of a stroke, inclusive.
        width: of the brush, fraction of the shorter side.
        length: of a segment, fraction of the shorter side.
        turn: up to which angle a segment departs from the stroke's direction, radians.
    """

    strokes: tuple[Count, Count] = (1, 5)
    segments: tuple[Count, Count] = (1, 5)
    width: tuple[NotNegative, NotNegative] = (5 / 256, 105 / 256)
    length: tuple[NotNegative, NotNegative] = (10 / 256, 210 / 256)
    turn: NotNegative = 4.0

    def __post_init__(self) -> None:
        require_spans(self, strokes=self.strokes, segments=self.segments, width=self.width, length=self.length)

    def draw(self, row: Mapping[str, Tensor], size: Size, random: np.random.Generator) -> np.ndarray:
        height, width = size
        side = min(size)
        image = Image.new("L", (width, height))
        brush = ImageDraw.Draw(image)
        number, longest = integer(self.strokes, random), self.segments[1]
        segments = random.integers(self.segments[0], longest, number, endpoint=True).tolist()
        widths = (side * random.uniform(*self.width, number)).round().astype(int).tolist()
        direction = random.uniform(0, 2 * math.pi, (number, 1))
        swing = random.uniform(0, self.turn, (number, longest)) * (1 - 2 * (np.arange(longest) % 2))
        length = side * random.uniform(*self.length, (number, longest))
        steps = np.stack([np.cos(direction + swing) * length, np.sin(direction + swing) * length], 2)
        starts = random.random((number, 1, 2)) * (width, height)
        points = np.concatenate([starts, starts + steps.cumsum(1)], 1).round().astype(int)
        for stroke, count, thick in zip(points, segments, widths, strict=True):
            _stroke(brush, stroke[: count + 1].clip(-2 * max(size), 3 * max(size)).tolist(), max(thick, 1))
        return np.array(image)


def _stroke(brush: ImageDraw.ImageDraw, points: list[list[int]], width: int) -> None:
    """Lines of that width through the points, round at their ends."""
    brush.line([tuple(point) for point in points], fill=HOLE, width=width)
    radius = width // 2
    if radius:
        for x, y in points:
            brush.ellipse((x - radius, y - radius, x + radius, y + radius), fill=HOLE)


@dataclass(frozen=True)
class NarrowStrokes(Strokes):
    """Many thin strokes: LaMa's narrow masks (Suvorov et al. 2022; its `random_thin_256`)."""

    strokes: tuple[Count, Count] = (4, 50)
    width: tuple[NotNegative, NotNegative] = (5 / 256, 15 / 256)
    length: tuple[NotNegative, NotNegative] = (10 / 256, 50 / 256)


@dataclass(frozen=True)
class Boxes(MaskKind):
    """Several rectangles, which may overlap. The ranges are LaMa's (`random_thick_256`).

    Args:
        boxes: how many, from low to high, inclusive.
        side: height and width of each, drawn apart, fraction of the shorter side.
        margin: that stays at the edges of the picture, fraction of the shorter side.
    """

    boxes: tuple[Count, Count] = (1, 3)
    side: tuple[FractionAboveZero, FractionAboveZero] = (30 / 256, 150 / 256)
    margin: Fraction = 10 / 256

    def __post_init__(self) -> None:
        require_spans(self, boxes=self.boxes, side=self.side)
        if self.margin >= 0.5:
            raise ConfigError(f"Boxes.margin: expected below 0.5, found {self.margin}: nothing is left for a box")

    def draw(self, row: Mapping[str, Tensor], size: Size, random: np.random.Generator) -> np.ndarray:
        mask = np.zeros(size, dtype=np.uint8)
        margin = int(self.margin * min(size))
        for _ in range(integer(self.boxes, random)):
            sides = [max(1, round(uniform(self.side, random) * min(size))) for _ in size]
            mask[_place(size, sides, margin, random)] = HOLE
        return mask


def _place(size: Size, sides: list[int], margin: int, random: np.random.Generator) -> tuple[slice, slice]:
    """Rows and columns of a box of these sides, cut where it is too large, anywhere within the margin."""
    spans = []
    for whole, side in zip(size, sides, strict=True):
        side = min(side, whole - 2 * margin)
        start = margin + int(random.integers(whole - 2 * margin - side, endpoint=True))
        spans.append(slice(start, start + side))
    return spans[0], spans[1]


def _centered(size: Size, sides: list[int]) -> tuple[slice, slice]:
    """Rows and columns of a box of these sides in the center."""
    top, left = ((whole - side) // 2 for whole, side in zip(size, sides, strict=True))
    return slice(top, top + sides[0]), slice(left, left + sides[1])


@dataclass(frozen=True)
class Halves(MaskKind):
    """One half of the picture: left, right, top or bottom; of an odd number of pixels the larger part may be it."""

    def draw(self, row: Mapping[str, Tensor], size: Size, random: np.random.Generator) -> np.ndarray:
        mask = np.zeros(size, dtype=np.uint8)
        turned = mask if random.integers(2) else mask.T
        half = len(turned) // 2
        turned[slice(half, None) if random.integers(2) else slice(half)] = HOLE
        return mask


@dataclass(frozen=True)
class Square(MaskKind):
    """One square.

    Args:
        side: fraction of the shorter side.
        centered: in the center of the picture; otherwise anywhere.
    """

    side: tuple[FractionAboveZero, FractionAboveZero] = (0.5, 0.5)
    centered: bool = True

    def __post_init__(self) -> None:
        require_spans(self, side=self.side)

    def draw(self, row: Mapping[str, Tensor], size: Size, random: np.random.Generator) -> np.ndarray:
        mask = np.zeros(size, dtype=np.uint8)
        sides = [max(1, round(uniform(self.side, random) * min(size)))] * 2
        mask[_centered(size, sides) if self.centered else _place(size, sides, 0, random)] = HOLE
        return mask


@dataclass(frozen=True)
class Outside(MaskKind):
    """Everything outside of a box: outpainting.

    Args:
        side: height and width of the box that stays, drawn apart, each a fraction of the picture's.
        centered: the box is in the center; otherwise anywhere.
    """

    side: tuple[FractionAboveZero, FractionAboveZero] = (0.4, 0.9)
    centered: bool = False

    def __post_init__(self) -> None:
        require_spans(self, side=self.side)

    def draw(self, row: Mapping[str, Tensor], size: Size, random: np.random.Generator) -> np.ndarray:
        mask = np.full(size, HOLE, dtype=np.uint8)
        sides = [max(1, round(uniform(self.side, random) * whole)) for whole in size]
        mask[_centered(size, sides) if self.centered else _place(size, sides, 0, random)] = 0
        return mask


@dataclass(frozen=True)
class Whole(MaskKind):
    """Everything is hole, whatever the bounds say: nothing of the picture is known.

    A share of such masks keeps a model able to make whole pictures; Stable Diffusion's inpainting model saw a quarter.
    """

    def draw(self, row: Mapping[str, Tensor], size: Size, random: np.random.Generator) -> np.ndarray:
        return np.full(size, HOLE, dtype=np.uint8)

    def draw_within(
        self, row: Mapping[str, Tensor], size: Size, random: np.random.Generator, bounds: Bounds
    ) -> np.ndarray:
        return self.draw(row, size, random)

    def check(self, bounds: Bounds) -> None:
        """It is asked for by its name."""
