"""Reads a part of a cache by item numbers, a batch at once, from memory maps (format: parts.py)."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.latents.parts import TEXT, PartManifest, PartSpec
from ldm.latents.ragged import Shard, from_raw
from ldm.latents.shards import check_bytes, check_sizes, shard_path, size_on_disk


class PartReader:
    """Reads a finished part, by the item numbers of its source. A shard is checked when it is first touched.

    Args:
        folder: of the part.
        expected: the plan that the caller would build; None: accept any part.
        manifest: as `build_part` has returned it, which has looked at the shards; None: it is read, and their sizes
            compared.

    Raises:
        DataError: not finished, truncated, damaged, or not what is expected; names file, key and fix.
    """

    def __init__(self, folder: Path, expected: PartSpec | None = None, manifest: PartManifest | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = manifest or PartManifest.read(self.folder)
        self.plan = self.manifest.plan
        if expected is not None:
            expected.require(self.folder, self.plan)
        if manifest is None:
            check_sizes(self.folder, self.manifest)
        self.parts = self.plan.rows()
        self._shards: dict[int, Shard] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # a pickled memory map would be a copy of the file

    def __str__(self) -> str:
        """The folder, what it holds, and its size."""
        of_each = f" of {self.manifest.num_rows} captions" if self.plan.reads == "caption" else ""
        cut = f", {self.manifest.num_cut} of them too long" if self.manifest.num_cut else ""
        counted = f"{self.manifest.num_items} items, {len(self.broken)} broken"
        return f"{self.folder}: {self.plan.name}{of_each}{cut}, {counted}, {size_on_disk(self.folder)}"

    @property
    def broken(self) -> Sequence[int]:
        """Items of which there is nothing."""
        return self.manifest.broken

    def counts(self, items: np.ndarray) -> np.ndarray:
        """The number of rows of (N,) items: (N,) int64; 0 for a broken one."""
        counts = np.zeros(len(items), np.int64)
        for shard, among, places in self._by_shard(items):
            counts[among] = shard.counts(places)
        return counts

    def texts(self, items: np.ndarray, which: np.ndarray) -> list[str]:
        """The `which`-th caption of (N,) items; of a part with captions."""
        found = [""] * len(items)
        for shard, among, places in self._by_shard(items):
            raw = shard.ragged(TEXT, shard.row(places, which[among]))
            for place, text in zip(among.tolist(), raw, strict=True):
                found[place] = text.tobytes().decode("utf-8", "surrogatepass")
        return found

    def gather(self, name: str, items: np.ndarray, which: np.ndarray) -> dict[str, Tensor]:
        """The `which`-th rows of (N,) items as columns of a batch, as `features.stacked` lays them out.

        Args:
            name: of the feature, with which the columns' names begin.
            items, which: (N,) int64.
        """
        columns: dict[str, np.ndarray] = {}
        masks: dict[str, np.ndarray] = {}
        for part_name, part in self.parts.items():
            # Zeros, which pad the rows of ragged parts.
            columns[part_name] = np.zeros((len(items), *part.shape), f"i{part.dtype.itemsize}")
            if part.ragged:
                masks[part_name] = np.zeros((len(items), part.shape[0]), bool)
        for shard, among, places in self._by_shard(items):
            rows = shard.row(places, which[among])
            for part_name, part in self.parts.items():
                if not part.ragged:
                    columns[part_name][among] = shard.fixed(part_name, rows)
                    continue
                for place, row in zip(among.tolist(), shard.ragged(part_name, rows), strict=True):
                    columns[part_name][place, : len(row)] = row
                    masks[part_name][place, : len(row)] = True
        found = {}
        for part_name, part in self.parts.items():
            found[f"{name}.{part_name}"] = from_raw(columns[part_name], part.dtype)
            if part.ragged:
                found[f"{name}.{part_name}_mask"] = torch.from_numpy(masks[part_name])
        return found

    def _by_shard(self, items: np.ndarray) -> list[tuple[Shard, np.ndarray, np.ndarray]]:
        """(shard, which of the items lie in it, their places in it) for each shard that holds some of them."""
        numbers, places = np.divmod(np.asarray(items, np.int64), self.plan.shard_items)
        touched = np.unique(numbers).tolist()
        self._open([shard for shard in touched if shard not in self._shards])
        found = []
        for shard in touched:
            among = np.flatnonzero(numbers == shard)
            found.append((self._shards[shard], among, places[among]))
        return found

    def _open(self, new: Sequence[int]) -> None:
        if new:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1, len(new))) as pool:  # crc32 releases the lock
                list(pool.map(lambda shard: check_bytes(self.folder, self.manifest, shard), new))
        for shard in new:
            layout = self.plan.layout(shard, self.manifest.shards[shard])
            self._shards[shard] = Shard(shard_path(self.folder, shard), self.parts, layout)
