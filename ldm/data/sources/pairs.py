"""Pairs of folders: the second picture of the same name, such as a sketch, a depth map or a small version."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ldm.data.decoding import read_image
from ldm.data.sources.aligned import FilesBeside
from ldm.errors import DataError
from ldm.sizes import Size, same_proportions


class PairFiles:
    """Second pictures in a folder: `a/1.png` for the picture `a/1.jpg`, of the same proportions and any size.

    Args:
        root: the folder.
    """

    key = "pair"

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def beside(self, root: Path, pictures: Sequence[str]) -> "_Pairs":
        return _Pairs(FilesBeside(self.root, "second picture", root, pictures))


class _Pairs:
    def __init__(self, files: FilesBeside) -> None:
        self.classes: list[str] | None = None
        self.note = ""
        self._files = files

    def of(self, index: int, size: Size) -> Image.Image:
        path = self._files.path(index)
        image = read_image(path, keep_alpha=True)
        if not same_proportions((image.height, image.width), size):
            raise DataError(
                f"{path}: {image.width} x {image.height} pixels; expected the proportions of its picture, of "
                f"{size[1]} x {size[0]}: crop or resize it as the picture was"
            )
        return image

    def fingerprint(self) -> str:
        return self._files.fingerprint(["pair"])
