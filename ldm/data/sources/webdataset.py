"""Pictures in tars, in the layout of WebDataset: the files of one item share a stem (`000001.jpg`, `000001.txt`).

The package `webdataset` reads such tars from front to back, and shuffles what is in a buffer. Here each tar is indexed
once and then addressed: an order that is a function of the seed and the sample number needs any item at any time.
"""

import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data import fingerprint
from ldm.data import value_range as ranges
from ldm.data.dataset import CONVERTIBLE, Item
from ldm.data.decoding import MAX_PIXELS, read_image
from ldm.data.sources.classes import labeled
from ldm.data.sources.handles import Handle, Handles
from ldm.data.sources.remote import Store
from ldm.data.sources.shards import LocalShards, Shard, changed, demand_distinct, expanded, is_url, refuse
from ldm.data.sources.tar_index import indexes
from ldm.data.sources.tar_items import Wanted, chosen, text_of
from ldm.data.sources.tar_reader import text_sample
from ldm.data.sources.tar_values import read_caption
from ldm.errors import ConfigError, DataError
from ldm.ranges import Count, Finite
from ldm.runtime import distributed

logger = logging.getLogger(__name__)


class WebDataset:
    """Pictures in tars, addressed by number. What is left out is counted in one line of the log.

    Of what is asked for (captions, classes, columns) an item must have all, otherwise it is left out and counted. What
    is detected is used if every item has it. An item whose picture cannot be decoded counts as broken when it is read;
    a tar that is cut or damaged is refused, since what follows would be lost.

    Args:
        shards: tars: a path, a glob, `/data/{000..099}.tar`, or a list of these; or URLs (https://, s3://, gs://, ...).
        store: for URLs: where copies of shards lie (ldm/data/sources/remote.py).
        image: ending of the pictures, such as "jpg" or "seg.png", where an item has several; None: the first with the
            extension of a picture and nothing before it.
        captions: None: `.txt` if every item has one; True: `.txt`; a text: that key of `.json`, which holds a caption
            or a list of several; False: there are none.
        classes: None: `.cls` if every item has one; True: `.cls`; a text: that key of `.json`; False: there are none.
            Numbers are labels; if they are not all numbers, they are names of classes, in natural order.
        class_names: a name for each label; None: those that were found, or none for numbers.
        columns: keys of `.json` with a number, or a list of as many in each item, which the batch then has.
        index: a folder for the indexes, one a shard.
        max_pixels: larger pictures count as broken.
        value_range: [black, white] of gray pictures with more than 8 bits; None: 0 and 65535.

    Raises:
        ConfigError: an invalid parameter, or a store that is missing or too small for a shard.
        DataError: a shard is missing, compressed, cut or damaged; no items are left; a label is out of range.
        ResourceError: a server cannot be reached, or a file cannot be written.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        store: Store | None = None,
        image: str | None = None,
        captions: bool | str | None = None,
        classes: bool | str | None = None,
        class_names: Sequence[str] | None = None,
        columns: Sequence[str] = (),
        index: str | Path = "cache/.shards",
        max_pixels: Count = MAX_PIXELS,
        value_range: Sequence[Finite] | None = None,
    ) -> None:
        patterns = expanded(shards)
        self.max_pixels = max_pixels
        self.value_range = ranges.checked(value_range)
        self._reader = _reader(patterns, store)
        self._shards = self._reader.find(patterns)
        demand_distinct(self._shards)
        read = indexes(self._shards, self._reader, Path(index))
        wanted = Wanted(image, captions, classes, tuple(columns))
        self._items, said, notes = chosen(self._shards, read, wanted)
        self._indexes = [one.closed() for one in read]
        self._labels: np.ndarray | None = None
        self.class_names: list[str] | None = None
        self._num_classes: int | None = None
        if said is not None:
            self._labels, self.class_names, self._num_classes = labeled(said, class_names, self.path)
        self._handles = Handles()
        self._pictures_fingerprint: str | None = None
        self._captions_fingerprint: str | None = None
        for note in filter(None, notes if distributed.is_main() else ()):
            logger.warning("%s: %s", _many(self._shards), note)

    @property
    def num_classes(self) -> int | None:
        return self._num_classes

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Item:
        item = self.without_captions(index)
        if self.has_captions():
            several = self.captions(index)
            item["caption"] = several[0] if len(several) == 1 else list(several)
        return item

    def without_captions(self, index: int) -> Item:
        item: Item = {"image": self._image(index)}
        if self._labels is not None:
            item["class_label"] = int(self._labels[index])
        return item

    def _image(self, index: int) -> Any:
        member = self._items.pictures[index]
        shard = self._shards[self._items.shard(index)]
        data = self._reader.read(shard, int(member["offset"]), int(member["size"]))
        sample = fingerprint.sample(len(data), lambda place, length: data[place : place + length])
        if len(data) != member["size"] or sample != member["sample"]:
            self._reader.demand_unchanged(shard)
            raise DataError(f"{self.path(index)}: its bytes are not those that were there when the tar was indexed")
        return read_image(self.path(index), self.max_pixels, self.value_range, keep_alpha=True, file=io.BytesIO(data))

    def captions(self, index: int) -> Sequence[str]:
        """The captions of an item; none if the data set has none."""
        if self._items.captions is None:
            return []
        member, of = self._items.captions[index], self._indexes[self._items.shard(index)]
        try:
            handle = self._handles.get(of.place) or self._handles.put(of.place, Handle(of.place))
            raw = handle.read(int(member["offset"]), int(member["size"]))
        except OSError as error:
            refuse(str(of.place), error)
        if text_sample(raw) != member["sample"]:
            changed(self._shards[self._items.shard(index)].location)
        try:
            return read_caption(raw, self._items.caption_key)
        except ValueError as error:
            raise DataError(f"{self.path(index)}: its caption cannot be read ({error})") from error

    def _caption_hashed(self, raw: bytes) -> bytes:
        try:
            return json.dumps(read_caption(raw, self._items.caption_key)).encode()
        except ValueError:
            return b"\0" + raw

    def has_captions(self) -> bool:
        return self._items.captions is not None

    def class_labels(self) -> np.ndarray | None:
        return self._labels

    def sizes(self) -> np.ndarray:
        """Of the pictures' headers, which indexing has read."""
        sizes = np.stack([self._items.pictures["height"], self._items.pictures["width"]], axis=1).astype(np.int64)
        sizes[sizes.prod(1) > self.max_pixels] = 0
        return sizes

    def columns(self) -> Mapping[str, np.ndarray]:
        return self._items.columns

    def decoding(self) -> dict[str, Any]:
        return {} if self.value_range is None else {"value_range": list(self.value_range)}

    def channel_choices(self) -> Sequence[int] | None:
        return CONVERTIBLE

    def path(self, index: int) -> str:
        number = self._items.shard(index)
        return f"{self._shards[number].location}:{self._indexes[number].name(int(self._items.pictures[index]['item']))}"

    def fingerprint(self) -> str:
        """Covers stems, sizes, samples of the bytes, classes, columns and captions, in their order; not the shards."""
        pictures = self.pictures_fingerprint()
        if not self.has_captions():
            return pictures
        names, contents = fingerprint.parts(pictures)
        return hashlib.sha256(f"{names} {self.captions_fingerprint()}".encode()).hexdigest() + contents

    def pictures_fingerprint(self) -> str:
        if self._pictures_fingerprint is None:
            described = [self.class_names, self._num_classes, self.value_range, list(self._items.columns)]
            digest = hashlib.sha256(json.dumps(described).encode())
            for index, rows in zip(self._indexes, self._items.by_shard(), strict=True):
                names, items = index.names(), self._items.pictures["item"][rows]
                digest.update(b"".join(names[item] + b"\0" for item in items.tolist()))
            numbers = [self._items.pictures["size"], self._labels, *self._items.columns.values()]
            for array in numbers:
                digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
            contents = fingerprint.digest(self._items.pictures["sample"])
            self._pictures_fingerprint = fingerprint.join(digest.hexdigest(), contents)
        return self._pictures_fingerprint

    def captions_fingerprint(self) -> str:
        if self._captions_fingerprint is None:
            digest = hashlib.sha256(str(len(self)).encode())
            for index, rows in zip(self._indexes, self._items.by_shard(), strict=True):
                with text_of(index) as text:
                    for row in () if self._items.captions is None else self._items.captions[rows]:
                        digest.update(self._caption_hashed(text(row)))
            self._captions_fingerprint = digest.hexdigest()
        return self._captions_fingerprint

    def prepare(self) -> None:
        """Fetch shards behind URLs, if the store can hold them all."""
        self._reader.prepare(self._shards)


def _reader(patterns: Sequence[str], store: Store | None) -> LocalShards | Store:
    if not is_url(patterns[0]):
        return LocalShards()
    if store is None:
        raise ConfigError(
            f"{patterns[0]}: shards behind URLs need a `store` for their copies, such as {{target: "
            "ldm.data.sources.remote.Store, params: {folder: cache/shards, max_bytes: 100000000000}}"
        )
    return store


def _many(shards: Sequence[Shard]) -> str:
    return shards[0].location if len(shards) == 1 else f"{shards[0].location} and {len(shards) - 1} more"
