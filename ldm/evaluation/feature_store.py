"""What was computed of each picture, on disk: any number of processes, killed at any moment; always the same rows.

    cache/.features/<pictures>/description.json          what the pictures are, for people
    cache/.features/<pictures>/00012.<column>.npy         rows 12 * 256 to 13 * 256 of one column: (n, D) float32

A *column* is a function of pictures, such as a feature space. Its rows are kept in blocks of a fixed size, each written
whole. Blocks are shared out by claims, as those of a latent cache (ldm/latents/build.py): every rank takes its own
first, then any that are left. A batch never leaves its block, so that neither the number of ranks nor their speed
decides in which company a picture is computed. (The batch size does: another may select another matrix kernel, and
change a feature in its last bits.) The number of pictures is no part of the name: a store that is asked for more grows.
"""

import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm import errors, files
from ldm.errors import DataError, NumericError, PeerError, ResourceError
from ldm.evaluation.features.base import Features
from ldm.evaluation.pictures.base import Description, digest
from ldm.latents.claims import Claims
from ldm.ranges import CountOrZero
from ldm.runtime import distributed
from ldm.runtime.progress import shown
from ldm.runtime.signals import stop_if_asked

ROOT = Path("cache") / ".features"  # hidden, so that `cache/*` are latent caches
BLOCK = 256
"""Pictures: what a kill loses at most, on each rank."""
PATIENCE = 1800.0
"""Seconds without a new block after which ranks that were waited for count as lost."""
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Column:
    """Something to be known of each picture.

    Attributes:
        key: 16 hex digits; equal ones compute the same.
        compute: what the pictures' source makes of n numbers -> (n, D).
        name: for messages.
    """

    key: str
    compute: Callable[[Any], Tensor]
    name: str


def column(features: Features) -> Column:
    """The column of a feature space, of pictures (n, C, H, W) uint8, which it brings to its device."""
    return Column(key(features), features, features.name)


def key(features: Features) -> str:
    """16 hex digits of a space's name and weights."""
    return digest({"name": features.name, "weights": features.weights})


