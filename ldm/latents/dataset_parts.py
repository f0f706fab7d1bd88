"""Builds the parts of a cache (parts.py) from a data set: its captions, what features make of them or of its items, and
what lies on its pictures.

A value is encoded on its own, so that its bits depend neither on its neighbors nor on who encodes it.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ldm.data.dataset import ImageDataset, texts, with_aligned
from ldm.diffusion.conditioners.features import Cutting, Feature, Part, WithNull
from ldm.errors import ConfigError, DataError
from ldm.latents.build import Source, shard_items
from ldm.latents.conditions import CAPTION, Captions
from ldm.latents.part_reader import PartReader
from ldm.latents.parts import CAPTIONS, TEXT, TOO_LONG, Found, PartSpec, Rows, build_part, described, made_of
from ldm.latents.places import place_part
from ldm.latents.ragged import Row, to_raw
from ldm.latents.shards import MANIFEST, PLAN
from ldm.latents.source import former_source, source
from ldm.runtime import distributed
from ldm.runtime.progress import shown
from ldm.runtime.signals import stop_if_asked

log = logging.getLogger(__name__)

CAPTIONS_NAME = "captions"
_CAPTIONS_A_SHARD = 1 << 14  # nothing is lost with one, and a million captions take seconds
_CHUNK = 256
_FEWEST = 64  # values of a shard


class ItemRows(Protocol):
    """What a part holds of each item, made of the whole item."""

    @property
    def reads(self) -> str:
        """The key of an item without which there is nothing."""
        ...

    @property
    def aligned(self) -> Sequence[str]:
        """The keys of all that lies on the picture and rows are made of."""
        ...

    @property
    def parts(self) -> Mapping[str, Part]:
        """Of a row."""
        ...

    @property
    def several(self) -> int:
        """Rows of an item."""
        ...

    def describe(self) -> dict[str, Any]:
        """All that determines the rows beside the item, in plain values."""
        ...

    def read(self, number: int, item: Mapping[str, Any], path: str) -> Any:
        """What is needed of item `number`, which comes from `path`, in one of several threads.

        Raises:
            DataError: a value that does not fit the others.
        """
        ...

    def found(self, read: Any) -> Found:
        """The rows made of it, one item after another."""
        ...


@dataclass(frozen=True)
class DatasetParts:
    """The parts of one data set.

    Args:
        name: of the data set in messages and folders, such as "train".
        dataset: the items.
        cache: folder that holds the parts, each under its name; None: `cache/`, each under its fingerprint.
        max_broken: how many items may be unreadable.
        threads: number of threads that read.
    """

    name: str
    dataset: ImageDataset
    cache: Path | None = None
    max_broken: int = 0
    threads: int = 1

    def captions(self) -> PartReader:
        """The captions of all items, written if they are not there.

        Raises:
            DataError: an item has none, or they are damaged, of other captions, or unreadable for too many items.
        """
        plan = PartSpec(
            name=CAPTIONS_NAME,
            reads=CAPTION,
            source=self._source(CAPTION),
            num_items=len(self.dataset),
            parts=described(CAPTIONS),
            shard_items=_CAPTIONS_A_SHARD,
        )
        return self._built(plan, self._caption_rows)

    def feature(self, name: str, feature: Feature, captions: Captions | None, device: torch.device) -> PartReader:
        """What a feature makes of all captions or items; computed on `device` if it is not there.

        Raises:
            ConfigError: the data set has no captions, and the feature reads them.
            DataError: as `captions`; or the feature makes something else than it says.
        """
        if feature.reads == CAPTION and captions is None:
            raise no_captions(name, self.dataset)
        row_bytes = sum(prod(part.shape) * part.dtype.itemsize for part in feature.parts.values())
        several = 1
        if feature.reads == CAPTION and captions is not None:
            several = int(captions.counts(np.arange(min(len(self.dataset), _CHUNK))).max(initial=1))
        plan = PartSpec(
            name=name,
            reads=feature.reads,
            source=self._source(feature.reads),
            num_items=len(self.dataset),
            parts=described(feature.parts),
            feature=feature.describe(),
            shard_items=shard_items(len(self.dataset), row_bytes * several, _FEWEST),
        )
        encoder = _Encoder(name, feature, device)

        def rows(items: range) -> Iterator[tuple[int, Found | DataError]]:
            for item, values in self._values(items, feature.reads, captions):
                stop_if_asked()
                try:
                    yield item, values if isinstance(values, DataError) else encoder.all_of(values)
                except DataError as error:
                    yield item, DataError(f"{self.dataset.path(item)}: {error}")

        def null() -> Row | None:
            return encoder.all_of([feature.null_value]).rows[0] if isinstance(feature, WithNull) else None

        reader = self._built(plan, rows, null=null)
        if isinstance(feature, WithNull):
            if (kept := reader.manifest.null) is not None:
                feature.keep_null(made_of(reader.parts, kept))
            else:
                log.warning(
                    "%s: was made before caches kept what an encoder makes of %r, so that it is loaded once more when "
                    "training drops conditions. To keep it, delete %s there: the next start writes that anew, and "
                    "nothing else",
                    *(reader.folder, feature.null_value, MANIFEST),
                )
        return reader

    def of_items(self, name: str, made: ItemRows, key: str, too_much: str = TOO_LONG) -> PartReader:
        """What is made of each item, with its picture; computed if it is not there.

        Args:
            name: of the part.
            made: makes it.
            key: of the configuration, which messages name.
            too_much: see `build_part`.

        Raises:
            DataError: as `captions`; or an item lacks what is read.
        """

        def read(item: int) -> Mapping[str, Any]:
            found = dict(with_aligned(self.dataset, item, made.aligned))
            if made.reads not in found:
                raise ConfigError(f"{self.dataset.path(item)}: has no {made.reads}, which {key} reads")
            path = self.dataset.path(item)
            try:
                return {"read": made.read(item, found, path)}
            except DataError as error:
                raise (error if str(error).startswith(path) else DataError(f"{path}: {error}")) from error

        def rows(items: range) -> Iterator[tuple[int, Found | DataError]]:
            for batch in Source(read=read, threads=self.threads).batches(items, _FEWEST):
                stop_if_asked()
                for item, sample in batch:
                    yield item, sample if isinstance(sample, DataError) else made.found(sample["read"])

        return self._built(self._of_items(name, made), rows, too_much)

    def has(self, name: str, made: ItemRows) -> bool:
        """Whether what `of_items` would complete has been begun."""
        folder, plan = self._place(self._of_items(name, made))
        return (folder / PLAN).is_file() and not plan.differences(PartSpec.read(folder))

    def _of_items(self, name: str, made: ItemRows) -> PartSpec:
        row_bytes = sum(prod(part.shape) * part.dtype.itemsize for part in made.parts.values())
        return PartSpec(
            name=name,
            reads=made.reads,
            source=source(self.dataset, made.aligned),
            num_items=len(self.dataset),
            parts=described(made.parts),
            feature=made.describe(),
            shard_items=shard_items(len(self.dataset), row_bytes * made.several, _FEWEST),
        )

    def _place(self, plan: PartSpec) -> tuple[Path, PartSpec]:
        """The folder of a part, and the plan as it would be written there."""
        formerly = former_source(self.dataset), self.dataset.fingerprint()  # the second of features of other keys
        plans = [plan, *(replace(plan, source=one) for one in formerly if plan.reads != CAPTION)]
        return place_part(plans, None if self.cache is None else self.cache / f"{self.name}-{plan.name}")

    def _source(self, reads: str) -> str:
        """The fingerprint of what is read."""
        if reads != CAPTION:
            return source(self.dataset, () if reads == "image" else (reads,))
        alone = texts(self.dataset)
        return self.dataset.fingerprint() if alone is None else alone.captions_fingerprint()

    def _built(
        self,
        plan: PartSpec,
        rows: Rows,
        too_long: str = TOO_LONG,
        null: Callable[[], Row | None] = lambda: None,
    ) -> PartReader:
        folder, plan = self._place(plan)
        ranks = distributed.rank(), distributed.world_size()
        with shown(f"{self.name} {plan.name}", silent=not distributed.is_main()) as progress:
            manifest = build_part(folder, plan, rows, self.max_broken, *ranks, progress, too_long, null)
        return PartReader(folder, plan, manifest)

    def _caption_rows(self, items: range) -> Iterator[tuple[int, Found | DataError]]:
        alone = texts(self.dataset)

        def read(item: int) -> Found | DataError:
            try:
                found: Any = self.dataset[item].get(CAPTION) if alone is None else alone.captions(item)
            except DataError as error:
                return error
            several = [found] if isinstance(found, str) else [*(found or [])]
            if not several:
                raise DataError(
                    f"{self.dataset.path(item)}: has no caption, as others have; give it one, which may be empty"
                )
            return Found([{TEXT: self._bytes(item, str(caption))} for caption in several])

        chunks = [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]
        with ThreadPoolExecutor(self.threads) as pool:  # captions may be files each
            for chunk, found in zip(chunks, pool.map(lambda chunk: [*map(read, chunk)], chunks), strict=True):
                stop_if_asked()
                yield from zip(chunk, found, strict=True)

    def _bytes(self, item: int, caption: str) -> np.ndarray:
        raw, (most,) = caption.encode("utf-8", "surrogatepass"), CAPTIONS[TEXT].shape
        if len(raw) > most:
            raise DataError(f"{self.dataset.path(item)}: a caption of {len(raw)} bytes; expected {most} at most")
        return np.frombuffer(raw, np.uint8)

    def _values(
        self, items: range, reads: str, captions: Captions | None
    ) -> Iterator[tuple[int, Sequence[Any] | DataError]]:
        """What is encoded of each item: each caption, or the value under the key; or why there is none."""
        if reads == CAPTION and captions is not None:
            broken, counts = {*captions.broken}, captions.counts(np.arange(items.start, items.stop))
            for item, count in zip(items, counts.tolist(), strict=True):
                if item in broken:
                    yield item, DataError(f"{self.dataset.path(item)}: its captions could not be read")
                else:
                    yield item, captions.texts(np.full(count, item), np.arange(count))
            return
        whole = Source(read=lambda item: dict(with_aligned(self.dataset, item, [reads])), threads=self.threads)
        for batch in whole.batches(items, _FEWEST):
            for item, sample in batch:
                if isinstance(sample, DataError):
                    yield item, sample
                elif reads in sample:
                    yield item, [sample[reads]]
                else:
                    raise DataError(f"{self.dataset.path(item)}: has no {reads}, which a feature reads")


def no_captions(name: str, dataset: ImageDataset) -> ConfigError:
    """That a feature reads captions where there are none."""
    return ConfigError(
        f"data.params.features.{name}: reads captions, and the data set ({dataset.path(0)}, ...) has none: give it "
        "some, or leave the feature out"
    )


class _Encoder:
    """Encodes values one by one; equal captions that follow each other once."""

    def __init__(self, name: str, feature: Feature, device: torch.device) -> None:
        self.name = name
        self.feature = feature
        self.parts = feature.parts
        self.device = device
        self._last: tuple[Any, Row, bool] | None = None

    def all_of(self, values: Sequence[Any]) -> Found:
        """The raw parts of an item's values.

        Raises:
            DataError: one that cannot be encoded.
            ConfigError: what is made of it is not what the feature says.
        """
        rows, cut = zip(*map(self._one, values), strict=True)
        return Found(rows, sum(cut))

    def _one(self, value: Any) -> tuple[Row, bool]:
        if self._last is not None and isinstance(value, str) and value == self._last[0]:
            return self._last[1:]
        with torch.no_grad():
            made = self.feature.encode(value, self.device)
        row = {name: to_raw(self._checked(name, part, made)) for name, part in self.parts.items()}
        self._last = (value, row, isinstance(self.feature, Cutting) and self.feature.is_cut(value))
        return self._last[1:]

    def _checked(self, name: str, part: Part, made: Mapping[str, Tensor]) -> Tensor:
        tensor, where = made.get(name), f"data.params.features.{self.name}: {name}"
        if tensor is None:
            raise ConfigError(f"{where}: is not among what it makes: {', '.join(made)}")
        shape = (*tensor.shape,)
        fits = (
            shape == part.shape
            if not part.ragged
            else (len(shape) == len(part.shape) and shape[1:] == part.shape[1:] and 1 <= shape[0] <= part.shape[0])
        )
        if not fits or tensor.dtype != part.dtype:
            most = "up to " if part.ragged else ""
            raise ConfigError(f"{where}: expected {most}{part.shape} {part.dtype}, found {shape} {tensor.dtype}")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ConfigError(f"{where}: not finite as {part.dtype}; store it in another type, such as float32")
        return tensor.cpu()
