"""Builds the latent cache: any number of processes, killed at any moment; always the same bytes.

The format is described in manifest.py.

There is no collective and no leader. Every process claims a missing shard, writes it, and continues until all exist:
first its own share (shard % world size == rank), then any that other processes have not taken or died writing. What is
published is never written again, so a killed build resumes where it was. Images are encoded in batches whose members
depend only on the item numbers; these, not the world size, determine the floating-point result. (Different devices, and
different numbers of CPU threads, may still differ in the last bit before the rounding to fp16.)
"""

import logging
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.errors import DataError
from ldm.latents.claims import Claims, publish, read_sealed, seal
from ldm.latents.manifest import MANIFEST, PLAN, CacheSpec, Manifest, check_size, shard_path
from ldm.runtime.signals import stop_if_asked

LARGEST = float(np.finfo(np.float16).max)
_PLAN_CLAIM, _MANIFEST_CLAIM = 1 << 40, 1 << 41  # beyond any shard's number
_SHARD_BYTES, _SHARDS = 1 << 28, 256
_POLL_SECONDS = 0.5

log = logging.getLogger(__name__)


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
    progress: Callable[[int, int], None] = lambda done, total: None,
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
    finished = _finished(folder, plan)
    if finished is not None:
        return finished
    claims = Claims(folder)
    try:
        plan = _agree(folder, plan, claims)
        writer = _Writer(folder, plan, encode, source, progress)
        order = sorted(range(plan.num_shards), key=lambda shard: (shard % world_size != rank, shard))
        while missing := [shard for shard in order if not writer.published(shard)]:
            stop_if_asked()
            if not sum(_write_if_free(writer, claims, shard) for shard in missing):
                time.sleep(_POLL_SECONDS)  # other processes are writing the rest
            writer.report(0)
        with claims.take(_MANIFEST_CLAIM, folder / MANIFEST, wait=True):
            manifest = _merge(folder, plan, source)
            publish(folder / MANIFEST, seal(manifest.to_dict()))
    finally:
        claims.close()
    return manifest


