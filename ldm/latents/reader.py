"""Reads the latent cache: a batch at once, from memory maps (format: manifest.py)."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.errors import DataError
from ldm.latents.claims import read_sealed
from ldm.latents.conditions import Conditions
from ldm.latents.dense import DenseRows
from ldm.latents.manifest import CacheSpec, Manifest
from ldm.latents.part_reader import PartReader
from ldm.latents.shards import check_bytes, check_sizes, mapped, shard_path, size_on_disk
from ldm.randomness import Draws
from ldm.ranges import Seed


class LatentCache:
    """Reads a finished cache. Each shard is checked against its checksum when it is first touched.

    Rows are numbered 0 .. len - 1 over the items that have a record: broken items leave no gaps.

    Args:
        folder: of the cache.
        expected: the plan that the caller would build; None: accept any cache.
        manifest: as `build` has returned it, which has looked at the shards; None: it is read, and sizes are compared.

    Raises:
        DataError: not finished, truncated, damaged, or not what is expected; names file, key and fix.
    """

    def __init__(self, folder: Path | str, expected: CacheSpec | None = None, manifest: Manifest | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = manifest or Manifest.read(self.folder)
        self.plan = self.manifest.plan
        if expected is not None:
            expected.require(self.folder, self.plan)
        if manifest is None:
            check_sizes(self.folder, self.manifest)
        broken = np.asarray(self.manifest.broken, dtype=np.int64)
        self._items = np.setdiff1d(np.arange(self.plan.num_items), broken) if len(broken) else None
        self._maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # moments and labels of each open shard
        self._captions: dict[int, list[str]] = {}

    def __len__(self) -> int:
        return self.manifest.num_items

    def __str__(self) -> str:
        """The folder, what it holds, and its size."""
        counted = f"{len(self)} items of {self.plan.shape}, {len(self.broken)} broken"
        return f"{self.folder}: {counted}, {size_on_disk(self.folder)}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a pickled memory map would be a copy of the file

    def gather(self, rows: Sequence[int] | np.ndarray, mirrored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One batch: each record is copied once, in the order of the records on disk.

        Args:
            rows: (N,) of 0 .. len - 1.
            mirrored: (N,) bool, the orientation; of a cache without mirror images all False.

        Returns:
            moments (N, 2, c, h, w) float16 (mean, std) and labels (N,) int64 (-1 for none).
        """
        shards, places = np.divmod(self.items(rows), self.plan.shard_items)
        self._open(np.unique(shards).tolist())
        moments = np.empty((len(shards), 2, *self.plan.shape), dtype=np.float16)
        labels = np.empty(len(shards), dtype=np.int64)
        side = np.asarray(mirrored).astype(np.int64).tolist()
        where = list(zip(shards.tolist(), places.tolist(), strict=True))
        for index in np.lexsort((places, shards)).tolist():
            shard, place = where[index]
            stored, label = self._maps[shard]
            moments[index] = stored[place, side[index]]
            labels[index] = label[place]
        return moments, labels

    @property
    def broken(self) -> Sequence[int]:
        """Items of which there is no record."""
        return self.manifest.broken

    def counts(self, items: np.ndarray) -> np.ndarray:
        """How many captions (N,) items have in a cache with captions: (N,) ones."""
        return np.ones(len(items), np.int64)

    def texts(self, items: np.ndarray, which: np.ndarray) -> list[str]:
        """The captions of (N,) items, of a cache with captions; `which` are zeros."""
        shards, places = np.divmod(items, self.plan.shard_items)
        for shard in np.unique(shards).tolist():
            if shard not in self._captions:
                self._captions[shard] = read_sealed(shard_path(self.folder, shard, ".json"))["captions"]
        return [self._captions[shard][place] for shard, place in zip(shards.tolist(), places.tolist(), strict=True)]

    def captions(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The captions of (N,) rows, of a cache with captions."""
        items = self.items(rows)
        return self.texts(items, np.zeros(len(items), np.int64))

    def items(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """The source's item numbers of the rows: (N,) int64."""
        index = np.asarray(rows, dtype=np.int64)
        return index if self._items is None else self._items[index]

    def _open(self, shards: list[int]) -> None:
        new = [shard for shard in shards if shard not in self._maps]
        if new:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1, len(new))) as pool:  # crc32 releases the lock
                list(pool.map(lambda shard: check_bytes(self.folder, self.manifest, shard), new))
        for shard in new:
            records = mapped(shard_path(self.folder, shard)).view(self.plan.record)
            self._maps[shard] = (records["moments"], records["label"])


