"""What two processes can send to one another: the collectives of DDP and FSDP2, alone."""

from collections.abc import Iterator
from itertools import cycle

import torch
import torch.distributed as dist

from scripts.bench.child import Built, Place
from scripts.bench.sides.launched import Rank, launched

FLOAT = 4


def collectives(sizes: tuple[int, ...], rank: Rank, place: Place) -> Built:
    """At each turn one of `kinds()` at one of the sizes (bytes, of the whole tensor), in that order, over and over."""
    launched(rank)

    def train(turns: Iterator[None]) -> None:
        dist.init_process_group("gloo")
        wholes = {size: torch.ones(size // FLOAT) for size in sizes}
        parts = {size: torch.ones(size // FLOAT // rank.world) for size in sizes}
        try:
            for _, (kind, size) in zip(turns, cycle(kinds(sizes)), strict=False):
                whole, part = wholes[size], parts[size]
                if kind == "all-reduce":
                    dist.all_reduce(whole)
                elif kind == "all-gather":
                    dist.all_gather_into_tensor(whole, part)
                else:
                    dist.reduce_scatter_tensor(part, whole)
        finally:
            dist.destroy_process_group()

    return Built(0, train)


def kinds(sizes: tuple[int, ...]) -> list[tuple[str, int]]:
    """(collective, bytes) in the order of the turns."""
    return [(kind, size) for size in sizes for kind in ("all-reduce", "all-gather", "reduce-scatter")]
