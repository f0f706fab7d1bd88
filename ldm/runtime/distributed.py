"""Rank, world size and the few collectives ldm needs; every function is a no-op in a single process.

Only this file and ldm/runtime/fsdp.py import torch.distributed. Before the process group exists (main.py building the
data, a script under torchrun) rank and world size come from the launcher's environment, so that work can be divided
without keeping a collective open.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ldm.errors import LdmError

Result = TypeVar("Result")

_LONG_WORK = 3600.0
"""Seconds that ranks wait for the work of one, such as reading a checkpoint of hundreds of gigabytes."""
_LOST = re.compile(
    # messages of gloo, of the rendezvous store and of NCCL
    r"Connection (closed|reset|refused) by peer|Connection reset|Broken pipe|Timed out (waiting|after)|wait timeout|"
    r"Socket Timeout|failed to recv|ncclRemoteError|NCCL communicator was aborted|collective operation timeout|"
    r"client socket has (failed|timed out)|remote process exited|timeout caused pair closure"
)


_host: tuple[Any, Any] = (None, None)  # the group of all ranks, and the same ranks over their hosts


def _host_group() -> Any:
    """All ranks, over the hosts' sockets: never waits for a device, and a dead rank is noticed at once."""
    global _host
    if _host[0] is not dist.group.WORLD:
        _host = (dist.group.WORLD, dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout() or 0)))
    return _host[1]


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, 0 <= rank < world_size()."""
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


def launched() -> tuple[int, int] | None:
    """(machines, processes on each) where torchrun or srun has started this process; None: unknown."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        each = int(os.environ["LOCAL_WORLD_SIZE"])
        return int(os.environ["WORLD_SIZE"]) // each, each
    if "SLURM_PROCID" in os.environ and "SLURM_NTASKS" in os.environ:
        machines = int(os.environ.get("SLURM_NNODES", "1"))
        return machines, int(os.environ["SLURM_NTASKS"]) // machines
    return None


def is_main() -> bool:
    """True on the one process that writes run files and prints."""
    return rank() == 0


def set_timeout(seconds: float) -> None:
    """Set how long a rank waits for another before it considers it lost, in every existing process group."""
    for group in list(dist.distributed_c10d._world.pg_map) if _grouped() else ():
        dist.set_timeout(timedelta(seconds=seconds), group)


def timeout() -> float | None:
    """Seconds that a rank waits for another before it considers it lost; None for a single process."""
    if not _grouped():
        return None
    return _waits(dist.distributed_c10d._get_default_group()).total_seconds()


def _waits(group: Any) -> timedelta:
    waits: timedelta = group._get_backend(group._device_types[0]).options._timeout
    return waits


def is_lost_peer(error: BaseException) -> bool:
    """Whether the error means that another rank is gone, or has not answered in time."""
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


def max_over_ranks(value: int) -> int:
    """The largest `value` of all ranks; waits for them, but not for a device."""
    if not _grouped():
        return value
    tensor = torch.tensor(value, dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=_host_group())
    return int(tensor)


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The mean of all ranks' `values`, on their device, without making the host wait."""
    if not _grouped():
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of all ranks' `values`, which lie on the CPU: in their own dtype, and the same bits on every rank."""
    if not _grouped():
        return values
    total = values.clone()
    dist.all_reduce(total, group=_host_group())
    return total


@contextmanager
def patience() -> Iterator[None]:
    """Within the block `max_over_ranks` and `from_main` wait up to an hour for a rank, as long as it lives."""
    if not _grouped():
        yield
        return
    group = _host_group()
    waits = _waits(group)
    dist.set_timeout(max(waits, timedelta(seconds=_LONG_WORK)), group)
    try:
        yield
    finally:
        dist.set_timeout(waits, group)


def on_any_machine(asked: Callable[[], bool]) -> bool:
    """Whether it is so on any machine: one process of each asks, and every rank gets the answer (collective).

    For what lies on a disk that the processes of a machine share, and perhaps all machines. Outside of a group of ranks
    each process asks for itself.
    """
    if not _grouped():
        return asked()
    with patience():
        return bool(max_over_ranks(int(_is_first_of_machine() and asked())))


def _is_first_of_machine() -> bool:
    """True on one process of each machine at least."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))) == 0


def from_main(work: Callable[[], Result]) -> Result:
    """What `work` returns on rank 0 alone, on every rank; picklable.

    It may take longer than the others otherwise wait, as long as rank 0 lives.

    Raises:
        LdmError, OSError: that `work` raised; on every rank.
    """
    if not _grouped():
        return work()
    answer: list[Any] = [None, None]
    with patience():
        if is_main():
            try:
                answer[0] = work()
            except (LdmError, OSError) as error:
                answer[1] = error
        dist.broadcast_object_list(answer, group=_host_group())
    if answer[1] is not None:
        raise answer[1]
    result: Result = answer[0]
    return result


def gather(value: Any) -> list[Any]:
    """Every rank's picklable `value`, in rank order, on every rank."""
    if not _grouped():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
