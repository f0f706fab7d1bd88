"""Data sets of images: the contract, the image folder, and how an image file is decoded.

A data set decodes and labels; it neither resizes nor augments (pixels.py does). Its items are dicts of `image`
(PIL, grey or RGB), `class_label` (int, if it has classes) and `caption` (str, if it has captions).
"""

import errno
import hashlib
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypedDict

import numpy as np
from PIL import Image, ImageOps

from ldm import distributed
from ldm.errors import DataError
from ldm.randomness import keys

log = logging.getLogger(__name__)

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
MAX_PIXELS = 50_000_000


class _Pixels(TypedDict):
    image: Image.Image


class Item(_Pixels, total=False):
    """One item of a data set."""

    class_label: int
    caption: str


class ImageDataset(Protocol):
    """What a data module asks of a data set of images."""

    @property
    def num_classes(self) -> int | None:
        """Labels are 0 .. num_classes - 1; None: items have no `class_label`."""

    @property
    def class_names(self) -> list[str] | None:
        """A name for each label, if there are any."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item:
        """Decode one item. Raises DataError naming the file if it cannot be read."""

    def path(self, index: int) -> str:
        """Where the item comes from, for messages."""

    def fingerprint(self) -> str:
        """A hash that changes with the items, their order, labels or captions."""

    def prepare(self) -> None:
        """Make the files ready (download, draw); called once a machine before items are read; cheap to repeat."""


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file: upright (EXIF), first frame, 8 bits, alpha over white; mode "L" or "RGB".

    Raises:
        DataError: the file is no image, is damaged, or has more than `max_pixels`, which its header says before
            anything is decoded.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns above a limit of its own, which ours stands in for; its refusal above twice that stays.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            width, height = image.size
            if width * height > max_pixels:
                raise DataError(f"{path}: {width} x {height} pixels, more than the limit of {max_pixels} (max_pixels)")
            return _flatten(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, ValueError, ...
        exhausted = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
        if exhausted or isinstance(error, MemoryError):
            raise  # the machine's fault: replacing the image would make the run depend on it
        raise DataError(f"{path}: cannot be read as an image ({type(error).__name__}: {error})") from error


def _flatten(image: Image.Image) -> Image.Image:
    """Any mode -> "L" or "RGB"."""
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} have no known range; convert the file to 8 or 16 bits")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


class ImageFolder:
    """Images in a folder. Classes are its subfolders (searched to any depth); without subfolders it is flat.

    Hidden files are left out, extensions may be in capitals, links are followed, and the order is natural (2 < 10).

    Args:
        root: the folder.
        classes: True: subfolders are classes; False: search them all, without classes; None: find out.
        captions: a JSONL file with `{"file_name": path within root, "caption": text}` on each line (`text` is
            accepted for `caption`). None: captions are read from `name.txt` beside `name.jpg`, if there are any.
        max_pixels: larger images count as broken.

    Raises:
        DataError: no folder, no images, images both in the folder and in subfolders, or captions for some only.
    """

    def __init__(
        self,
        root: str | Path,
        classes: bool | None = None,
        captions: str | Path | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"{self.root}: no such folder of images; set `root` of the data set to an existing one")
        self.max_pixels = max_pixels
        listing = sorted(_walk(self.root), key=_natural)
        texts = {name for name in listing if name.casefold().endswith(".txt")}
        self.files = [name for name in listing if os.path.splitext(name)[1].casefold() in EXTENSIONS]
        if not self.files:
            kinds = " ".join(sorted(EXTENSIONS))
            raise DataError(f"{self.root}: 0 images found (looked for {kinds}); set `root` to a folder that has some")
        self.class_names = self._classes(classes)
        self._label_of = {name: label for label, name in enumerate(self.class_names or ())}
        self._captions = _read_captions(Path(captions)) if captions else None
        beside = None if captions else {os.path.splitext(name)[0] for name in texts}
        self._text_files = bool(beside and any(os.path.splitext(name)[0] in beside for name in self.files))
        if self._captions is not None or self._text_files:
            self._require_captions(beside or set())

    def _classes(self, wanted: bool | None) -> list[str] | None:
        """Names of the class folders in natural order, or None for a flat folder."""
        loose = [name for name in self.files if "/" not in name]
        if wanted is None and loose and len(loose) < len(self.files):
            raise DataError(
                f"{self.root}: holds {len(loose)} images itself ({loose[0]}, ...) and others in subfolders. "
                "Move them into class folders, or set `classes: false` to use all images without classes"
            )
        if wanted is False or (wanted is None and loose):
            return None
        if loose:
            raise DataError(
                f"{self.root / loose[0]}: lies in no class folder; move it into one or set `classes: false`"
            )
        return list(dict.fromkeys(name.split("/")[0] for name in self.files))

    def _require_captions(self, beside: set[str]) -> None:
        known = self._captions if self._captions is not None else beside
        lacking = [f for f in self.files if (f if self._captions is not None else os.path.splitext(f)[0]) not in known]
        if lacking:
            raise DataError(
                f"{self.root / lacking[0]}: has no caption, like {len(lacking)} of {len(self.files)} images in all. "
                "Give every image one, or take the captions away"
            )

    @property
    def num_classes(self) -> int | None:
        return None if self.class_names is None else len(self.class_names)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Item:
        item: Item = {"image": read_image(self.path(index), self.max_pixels)}
        if self.class_names is not None:
            item["class_label"] = self._label_of[self.files[index].split("/")[0]]
        if self._captions is not None:
            item["caption"] = self._captions[self.files[index]]
        elif self._text_files:
            item["caption"] = _read_text(self._text_path(index))
        return item

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.files[index])

    def _text_path(self, index: int) -> Path:
        return Path(os.path.splitext(self.path(index))[0] + ".txt")

    def fingerprint(self) -> str:
        """Hash of names, sizes, classes and captions (of caption files: names and sizes)."""
        digest = hashlib.sha256(json.dumps([self.class_names, self._captions], sort_keys=True).encode())
        for index, name in enumerate(self.files):
            sizes = [_size(self.path(index)), _size(self._text_path(index)) if self._text_files else -1]
            digest.update(json.dumps([name, *sizes]).encode())
        return digest.hexdigest()

    def prepare(self) -> None:
        """Nothing to do: the files are there."""


def _walk(root: Path) -> Iterator[str]:
    """Paths of all files that are not hidden, relative to root with "/"; follows links, but never in a circle."""
    for folder, subfolders, files in os.walk(root, followlinks=True):
        here = os.path.realpath(folder)
        # A link to a folder that contains it would be walked for ever.
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".")
            and not f"{here}/".startswith(os.path.realpath(os.path.join(folder, name)) + "/")
        ]
        prefix = Path(folder).relative_to(root).as_posix()
        yield from (name if prefix == "." else f"{prefix}/{name}" for name in files if not name.startswith("."))


def _natural(name: str) -> tuple[list[list[str | int]], str]:
    """Sort key that counts: 2 before 10; folder by folder; capitals decide ties only."""
    folders = [re.split(r"([0-9]+)", part.casefold()) for part in name.split("/")]
    return [[int(p) if i % 2 else p for i, p in enumerate(parts)] for parts in folders], name


def _size(path: str | Path) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return -1  # a dangling link: its item is broken, the listing is not


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a caption in UTF-8 ({error})") from error


def _read_captions(path: Path) -> dict[str, str]:
    """JSONL -> {file name: caption}."""
    captions: dict[str, str] = {}
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        try:
            entry = json.loads(line)
            captions[Path(entry["file_name"]).as_posix()] = str(
                entry["caption"] if "caption" in entry else entry["text"]
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'{path}:{number}: expected {{"file_name": "a.png", "caption": "..."}}, found {line[:80]!r}'
            ) from error
    return captions


class Subset:
    """Some items of a data set, in the given order."""

    def __init__(self, dataset: ImageDataset, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = [int(index) for index in indices]

    @property
    def num_classes(self) -> int | None:
        return self.dataset.num_classes

    @property
    def class_names(self) -> list[str] | None:
        return self.dataset.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Item:
        return self.dataset[self.indices[index]]

    def path(self, index: int) -> str:
        return self.dataset.path(self.indices[index])

    def fingerprint(self) -> str:
        chosen = np.asarray(self.indices, dtype=np.int64).tobytes()
        return hashlib.sha256(self.dataset.fingerprint().encode() + chosen).hexdigest()

    def prepare(self) -> None:
        self.dataset.prepare()


def hold_out(dataset: ImageDataset, number: int) -> tuple[Subset, Subset]:
    """Split into (the rest, `number` scattered items): the same split in every run, whatever its seed.

    Of a data set that has no more than `number` items a tenth is held out instead, with a warning: a configuration
    made for a large data set goes for a small one as well.

    Raises:
        DataError: nothing would be left to train on.
    """
    total = len(dataset)
    if number < 1 or total < 2:
        raise DataError(
            f"data.params.num_validation: cannot hold out {number} of {total} items; write 0 to train on all of them"
        )
    tenth = max(1, total // 10)
    held_out = number if number < total else tenth
    if 2 * number > total and distributed.is_main():
        found = f"data.params.num_validation: {number} of {total} items"
        if number < total:
            log.warning("%s are held out, %d are left to train on; a tenth would be %d", found, total - number, tenth)
        else:
            log.warning("%s would leave none to train on; a tenth, %d, is held out instead", found, tenth)
    ranking = np.argsort(keys(0, "hold out", np.arange(total)), kind="stable")
    rest, scattered = sorted(ranking[held_out:].tolist()), sorted(ranking[:held_out].tolist())
    return Subset(dataset, rest), Subset(dataset, scattered)
