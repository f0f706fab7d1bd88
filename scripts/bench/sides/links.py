"""What two processes can send to one another: the collectives of DDP and FSDP2, alone."""

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from scripts.bench.child import Built, Place
from scripts.bench.sides.launched import Rank, launched

FLOAT = 4


class Collective(NamedTuple):
    """One of a tensor that is there as a whole on each rank, before it or after it.

    Attributes:
        passes: how often the bytes that a rank lacks are sent.
        run: (the whole tensor, this rank's part of it) -> one of them is filled.
    """

    name: str
    passes: int
    run: Callable[[Tensor, Tensor], object]


ALL_REDUCE = Collective("all-reduce", 2, lambda whole, part: dist.all_reduce(whole))
ALL_GATHER = Collective("all-gather", 1, dist.all_gather_into_tensor)
REDUCE_SCATTER = Collective("reduce-scatter", 1, lambda whole, part: dist.reduce_scatter_tensor(part, whole))
COLLECTIVES = (ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER)


def turns(sizes: tuple[int, ...]) -> list[tuple[Collective, int]]:
    """(collective, bytes of the whole tensor), one for each turn, over and over."""
    return [(one, size) for size in sizes for one in COLLECTIVES]


def collectives(sizes: tuple[int, ...], rank: Rank, place: Place) -> Built:
    """At each turn the next of `turns(sizes)`."""
    launched(rank)

    def train(asked: Iterator[None]) -> None:
        dist.init_process_group("gloo")
        wholes = {size: torch.ones(size // FLOAT) for size in sizes}
        parts = {size: torch.ones(size // FLOAT // rank.world) for size in sizes}
        try:
            for _, (one, size) in zip(asked, cycle(turns(sizes)), strict=False):
                one.run(wholes[size], parts[size])
        finally:
            dist.destroy_process_group()

    return Built(0, train)
