"""Latents in buckets: a cache for each size, built like any other, read and standardized as one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ldm.data.bucket_order import Rows
from ldm.data.buckets import Assigned
from ldm.data.dataset import ImageDataset
from ldm.latents.build import statistics
from ldm.latents.claims import read_sealed
from ldm.latents.manifest import CacheSpec, Manifest
from ldm.latents.part_reader import PartReader
from ldm.latents.reader import LatentCache, LatentDataset
from ldm.latents.shards import shard_path


class BucketedLatents(Dataset[Any]):
    """Batches of one bucket each, addressed by (sample number, row): rows number what the buckets hold, one by one.

    Args:
        buckets: what they hold.
    """

    def __init__(self, buckets: Sequence[LatentDataset]) -> None:
        self.buckets = buckets
        self.lengths = [len(bucket) for bucket in buckets]
        self._rows = Rows(self.lengths)

    def __len__(self) -> int:
        return len(self._rows)

    def parts(self) -> list[PartReader]:
        """Those of the cache beside the latents: of all buckets, and of each."""
        dense = [part for rows in self.buckets if rows.dense is not None for part in rows.dense.parts()]
        return [*self.buckets[0].conditions.parts(), *dense]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """The batch of `LatentDataset`; all keys must be of one bucket."""
        bucket, _ = self._rows.place(keys[0][1])
        start = self._rows.starts[bucket]
        return self.buckets[bucket].__getitems__([(number, row - start) for number, row in keys])

    def items(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """The item numbers of the rows in the whole data set: (N,) int64."""
        places = [self._rows.place(row) for row in np.asarray(rows).tolist()]
        return np.array([self.buckets[bucket].items([own])[0] for bucket, own in places], dtype=np.int64)


def whole(plan: CacheSpec, dataset: ImageDataset) -> CacheSpec:
    """The plan of one bucket as that of all items of the data set."""
    return replace(plan, num_items=len(dataset), source=dataset.fingerprint())


def joined(caches: Sequence[LatentCache], buckets: Assigned, dataset: ImageDataset) -> Manifest:
    """One manifest of the caches of all buckets: their common statistics, in which each position counts once.

    Args:
        caches: of the buckets.
        buckets: which items of the data set they hold, in which sizes.
        dataset: the items of all.
    """
    manifests = [cache.manifest for cache in caches]
    sidecars: list[Mapping[str, Any]] = []
    for cache in caches:
        sidecars += [read_sealed(shard_path(cache.folder, shard, ".json")) for shard in range(cache.plan.num_shards)]
    values = sum(m.num_items * m.plan.orientations * m.plan.shape[1] * m.plan.shape[2] for m in manifests)
    found = statistics(sidecars, values)
    broken = [items[m.broken] for items, m in zip(buckets.items, manifests, strict=True) if m.broken]
    return Manifest(
        plan=whole(caches[buckets.default].plan, dataset),
        mean=found.mean,
        std=found.std,
        broken=sorted(np.concatenate(broken).tolist()) if broken else [],
        shards=[shard for m in manifests for shard in m.shards],
        sizes=[[*size] for size in buckets.sizes],
    )
