"""What makes an aligned column: of an item a row of a cache, of such rows those of mirrored pictures and of a model.

The columns that there are lie in aligned.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ldm.data.dataset import Picture
from ldm.data.transforms import EvalTransform, transformed
from ldm.diffusion.conditioners.features import Part
from ldm.images import to_uint8
from ldm.latents.parts import Found
from ldm.latents.ragged import to_raw
from ldm.ranges import Count
from ldm.sizes import Size

VALUE = "value"
"""The only part of a row of an aligned column."""


@dataclass(frozen=True)
class Crop:
    """How the pictures of a part are cropped.

    Args:
        transform: of them.
        channels: of them.
    """

    transform: EvalTransform
    channels: Count

    @property
    def size(self) -> Size:
        return self.transform.size

    def describe(self) -> dict[str, Any]:
        return {**self.transform.describe(), "channels": self.channels}

    def picture(self, image: Picture, channels: Count, path: str) -> Tensor:
        """A picture -> (channels, H, W) uint8."""
        return to_uint8(transformed(image, self.transform, channels, path))


@runtime_checkable
class Column(Protocol):
    """An aligned column of a batch."""

    @property
    def reads(self) -> str:
        """The key of an item."""
        ...

    def part(self, crop: Crop) -> Part:
        """Of a row in the cache."""
        ...

    def describe(self) -> dict[str, Any]:
        """All that determines a row beside the item and the crop, in plain values."""
        ...

    def row(self, item: Mapping[str, Any], crop: Crop, path: str) -> tuple[Tensor, bool]:
        """The row of an item, as its part says, and whether some of it was too much to be kept.

        Raises:
            DataError: a value that does not fit its picture.
        """
        ...

    def mirrored(self, rows: Tensor) -> Tensor:
        """Rows (N, ...), padded where the part is ragged, of the mirrored pictures."""
        ...

    def placed(self, rows: Tensor) -> Tensor:
        """Rows as a model reads them, on their device."""
        ...


@dataclass(frozen=True)
class AlignedRows:
    """What a cache keeps of a column: a row an item (dataset_parts.py::ItemRows).

    Args:
        column: made of each item.
        crop: of the pictures.
    """

    column: Column
    crop: Crop
    several: int = 1

    @property
    def reads(self) -> str:
        return self.column.reads

    @property
    def aligned(self) -> Sequence[str]:
        return lying_on_pictures([self.column])

    @property
    def parts(self) -> dict[str, Part]:
        return {VALUE: self.column.part(self.crop)}

    def describe(self) -> dict[str, Any]:
        return {**self.column.describe(), "pixels": self.crop.describe()}

    def read(self, number: int, item: Mapping[str, Any], path: str) -> Found:
        row, too_much = self.column.row(item, self.crop, path)
        return Found([{VALUE: to_raw(row)}], int(too_much))

    def found(self, read: Found) -> Found:
        return read


def lying_on_pictures(columns: Iterable[Column]) -> list[str]:
    """The keys that columns read beside the picture itself."""
    return [column.reads for column in columns if column.reads != "image"]


def pixels(rows: Tensor) -> Tensor:
    """uint8 -> float32 in [-1,1], with the bits of `EvalTransform`."""
    return (rows.float() * (1 / 255) - 0.5) / 0.5


def hole(rows: Tensor) -> Tensor:
    """A mask of integers -> float32, 1 where it is not 0."""
    return (rows > 0).float()
