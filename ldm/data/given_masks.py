"""Masks that are given instead of drawn: the item's own, or the files of a folder; kinds for `ldm.data.masks.Masks`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ldm.data import fingerprint
from ldm.data.decoding import read_image
from ldm.data.mask_kinds import HOLE, Bounds, MaskKind
from ldm.errors import DataError
from ldm.sizes import Size, spell

_MIDDLE = 128
"""Gray from which a pixel is hole."""


@dataclass(frozen=True)
class OwnMask(MaskKind):
    """The mask that the item itself brings, cropped and mirrored with its picture.

    Bounds hold for it only in this: a mask that is all hole is refused unless `most` is 1.

    Args:
        key: the column that holds it, (H,W) or (1,H,W) uint8; from 128 a pixel is hole.
    """

    key: str = "mask"

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.key,)

    def draw(self, row: Mapping[str, Tensor], size: Size, random: np.random.Generator) -> np.ndarray:
        given = row[self.key]
        if given.shape not in ((*size,), (1, *size)):
            raise DataError(
                f"'{self.key}' of an item: expected a mask of {spell(size)} pixels as its picture, found "
                f"{tuple(given.shape)}: have data.params.aligned keep the mask of the same crop"
            )
        return _black_and_white(given.reshape(size).numpy())

    def draw_within(
        self, row: Mapping[str, Tensor], size: Size, random: np.random.Generator, bounds: Bounds
    ) -> np.ndarray:
        mask = self.draw(row, size, random)
        hole = np.count_nonzero(mask)
        if not hole:
            raise DataError(
                f"'{self.key}' of an item: the mask is all black, at least where its picture was cropped, so that "
                "there is nothing to paint: paint the hole white, or leave the item out"
            )
        if hole == mask.size and bounds.most < 1:
            raise DataError(
                f"'{self.key}' of an item: the mask is all white, so that nothing of its picture would be known: "
                "paint black what stays, or allow it by `most: 1`"
            )
        return mask

    def check(self, bounds: Bounds) -> None:
        """There is nothing to look at before there are items."""


class MaskFolder(MaskKind):
    """One of the masks in a folder of PNG files, such as those of Liu et al. 2018; each is as likely as any other.

    A mask of another size than the picture is resized by nearest neighbor, whatever its proportions. A file is decoded
    for each mask, which takes about 1 ms at 256 pixels.

    Args:
        root: the folder; files in folders within count, too. From gray 128 a pixel is hole.

    Raises:
        DataError: there is no PNG file; or, when one is read, it is damaged or all black.
    """

    def __init__(self, root: str) -> None:
        self.root = Path(root)
        self.files = sorted(
            str(file.relative_to(root)) for file in self.root.rglob("*") if file.suffix.lower() == ".png"
        )
        if not self.files:
            found = "no file of that ending" if self.root.is_dir() else "no such folder"
            raise DataError(f"{root}: expected a folder of masks as .png, found {found}: name another `root`")

    @cached_property
    def _contents(self) -> str:
        return fingerprint.contents(self.root, self.files, fingerprint.stats(self.root, self.files))

    def describe(self) -> dict[str, Any]:
        """The files' names and contents, wherever the folder lies."""
        return {"target": f"{__name__}.{type(self).__name__}", "files": len(self.files), "contents": self._contents}

    def draw(self, row: Mapping[str, Tensor], size: Size, random: np.random.Generator) -> np.ndarray:
        file = self.root / self.files[random.integers(len(self.files))]
        mask = _black_and_white(np.asarray(read_image(file).convert("L")))
        if not mask.any():
            raise DataError(f"{file}: the mask is all black, so that there is nothing to paint: paint the hole white")
        if mask.shape != size:
            mask = np.array(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))
        return mask


def _black_and_white(gray: np.ndarray) -> np.ndarray:
    return np.where(gray >= _MIDDLE, np.uint8(HOLE), np.uint8(0))
