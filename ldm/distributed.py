"""Rank, world size and the few collectives ldm needs; every function is a no-op when the process is alone.

The only file that imports torch.distributed. Before the process group exists (main.py building the data, a
script under torchrun) rank and world size come from the launcher's environment, so that work can be shared
out without holding a collective open.
"""

import os
from typing import Any

import torch
import torch.distributed as dist


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process' number, 0 <= rank < world_size()."""
    if _grouped():
        return dist.get_rank()
    if world_size() == 1:
        return 0
    # torchrun sets RANK, srun SLURM_PROCID; Lightning's own launcher (one node) only LOCAL_RANK.
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return int(next((os.environ[name] for name in names if name in os.environ), "0"))


def world_size() -> int:
    """How many processes train together (1 alone)."""
    if _grouped():
        return dist.get_world_size()
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return int(os.environ.get("SLURM_NTASKS", "1") if "SLURM_PROCID" in os.environ else 1)


def is_main() -> bool:
    """True on the one process that writes run files and prints."""
    return rank() == 0


def max_over_ranks(value: int, device: torch.device | str = "cpu") -> int:
    """The largest `value` of all ranks; reads it back, so it waits for the device."""
    if not _grouped():
        return value
    tensor = torch.tensor(value, device=device, dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def gather(value: Any) -> list[Any]:
    """Every rank's picklable `value`, in rank order, on every rank."""
    if not _grouped():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every rank has come here."""
    if _grouped():
        dist.barrier()