class Table:
    """The finished rows of one column: (N, D) float32 in blocks, read as they are needed."""

    def __init__(self, blocks: Sequence[Path], number: CountOrZero) -> None:
        self._blocks = blocks
        self._number = number

    def __len__(self) -> int:
        return self._number

    def blocks(self, part: slice = slice(None)) -> Iterator[np.ndarray]:
        """The rows, block by block in order: columns `part` of each, (n, d) float32.

        Raises:
            DataError: a block has gone, or become shorter, since it was finished.
        """
        for number, path in enumerate(self._blocks):
            wanted = min(BLOCK, self._number - number * BLOCK)
            if (found := _rows_in(path)) < wanted:
                raise DataError(f"{path}: expected {wanted} rows, found {found}; the same command computes them again")
            yield np.ascontiguousarray(np.load(path, mmap_mode="r")[:wanted, part])

    def array(self, part: slice = slice(None), limit: int | None = None) -> np.ndarray:
        """The first `limit` rows, or all, in memory: (N, d) float32."""
        number = len(self) if limit is None else min(limit, len(self))
        chosen = Table(self._blocks[: -(-number // BLOCK)], number)
        return np.concatenate([*chosen.blocks(part)])


class FeatureStore:
    """The columns of one source of pictures.

    Args:
        description: of the pictures; names the folder.
        number: how many of them are wanted.
        root: where stores lie.
    """

    def __init__(self, description: Description, number: CountOrZero, root: Path = ROOT) -> None:
        self.description = description
        self.number = number
        self.folder = root / digest(description)
        self._known: dict[Path, int] = {}

    @property
    def num_blocks(self) -> int:
        return -(-self.number // BLOCK)

    def block_range(self, block: int) -> range:
        """The pictures of a block: a function of its number alone."""
        return range(block * BLOCK, min(self.number, (block + 1) * BLOCK))

    def path(self, block: int, key: str) -> Path:
        return self.folder / f"{block:05d}.{key}.npy"

    def has(self, block: int, key: str) -> bool:
        """Whether all rows that are wanted of a block are there; a damaged file is none."""
        path, wanted = self.path(block, key), len(self.block_range(block))
        if self._known.get(path, 0) < wanted:
            self._known[path] = _rows_in(path)
        return self._known[path] >= wanted

    def table(self, key: str) -> Table:
        """A column that is complete."""
        return Table([self.path(block, key) for block in range(self.num_blocks)], self.number)

    def fill(
        self,
        make: Callable[[Sequence[int]], Any],
        columns: Sequence[Column],
        batch_size: int = 64,
        title: str = "features",
    ) -> None:
        """Complete these columns, doing whatever part of the work is left; returns when all of it is there.

        Args:
            make: numbers of pictures -> what the columns are computed of; each picture is made once for all columns.
            columns: what is to be known.
            batch_size: pictures made at once.
            title: of the progress bar.

        Raises:
            NumericError: a column is not finite.
            ResourceError: the folder cannot be written.
            PeerError: other processes that had claimed blocks have not finished any for half an hour.
            Stopped: a signal requested a stop; finished blocks are kept.
        """
        work = _Work(self, make, columns, batch_size)
        if not work.missing():
            return
        claims = Claims(self.folder, "a store of features")
        last = time.monotonic()
        try:
            _write(self.folder / "description.json", _json(self.description))
            with shown(title, silent=not distributed.is_main()) as work.show:
                while missing := work.missing():
                    written = sum(work.fill_if_free(claims, block) for block in missing)
                    if written or len(work.missing()) < len(missing):
                        last = time.monotonic()
                    else:  # other processes are at the rest
                        stop_if_asked()
                        _demand_patience(self.folder, time.monotonic() - last, len(missing))
                        time.sleep(_POLL_SECONDS)
        finally:
            claims.close()


class _Work:
    """What is left to do in a store, and how a block of it is done."""

    def __init__(
        self,
        store: FeatureStore,
        make: Callable[[Sequence[int]], Any],
        columns: Sequence[Column],
        batch_size: int,
    ) -> None:
        self.store = store
        self.make = make
        self.columns = columns
        self.batch_size = batch_size
        self.show: Callable[[int, int], None] = lambda done, total: None
        self._left = [*range(store.num_blocks)]

    def missing(self) -> list[int]:
        """The blocks that lack a column, those of this rank first."""
        self._left = [block for block in self._left if self._lacking(block)]
        rank, world = distributed.rank(), distributed.world_size()
        self._report(0)
        return sorted(self._left, key=lambda block: (block % world != rank, block))

    def fill_if_free(self, claims: Claims, block: int) -> bool:
        """Complete a block, unless another process is at it or has done it."""
        with claims.take(block, self.store.folder / f"{block:05d}") as mine:
            lacking = self._lacking(block)
            if not mine or not lacking:
                return False
            found: dict[str, list[np.ndarray]] = {column.key: [] for column in lacking}
            pictures = self.store.block_range(block)
            for start in range(0, len(pictures), self.batch_size):
                stop_if_asked()
                self._report(start)
                few = pictures[start : start + self.batch_size]
                made = self.make(few)
                for column in lacking:
                    found[column.key].append(_finite(column, made, few))
            for column in lacking:
                _write(self.store.path(block, column.key), _npy(np.concatenate(found[column.key])))
            self._left.remove(block)
        return True

    def _lacking(self, block: int) -> list[Column]:
        return [column for column in self.columns if not self.store.has(block, column.key)]

    def _report(self, under_way: int) -> None:
        left = sum(len(self.store.block_range(block)) for block in self._left)
        self.show(self.store.number - left + under_way, self.store.number)


def _demand_patience(folder: Path, seconds: float, blocks: int) -> None:
    if seconds > PATIENCE:
        raise PeerError(
            f"{folder}: {blocks} blocks are claimed by other processes, which have finished none for {seconds:.0f} s. "
            "See what became of them; the same command goes on."
        )


@torch.no_grad()
def _finite(column: Column, made: Any, few: Sequence[int]) -> np.ndarray:
    """The column's rows (n, D) float32 on the host."""
    rows = column.compute(made).float().cpu().numpy()
    if not bool(np.isfinite(rows).all()):
        raise NumericError(
            f"{column.name}: not finite for one of the pictures {few[0]} to {few[-1]}: its weights are damaged, or too "
            "large for its precision"
        )
    return rows


def _rows_in(path: Path) -> int:
    """How many rows a block has; 0 if it is missing or damaged."""
    try:
        block = np.load(path, mmap_mode="r")
    except (OSError, EOFError, ValueError):
        return 0
    return len(block) if block.ndim == 2 and block.dtype == np.float32 else 0


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _json(tree: Mapping[str, Any]) -> bytes:
    return (json.dumps(tree, indent=1, sort_keys=True) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    """Put `data` at `path`, never half there; ResourceError where the disk refuses."""
    try:
        with files.published(path) as aside:
            aside.write_bytes(data)
    except OSError as error:
        known = errors.of_place(error)
        reason = known or f"{path}: cannot be written ({error.strerror})"
        raise ResourceError(f"{reason} {len(data)} bytes of features are to be written to {path.parent}.") from error