class LatentDataset(Dataset[Any]):
    """What a DataLoader reads: whole batches of moments, addressed by (sample number, row).

    Use with `batch_sampler` yielding lists of keys and `collate_fn=` the identity. Rows are numbered 0 .. len - 1 over
    the items of which there is all that a batch holds.

    Args:
        cache: the reader.
        seed: of the run; together with the sample number it determines the orientation and the caption.
        flip: mirror half of the samples (training), or none (validation).
        conditions: what batches hold beside latents and labels; None: the captions that an old cache has itself.
        among: the numbers of the cache's items in the data set that the conditions are of; None: they are the same.
        dense: what lies on the pictures of the cache's items; None: nothing.

    Raises:
        DataError: mirror images are wanted of a cache without.
    """

    def __init__(
        self,
        cache: LatentCache,
        seed: Seed,
        flip: bool,
        conditions: Conditions | None = None,
        among: np.ndarray | None = None,
        dense: DenseRows | None = None,
    ) -> None:
        if flip and not cache.plan.mirrored:
            raise DataError(f"{cache.folder}: holds no mirror images, which `flip: true` reads: name another cache")
        self.cache = cache
        self.seed = seed
        self.flip = flip
        self.conditions = conditions or Conditions(cache if cache.plan.captions else None)
        self.dense = dense
        self._among = among
        self._rows: np.ndarray | None = None
        without_conditions = self.conditions.broken
        without_dense = np.asarray([] if dense is None else dense.broken, np.int64)
        if len(without_conditions) or len(without_dense):  # otherwise without an array of all rows
            rows = range(len(cache))
            whole = ~np.isin(self.items(rows), without_conditions) & ~np.isin(cache.items(rows), without_dense)
            self._rows = None if whole.all() else np.flatnonzero(whole)  # those of the cache

    def __len__(self) -> int:
        return len(self.cache) if self._rows is None else len(self._rows)

    def items(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """The item numbers of the rows in the whole data set: (N,) int64."""
        items = self.cache.items(self._of_cache(rows))
        return items if self._among is None else self._among[items]

    @property
    def lengths(self) -> int | list[int]:
        """Of all rows, as a loader wants it; in buckets there are several (bucketed.py)."""
        return len(self)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Batch: `moments` (N,2,c,h,w) float16, `sample_number` (N,) int64 array, `class_label` (N,), conditions.

        What lies on the pictures is in the orientation of the latents.
        """
        numbers, rows = np.asarray(keys, dtype=np.int64).reshape(-1, 2).T
        # The flip depends on the sample number, not the row: the next epoch may see the other orientation.
        mirrored = Draws(self.seed, numbers, 1).uniform("flip").numpy() < (0.5 if self.flip else 0.0)
        moments, labels = self.cache.gather(self._of_cache(rows), mirrored)
        batch: dict[str, Any] = {"moments": torch.from_numpy(moments), "sample_number": numbers}
        if self.cache.plan.num_classes is not None:
            batch["class_label"] = torch.from_numpy(labels)
        batch |= self.conditions.gather(self.items(rows), numbers, self.seed)
        if self.dense is not None:
            batch |= self.dense.gather(self.cache.items(self._of_cache(rows)), numbers, mirrored, self.seed)
        return batch

    def parts(self) -> list[PartReader]:
        """Those of the cache beside the latents."""
        return [*self.conditions.parts(), *([] if self.dense is None else self.dense.parts())]

    def _of_cache(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        index = np.asarray(rows, dtype=np.int64)
        return index if self._rows is None else self._rows[index]