def _finished(folder: Path, plan: CacheSpec) -> Manifest | None:
    """The manifest, if nothing is left to do; a cache of another plan is refused."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = Manifest.read(folder)
    plan.require(folder, manifest.plan)
    try:
        for shard in range(manifest.plan.num_shards):
            check_size(folder, manifest, shard)
            read_sealed(shard_path(folder, shard, ".json"))
    except DataError as error:
        log.warning("%s", error)
        return None
    return manifest


def _agree(folder: Path, plan: CacheSpec, claims: Claims) -> CacheSpec:
    """The plan of this build: the one already in the folder (its layout applies), else ours, which is written first."""
    with claims.take(_PLAN_CLAIM, folder / PLAN, wait=True):
        if not (folder / PLAN).is_file():
            publish(folder / PLAN, seal(plan.to_dict()))
        begun = CacheSpec.from_dict(read_sealed(folder / PLAN))
    plan.require(folder, begun)
    return begun


def _write_if_free(writer: "_Writer", claims: Claims, shard: int) -> bool:
    with claims.take(shard, shard_path(writer.folder, shard)) as mine:
        if not mine or writer.published(shard):
            return False
        writer.write(shard)
    return True


class _Writer:
    """Encodes shards and publishes them: the records first, then the sidecar that vouches for them."""

    def __init__(
        self,
        folder: Path,
        plan: CacheSpec,
        encode: Callable[[Tensor], tuple[Tensor, Tensor]],
        source: Source,
        progress: Callable[[int, int], None],
    ) -> None:
        self.folder = folder
        self.plan = plan
        self.encode = encode
        self.source = source
        self.progress = progress
        self._known: set[int] = set()

    def published(self, shard: int) -> bool:
        """Whether the shard and its sidecar exist, whichever process wrote them."""
        if shard not in self._known:
            path = shard_path(self.folder, shard)
            whole = len(self.plan.shard_range(shard)) * self.plan.record.itemsize
            if path.is_file() and path.stat().st_size == whole and path.with_suffix(".json").is_file():
                self._known.add(shard)
        return shard in self._known

    def report(self, under_way: int) -> None:
        done = sum(len(self.plan.shard_range(shard)) for shard in self._known)
        self.progress(done + under_way, self.plan.num_items)

    def write(self, shard: int) -> None:
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
            _demand_few(self.folder, broken, self.source.max_broken)
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
        data = records.view(np.uint8).data
        sidecar = {
            "plan": self.plan.fingerprint(),
            "crc32": f"{zlib.crc32(data):08x}",
            "items": len(items) - len(broken),
            "sums": sums.tolist(),
            "broken": broken,
            "captions": captions if self.plan.captions else None,
        }
        publish(shard_path(self.folder, shard), data)
        publish(shard_path(self.folder, shard, ".json"), seal(sidecar))
        self._known.add(shard)

    def _moments(self, good: Sequence[tuple[int, Mapping[str, Any]]]) -> np.ndarray:
        """(n, [plain, mirrored], [mean, std], c, h, w) float16; the mirrored *pixels* are encoded."""
        images = torch.stack([sample["image"] for _, sample in good])
        moments = np.empty((len(good), 2, 2, *self.plan.shape), dtype=np.float16)
        for side, pixels in enumerate((images, images.flip(-1))):
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


def _sums(moments: np.ndarray) -> np.ndarray:
    """Per channel, in fp64: the sums of the stored mean, mean^2 and std^2: (3, c)."""
    mean, std = np.moveaxis(moments.astype(np.float64), 2, 0)
    squares = [np.einsum("nschw,nschw->c", values, values) for values in (mean, std)]
    return np.stack([mean.sum((0, 1, 3, 4)), *squares])


def _demand_few(folder: Path, broken: Mapping[str, str], most: int) -> None:
    if len(broken) > most:
        listed = "\n  ".join(list(broken.values())[:5])
        raise DataError(
            f"{folder}: {len(broken)} items could not be read, {most} are allowed:\n  {listed}\n"
            f"Fix or remove them, or allow more; what is already encoded is kept."
        )


def _merge(folder: Path, plan: CacheSpec, source: Source) -> Manifest:
    """The manifest built from all sidecars: a function of their content, whichever process wrote them."""
    sidecars = [read_sealed(shard_path(folder, shard, ".json")) for shard in range(plan.num_shards)]
    for shard, sidecar in enumerate(sidecars):
        if sidecar["plan"] != plan.fingerprint():
            path = shard_path(folder, shard, ".json")
            raise DataError(f"{path}: plan: expected {plan.fingerprint()}, found {sidecar['plan']}. Delete it.")
    broken = {item: reason for sidecar in sidecars for item, reason in sidecar["broken"].items()}
    _demand_few(folder, broken, source.max_broken)
    items = sum(sidecar["items"] for sidecar in sidecars)
    if not items:
        raise DataError(f"{folder}: the data set holds {plan.num_items} items, {len(broken)} of them broken: 0 left.")
    for reason in list(broken.values())[:5]:
        log.warning("left out of the latent cache: %s", reason)
    values = items * 2 * plan.shape[1] * plan.shape[2]
    mean, square, variance = np.sum([sidecar["sums"] for sidecar in sidecars], axis=0) / values
    std = np.sqrt(np.maximum(square - mean**2, 0) + variance)
    return Manifest(
        plan=plan,
        mean=mean.tolist(),
        # A channel with zero variance stays unscaled instead of causing a division by zero.
        std=np.where(std > 0, std, 1.0).tolist(),
        broken=sorted(map(int, broken)),
        shards=[{"crc32": sidecar["crc32"], "items": sidecar["items"]} for sidecar in sidecars],
    )
