"""Builds the latent cache: any number of processes, killed at any moment; always the same bytes.

The format is described in manifest.py, how the work is shared in writing.py.

Images are encoded in batches whose members depend only on the item numbers; these, not the world size, determine the
floating-point result. (Different devices, and different numbers of CPU threads, may still differ in the last bit before
the rounding to fp16.)
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.errors import DataError
from ldm.latents.manifest import CacheSpec, Manifest
from ldm.latents.shards import Progress
from ldm.latents.statistics import Statistics
from ldm.latents.writing import Writer, complete
from ldm.runtime.signals import stop_if_asked

LARGEST = float(np.finfo(np.float16).max)
_SHARD_BYTES, _SHARDS = 1 << 28, 256


def shard_items(num_items: int, record_bytes: int, encode_batch: int) -> int:
    """Items per shard: whole encode batches; 1/256 of the cache, so that a kill loses little, at most 256 MB."""
    wanted = min(num_items / _SHARDS, _SHARD_BYTES / record_bytes)
    return max(1, math.ceil(wanted / encode_batch)) * encode_batch


@dataclass(frozen=True)
class Source:
    """Where the items come from.

    Args:
        read: item -> {"image": (C,H,W) float in [-1,1], "class_label": int, "caption": str}, the last two if the plan
            has them; raises DataError for an item that cannot be read. Called from `threads` threads.
        name: item -> its name in error messages, such as its path.
        max_broken: how many items may be unreadable; they are listed in the manifest and hold no record.
        threads: number of threads that read ahead while a batch is encoded.
    """

    read: Callable[[int], Mapping[str, Any]]
    name: Callable[[int], str] = "item {}".format
    max_broken: int = 0
    threads: int = 1

    def batches(self, items: range, size: int) -> Iterator[list[tuple[int, Mapping[str, Any] | DataError]]]:
        """(item, sample or why there is none), `size` at a time; the next batch is read in the background."""

        def one(item: int) -> tuple[int, Mapping[str, Any] | DataError]:
            try:
                return item, self.read(item)
            except DataError as error:
                return item, error

        pieces = [items[start : start + size] for start in range(0, len(items), size)]
        with ThreadPoolExecutor(max(1, self.threads)) as pool:
            waiting = [pool.submit(one, item) for item in pieces[0]]
            for following in [*pieces[1:], range(0)]:
                ahead = [pool.submit(one, item) for item in following]
                yield [future.result() for future in waiting]
                waiting = ahead


def build(
    folder: Path | str,
    plan: CacheSpec,
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    source: Source,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress = lambda done, total: None,
) -> Manifest:
    """Complete the cache of `plan` in `folder`, doing whatever part of the work is left.

    Args:
        folder: of the cache, visible to all ranks.
        plan: what to build.
        encode: images (n,C,H,W) in [-1,1] -> (mean, std), each (n, *plan.shape), in fp32.
        source: the items.
        rank, world_size: which shards to take first.
        progress: called with (items encoded by all processes, items of the plan).

    Raises:
        DataError: the folder holds another cache; too many broken items; a label out of range; moments beyond fp16.
        ResourceError: the folder cannot be written.
        Stopped: a signal requested a stop; the current shard is abandoned, earlier ones are kept.
    """
    folder = Path(folder)
    return complete(
        folder, plan, Manifest, lambda begun: _LatentWriter(folder, begun, encode, source, progress), rank, world_size
    )


class _LatentWriter(Writer[CacheSpec, Manifest]):
    """Encodes the records of shards."""

    def __init__(
        self,
        folder: Path,
        plan: CacheSpec,
        encode: Callable[[Tensor], tuple[Tensor, Tensor]],
        source: Source,
        progress: Progress,
    ) -> None:
        super().__init__(folder, plan, source.max_broken, progress)
        self.encode = encode
        self.source = source

    def shard_bytes(self, shard: int) -> int:
        return len(self.plan.shard_range(shard)) * self.plan.record.itemsize

    def make(self, shard: int) -> tuple[memoryview, dict[str, Any]]:
        items = self.plan.shard_range(shard)
        records = np.zeros(len(items), self.plan.record)
        records["label"] = -1
        sums = np.zeros((3, self.plan.shape[0]))
        broken: dict[str, str] = {}
        captions = [""] * len(items)
        for batch in self.source.batches(items, self.plan.encode_batch):
            stop_if_asked()
            good = [(item, sample) for item, sample in batch if not isinstance(sample, DataError)]
            broken.update({str(item): str(sample) for item, sample in batch if isinstance(sample, DataError)})
            self.demand_few(broken)
            if good:
                places = np.array([item - items.start for item, _ in good])
                moments = self._moments(good)
                records["moments"][places] = moments
                records["label"][places] = [self._label(item, sample) for item, sample in good]
                sums += _sums(moments)
            if self.plan.captions:
                for item, sample in good:
                    captions[item - items.start] = str(sample["caption"])
            self.report(batch[-1][0] + 1 - items.start)
        return records.view(np.uint8).data, {
            "items": len(items) - len(broken),
            "sums": sums.tolist(),
            "broken": broken,
            "captions": captions if self.plan.captions else None,
        }

    def merge(self, sidecars: Sequence[Mapping[str, Any]], broken: list[int]) -> Manifest:
        items = sum(sidecar["items"] for sidecar in sidecars)
        found = statistics(sidecars, items * self.plan.orientations * self.plan.shape[1] * self.plan.shape[2])
        return Manifest(
            plan=self.plan,
            mean=found.mean,
            std=found.std,
            broken=broken,
            shards=[{"crc32": sidecar["crc32"], "items": sidecar["items"]} for sidecar in sidecars],
        )

    def _moments(self, good: Sequence[tuple[int, Mapping[str, Any]]]) -> np.ndarray:
        """(n, orientations, [mean, std], c, h, w) float16; of mirror images the *pixels* are mirrored, then encoded."""
        images = torch.stack([sample["image"] for _, sample in good])
        moments = np.empty((len(good), self.plan.orientations, 2, *self.plan.shape), dtype=np.float16)
        for side in range(self.plan.orientations):
            pixels = images.flip(-1) if side else images
            for part, values in enumerate(self.encode(pixels)):
                if tuple(values.shape[1:]) != self.plan.shape:
                    raise DataError(
                        f"{self.source.name(good[0][0])}: latent shape: expected {self.plan.shape}, "
                        f"found {tuple(values.shape[1:])}. Are all images resized to the same size?"
                    )
                fits = (values.abs() <= LARGEST).flatten(1).all(1).tolist()  # False for NaN too
                if not all(fits):
                    bad = fits.index(False)
                    raise DataError(
                        f"{self.source.name(good[bad][0])}: posterior {('mean', 'std')[part]}: expected magnitudes up "
                        f"to {LARGEST:g} (fp16), found {float(values[bad].abs().max()):g}. The autoencoder has "
                        f"diverged on this image: train it with a larger KL weight, or use an earlier checkpoint."
                    )
                moments[:, side, part] = values.half().cpu().numpy()
        return moments

    def _label(self, item: int, sample: Mapping[str, Any]) -> int:
        if self.plan.num_classes is None:
            return -1
        label = sample.get("class_label")
        if label is None or not 0 <= int(label) < self.plan.num_classes:
            raise DataError(
                f"{self.source.name(item)}: class_label: expected 0 .. {self.plan.num_classes - 1}, found {label}. "
                f"Fix the labels of the data set."
            )
        return int(label)


def statistics(sidecars: Sequence[Mapping[str, Any]], values: int) -> Statistics:
    """Of all latents of these shards, which have so many values a channel."""
    mean, square, variance = np.sum([sidecar["sums"] for sidecar in sidecars], axis=0) / values
    std = np.sqrt(np.maximum(square - mean**2, 0) + variance)
    # A channel with zero variance stays unscaled instead of causing a division by zero.
    return Statistics(mean.tolist(), np.where(std > 0, std, 1.0).tolist())


def _sums(moments: np.ndarray) -> np.ndarray:
    """Per channel, in fp64: the sums of the stored mean, mean^2 and std^2: (3, c)."""
    mean, std = np.moveaxis(moments.astype(np.float64), 2, 0)
    squares = [np.einsum("nschw,nschw->c", values, values) for values in (mean, std)]
    return np.stack([mean.sum((0, 1, 3, 4)), *squares])
