"""Masks: where a picture may be changed, as a black and white picture of the same name in another folder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldm.data.decoding import read_image
from ldm.data.sources.aligned import FilesBeside, demand_size
from ldm.errors import DataError
from ldm.sizes import Size

_WHITE = 128  # and above


class MaskFiles:
    """Masks in a folder: `a/1.png` for the picture `a/1.jpg`. White, from 128 on, may be changed; black stays.

    A mask without a hole is refused: nothing of its picture may be changed, or black and white are exchanged.

    Args:
        root: the folder.
        invert: black may be changed, and white stays.
    """

    key = "mask"

    def __init__(self, root: str | Path, invert: bool = False) -> None:
        self.root = Path(root)
        self.invert = invert

    def beside(self, root: Path, pictures: Sequence[str]) -> "_Masks":
        return _Masks(FilesBeside(self.root, "mask", root, pictures), self.invert)


class _Masks:
    def __init__(self, files: FilesBeside, invert: bool) -> None:
        self.classes: list[str] | None = None
        self.note = ""
        self._files = files
        self._invert = invert

    def of(self, index: int, size: Size) -> np.ndarray:
        path = self._files.path(index)
        white = np.asarray(read_image(path).convert("L")) >= _WHITE
        demand_size(path, "mask", (white.shape[0], white.shape[1]), size)
        hole = white != self._invert
        if not hole.any():
            color, other = ("white", "false") if self._invert else ("black", "true")
            raise DataError(
                f"{path}: expected a mask with a hole, found one that is {color} all over, so that nothing may be "
                f"changed: paint what may be, or set `invert: {other}`"
            )
        return hole.astype(np.uint8) * np.uint8(255)

    def fingerprint(self) -> str:
        return self._files.fingerprint(["mask", self._invert])
