"""The image folder: classes are its subfolders, captions lie beside the pictures or in one file.

A data set decodes and labels; it neither resizes nor augments (data/transforms.py does).
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data import fingerprint
from ldm.data import value_range as ranges
from ldm.data.dataset import CONVERTIBLE, Item
from ldm.data.decoding import MAX_PIXELS, file_sizes, read_image
from ldm.data.sources import captions as caption_files
from ldm.data.sources.listing import EXTENSIONS, demand_no_lost_class, find
from ldm.errors import DataError
from ldm.ranges import Count, Finite
from ldm.runtime import distributed

logger = logging.getLogger(__name__)


class ImageFolder:
    """Images in a folder. Classes are its subfolders (searched to any depth); without subfolders it is flat.

    Hidden files are left out, extensions are case-insensitive, links are followed, and the order is natural (2 < 10).
    What is left out is counted by kind in one line of the log.

    Args:
        root: the folder.
        classes: True: subfolders are classes; False: search them all, without classes; None: detect.
        captions: a JSONL file with `{"file_name": path within root, "caption": text}` on each line (`text` is
            accepted for `caption`). None: captions are read from `name.txt` beside `name.jpg` if every image has one;
            True: the same, but an image without one is an error; False: there are none.
        max_pixels: larger images count as broken.
        value_range: [black, white] of gray images with more than 8 bits, such as [0, 4095] for 12 bits in 16-bit files,
            or the window of a CT; values outside are clipped. None: 0 and 65535, with a warning if the images are so
            dark that this looks wrong; 32-bit and floating-point files are refused. 8-bit files are not affected.

    Raises:
        ConfigError: an invalid `value_range`.
        DataError: no folder, no images, a subfolder that cannot be read or holds only images of unsupported formats,
            images both in the folder and in subfolders, or captions that are missing.
    """

    def __init__(
        self,
        root: str | Path,
        classes: bool | None = None,
        captions: str | Path | bool | None = None,
        max_pixels: Count = MAX_PIXELS,
        value_range: Sequence[Finite] | None = None,
    ) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"{self.root}: no such folder of images; set `root` of the data set to an existing one")
        self.max_pixels = max_pixels
        self.value_range = ranges.checked(value_range)
        listing = find(self.root)
        self.files = listing.pictures
        if not self.files:
            raise DataError(
                f"{self.root}: 0 images found ({listing.left_out() or 'it is empty'}; looked for "
                f"{' '.join(sorted(EXTENSIONS))}); set `root` to a folder that has images"
            )
        self.class_names = self._classes(classes)
        self._label_of = {name: label for label, name in enumerate(self.class_names or ())}
        self._captions: dict[str, str] | None = None
        self._texts: dict[str, str] = {}
        self._fingerprint: str | None = None
        self._prepared = False
        notes = [demand_no_lost_class(self.root, listing, self.class_names) if self.class_names else ""]
        if isinstance(captions, str | Path):
            self._captions, note = caption_files.from_jsonl(Path(captions), self.files)
            notes.append(note)
        elif captions is not False:
            self._texts, note = caption_files.beside(self.root, self.files, listing.texts, captions)
            notes.append(note)
        left_out = listing.left_out(used=set(self._texts.values()))
        self._say(*notes, f"left out: {left_out}" if left_out else "")

    def _say(self, *notes: str) -> None:
        for note in filter(None, notes):
            if distributed.is_main():
                logger.warning("%s: %s", self.root, note)

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
            raise DataError(f"{self.root / loose[0]}: is in no class folder; move it into one or set `classes: false`")
        return list(dict.fromkeys(name.split("/")[0] for name in self.files))

    @property
    def num_classes(self) -> int | None:
        return None if self.class_names is None else len(self.class_names)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Item:
        item: Item = {"image": read_image(self.path(index), self.max_pixels, self.value_range, keep_alpha=True)}
        if self.class_names is not None:
            item["class_label"] = self._label(self.files[index])
        if self.has_captions():
            several = self.captions(index)
            item["caption"] = several[0] if len(several) == 1 else list(several)
        return item

    def captions(self, index: int) -> Sequence[str]:
        if self._captions is not None:
            return [self._captions[self.files[index]]]
        return [caption_files.read_text(self.root / self._texts[self.files[index]])] if self._texts else []

    def _label(self, file: str) -> int:
        return self._label_of[file.split("/")[0]]

    def has_captions(self) -> bool:
        return bool(self._captions is not None or self._texts)

    def class_labels(self) -> np.ndarray | None:
        return None if self.class_names is None else np.array([self._label(file) for file in self.files])

    def decoding(self) -> dict[str, Any]:
        return {} if self.value_range is None else {"value_range": list(self.value_range)}

    def channel_choices(self) -> Sequence[int] | None:
        return CONVERTIBLE

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.files[index])

    def fingerprint(self) -> str:
        """Covers names, sizes, classes, captions, the value range and samples of all files' bytes, which it reads."""
        if self._fingerprint is None:
            self._fingerprint = self._described(self._captions, bool(self._texts))
        return self._fingerprint

    def pictures_fingerprint(self) -> str:
        """As `fingerprint` of the same folder without captions."""
        return self._described(None, with_texts=False) if self.has_captions() else self.fingerprint()

    def _described(self, captions: Mapping[str, str] | None, with_texts: bool) -> str:
        states, samples = self._states, self._samples
        sizes, of_texts = np.split(states[:, 0], [len(self.files)])
        if not with_texts:
            of_texts, samples = np.full_like(sizes, -1), samples[: len(self)]
        described = [self.class_names, captions, *([self.value_range] if self.value_range else [])]
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        for name, size, of_text in zip(self.files, sizes.tolist(), of_texts.tolist(), strict=True):
            digest.update(f"[{json.dumps(name)}, {size}, {of_text}]".encode())
        return fingerprint.join(digest.hexdigest(), fingerprint.digest(samples))

    def captions_fingerprint(self) -> str:
        names = [self._texts[name] for name in self.files] if self._texts else []
        hashes = (
            fingerprint.remembered(self.root, names, self._states[len(self) :], ".captions", self._hash)
            if names
            else np.array([self._hash(index) for index in range(len(self))], dtype=np.uint64)
        )
        return fingerprint.digest(hashes)

    def _hash(self, index: int) -> int:
        try:
            return caption_files.hash_of(self.captions(index))
        except DataError:
            return 0

    def sizes(self) -> np.ndarray | None:
        states = self._states[: len(self)]
        return file_sizes(self.root, self.files, states, self.max_pixels, silent=not distributed.is_main())

    def columns(self) -> Mapping[str, np.ndarray]:
        return {}

    @cached_property
    def _all(self) -> list[str]:
        """The pictures, and their text files if they are captions."""
        return [*self.files, *(self._texts[name] for name in self.files if self._texts)]

    @cached_property
    def _states(self) -> np.ndarray:
        return fingerprint.stats(self.root, self._all)

    @cached_property
    def _samples(self) -> np.ndarray:
        return fingerprint.samples(self.root, self._all, self._states)

    def prepare(self) -> None:
        """Look at some 16-bit images, if there are any, and warn if their range seems to be different."""
        if not self._prepared and self.value_range is None and distributed.is_main():
            self._say(ranges.warning([self.path(index) for index in range(len(self))], self.max_pixels))
        self._prepared = True
