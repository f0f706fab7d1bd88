"""The image folder: classes are its subfolders, captions lie beside the pictures or in one file.

A data set decodes and labels; it neither resizes nor augments (data/transforms.py does).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ldm.data import value_range as ranges
from ldm.data.decoding import MAX_PIXELS
from ldm.data.sources import captions as caption_files
from ldm.data.sources.aligned import Companion
from ldm.data.sources.captions import Beside, CaptionTable, InTable, TextFiles
from ldm.data.sources.image_files import ImageFiles
from ldm.data.sources.listing import EXTENSIONS, Listing, demand_no_lost_class, find
from ldm.errors import DataError
from ldm.ranges import Count, Finite


class ImageFolder(ImageFiles):
    """Images in a folder. Classes are its subfolders (searched to any depth); without subfolders it is flat.

    Hidden files are left out, extensions are case-insensitive, links are followed, and the order is natural (2 < 10).
    What is left out is counted by kind in one line of the log.

    Args:
        root: the folder.
        classes: True: subfolders are classes; False: search them all, without classes; None: detect.
        captions: a file with a caption, or a list of several, for each picture: JSONL with
            `{"file_name": path within root, "caption": text}` on each line (`text` is accepted for `caption`), or .csv,
            .tsv or .parquet with these columns; `CaptionTable` names other columns and keeps numbers. None: captions
            are read from `name.txt` beside `name.jpg`, one a file, if every image has one; True: the same, but an image
            without one is an error; `TextFiles` reads several of a file; False: there are none.
        max_pixels: larger images count as broken.
        value_range: [black, white] of gray images with more than 8 bits, such as [0, 4095] for 12 bits in 16-bit files,
            or the window of a CT; values outside are clipped. None: 0 and 65535, with a warning if the images are so
            dark that this looks wrong; 32-bit and floating-point files are refused. 8-bit files are not affected.
        aligned: by key of an item (`map`, `mask`, `boxes`, `pair`), where what lies on the pictures comes from:
            `MapFiles`, `MaskFiles`, `CocoBoxes`, `PairFiles`.

    Raises:
        ConfigError: an invalid `value_range`, or a key in `aligned` that is none.
        DataError: no folder, no images, a subfolder that cannot be read or holds only images of unsupported formats,
            images both in the folder and in subfolders, or captions or aligned values that are missing.
    """

    def __init__(
        self,
        root: str | Path,
        classes: bool | None = None,
        captions: str | Path | bool | CaptionTable | TextFiles | None = None,
        max_pixels: Count = MAX_PIXELS,
        value_range: Sequence[Finite] | None = None,
        aligned: Mapping[str, Companion] | None = None,
    ) -> None:
        root = Path(root)
        if not root.is_dir():
            raise DataError(f"{root}: no such folder of images; set `root` of the data set to an existing one")
        checked = ranges.checked(value_range)
        listing = find(root)
        if not listing.pictures:
            raise DataError(
                f"{root}: 0 images found ({listing.left_out() or 'it is empty'}; looked for "
                f"{' '.join(sorted(EXTENSIONS))}); set `root` to a folder that has images"
            )
        names = _classes(root, listing.pictures, classes)
        lost = demand_no_lost_class(root, listing, names) if names else ""
        texts, numbers, note = _captions(root, listing, captions)
        labels = None if names is None else _labels(listing.pictures, names)
        count = None if names is None else len(names)
        super().__init__(root, listing.pictures, labels, count, names, texts, numbers, max_pixels, checked, aligned)
        left_out = listing.left_out(used=set(texts.files) if texts else ())
        self.say(lost, note, f"left out: {left_out}" if left_out else "")


def _classes(root: Path, files: Sequence[str], wanted: bool | None) -> list[str] | None:
    """Names of the class folders in natural order, or None for a flat folder."""
    loose = [name for name in files if "/" not in name]
    if wanted is None and loose and len(loose) < len(files):
        raise DataError(
            f"{root}: holds {len(loose)} images itself ({loose[0]}, ...) and others in subfolders. "
            "Move them into class folders, or set `classes: false` to use all images without classes"
        )
    if wanted is False or (wanted is None and loose):
        return None
    if loose:
        raise DataError(f"{root / loose[0]}: is in no class folder; move it into one or set `classes: false`")
    return list(dict.fromkeys(name.partition("/")[0] for name in files))


def _labels(files: Sequence[str], class_names: Sequence[str]) -> np.ndarray:
    label_of = {name: label for label, name in enumerate(class_names)}
    return np.fromiter((label_of[name.partition("/")[0]] for name in files), np.int64, len(files))


def _captions(
    root: Path, listing: Listing, wanted: str | Path | bool | CaptionTable | TextFiles | None
) -> tuple[InTable | Beside | None, Mapping[str, np.ndarray], str]:
    """The captions, the numbers, and a note on what is left out."""
    if wanted is False:
        return None, {}, ""
    if isinstance(wanted, str | Path):
        wanted = CaptionTable(wanted)
    if isinstance(wanted, CaptionTable):
        return caption_files.from_table(wanted, root, listing.pictures)
    texts, note = caption_files.beside(root, listing.pictures, listing.texts, wanted)
    return texts, {}, note
