"""A side's process as one of several ranks: with what torchrun would put into its environment, and one thread."""

import os
from typing import NamedTuple

import torch


class Rank(NamedTuple):
    """A rank of `world` on this machine, which meet at `port`."""

    number: int
    world: int
    port: int


def launched(rank: Rank) -> None:
    """Make this process that rank; one that is alone has no launcher."""
    torch.set_num_threads(1)
    if rank.world == 1:
        return
    number, world = str(rank.number), str(rank.world)
    os.environ |= {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "bench"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(rank.port)}
