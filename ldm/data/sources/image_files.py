"""Image files with their classes, captions and numbers: what data sets share that find such files in different ways."""

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from ldm.data import fingerprint
from ldm.data import value_range as ranges
from ldm.data.dataset import CONVERTIBLE, Item
from ldm.data.decoding import file_sizes, read_image
from ldm.data.sources import aligned as aligned_values
from ldm.data.sources.aligned import Companion, Values
from ldm.data.sources.captions import Beside, InTable, hash_of
from ldm.errors import DataError
from ldm.ranges import Count, Finite
from ldm.runtime import distributed

logger = logging.getLogger(__name__)


class ImageFiles:
    """Image files within a folder.

    Args:
        root: the folder.
        files: in it, with "/".
        labels: of each, (N,) int64; None: there are no classes.
        num_classes: labels are below it.
        class_names: a name for each label; None: they have none.
        captions: of each; None: there are none.
        numbers: by key of a batch, of each (N,) or (N,k) float32.
        max_pixels: larger images count as broken.
        value_range: (black, white) of gray images with more than 8 bits; None: 0 and 65535.
        aligned: by key of an item, where what lies on the pictures comes from.
    """

    def __init__(
        self,
        root: Path,
        files: list[str],
        labels: np.ndarray | None,
        num_classes: Count | None,
        class_names: list[str] | None,
        captions: InTable | Beside | None,
        numbers: Mapping[str, np.ndarray],
        max_pixels: Count,
        value_range: tuple[Finite, Finite] | None,
        aligned: Mapping[str, Companion] | None = None,
    ) -> None:
        self.root = root
        self.files = files
        self.class_names = class_names
        self.max_pixels = max_pixels
        self.value_range = value_range
        self._labels = labels
        self._num_classes = num_classes
        self._captions = captions
        self._numbers = numbers
        self._aligned = aligned_values.values(aligned, root, files)
        self._prepared = False

    def say(self, *notes: str) -> None:
        """Warn of what was found, once over all ranks."""
        for note in filter(None, notes):
            if distributed.is_main():
                logger.warning("%s: %s", self.root, note)

    @property
    def num_classes(self) -> int | None:
        return self._num_classes

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Item:
        item = self.without_captions(index)
        if self._captions is not None:
            several = self.captions(index)
            item["caption"] = several[0] if len(several) == 1 else list(several)
        return item

    def without_captions(self, index: int) -> Item:
        return self.with_aligned(index, self.aligned_keys())

    def with_aligned(self, index: int, keys: Collection[str]) -> Item:
        image = read_image(self.path(index), self.max_pixels, self.value_range, keep_alpha=True)
        size = image.height, image.width
        on_it = {key: one.of(index, size) for key, one in self._aligned.items() if key in keys}
        item = cast(Item, {"image": image, **on_it})
        if self._labels is not None:
            item["class_label"] = int(self._labels[index])
        return item

    def class_labels(self) -> np.ndarray | None:
        return self._labels

    def has_captions(self) -> bool:
        return self._captions is not None

    def captions(self, index: int) -> Sequence[str]:
        return [] if self._captions is None else self._captions.of(index)

    def columns(self) -> Mapping[str, np.ndarray]:
        return self._numbers

    def aligned_keys(self) -> Sequence[str]:
        return [*self._aligned]

    def map_classes(self) -> list[str] | None:
        return self._aligned["map"].classes if "map" in self._aligned else None

    def box_classes(self) -> list[str] | None:
        return self._aligned["boxes"].classes if "boxes" in self._aligned else None

    def sizes(self) -> np.ndarray | None:
        states = self._states[: len(self)]
        return file_sizes(self.root, self.files, states, self.max_pixels, silent=not distributed.is_main())

    def decoding(self) -> dict[str, Any]:
        return {} if self.value_range is None else {"value_range": list(self.value_range)}

    def channel_choices(self) -> Sequence[int] | None:
        return CONVERTIBLE

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.files[index])

    def prepare(self) -> None:
        """Look at some 16-bit images, if there are any, and warn if their range seems to be different."""
        if not self._prepared and distributed.is_main():
            if self.value_range is None:
                self.say(ranges.warning([self.path(index) for index in range(len(self))], self.max_pixels))
            self.say(self._empty_texts(), *(one.note for one in self._aligned.values()))
        self._prepared = True

    def _empty_texts(self) -> str:
        if not isinstance(self._captions, Beside):
            return ""
        empty = np.flatnonzero(self._states[len(self) :, 0] == 0)
        return f"{len(empty)} captions are empty ({self._captions.files[empty[0]]})" if len(empty) else ""

    def fingerprint(self) -> str:
        """Covers names, sizes, classes, captions, numbers, the value range and samples of all files' bytes."""
        return self._fingerprint

    def pictures_fingerprint(self) -> str:
        """As `fingerprint` of the same files without captions."""
        return self._fingerprint if self._captions is None else self._pictures_fingerprint

    def bare_fingerprint(self) -> str:
        """As `fingerprint` of the same files without captions and aligned values."""
        return self._bare_fingerprint

    def aligned_fingerprint(self, key: str) -> str:
        return self._aligned[key].fingerprint()

    def captions_fingerprint(self) -> str:
        return self._captions_fingerprint

    def covered(self) -> Iterator[bytes]:
        """What a fingerprint covers beside files, captions, aligned values and the names of classes."""
        for name, column in self._numbers.items():
            yield f"{name} {column.shape}".encode() + column.tobytes()

    @cached_property
    def _fingerprint(self) -> str:
        return self._described(self._captions, self._aligned)

    @cached_property
    def _pictures_fingerprint(self) -> str:
        return self._described(None, self._aligned)

    @cached_property
    def _bare_fingerprint(self) -> str:
        return self._described(None, {})

    @cached_property
    def _captions_fingerprint(self) -> str:
        if isinstance(self._captions, Beside):
            kind = ".lines" if self._captions.lines else ".captions"
            states = self._states[len(self) :]
            return fingerprint.digest(
                fingerprint.remembered(self.root, self._captions.files, states, kind, self._caption_hash)
            )
        found = map(self._caption_hash, range(len(self) if self._captions is not None else 0))
        return fingerprint.digest(np.fromiter(found, np.uint64))

    def _caption_hash(self, index: int) -> int:
        try:
            return hash_of(self.captions(index))
        except DataError:
            return 0

    def _described(self, captions: InTable | Beside | None, aligned: Mapping[str, Values]) -> str:
        sizes = self._states[: len(self), 0]
        of_texts, samples = np.full_like(sizes, -1), self._samples[: len(self)]
        if isinstance(captions, Beside):
            of_texts, samples = self._states[len(self) :, 0], self._samples
        # In pieces, since of a million files it is long: the JSON of [class names, captions, value range if given].
        digest = hashlib.sha256(f"[{json.dumps(self.class_names)}, ".encode())
        for piece in ["null"] if captions is None else captions.described(self.files):
            digest.update(piece.encode())
        digest.update(f", {json.dumps(self.value_range)}]".encode() if self.value_range else b"]")
        if isinstance(captions, Beside) and captions.lines:
            digest.update(b"lines")
        for name, size, of_text in zip(self.files, sizes.tolist(), of_texts.tolist(), strict=True):
            digest.update(f"[{json.dumps(name)}, {size}, {of_text}]".encode())
        for more in self.covered():
            digest.update(more)
        for key, one in aligned.items():
            digest.update(f"{key} {one.fingerprint()}".encode())
        return fingerprint.join(digest.hexdigest(), fingerprint.digest(samples))

    @cached_property
    def _read(self) -> Sequence[str]:
        """The pictures, and their text files if they are captions."""
        return [*self.files, *(self._captions.files if self._captions is not None else ())]

    @cached_property
    def _states(self) -> np.ndarray:
        return fingerprint.stats(self.root, self._read)

    @cached_property
    def _samples(self) -> np.ndarray:
        return fingerprint.samples(self.root, self._read, self._states)
