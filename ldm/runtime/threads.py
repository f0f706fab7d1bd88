"""How many threads a process computes with on the CPU, and how they wait for each other.

The OpenMP library reads this from the environment when it is loaded, so it has to be there before torch is imported;
the ranks and workers that a process starts inherit it. What the user has set stays.
"""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")

_SPIN = "1000"
"""Turns that a thread of libgomp (torch's on Linux) waits actively before it sleeps, some ten microseconds.

By default it is milliseconds: when another process takes a core, the threads that have one spend them waiting for the
one that has none, and training slows down to a tenth. With none at all each parallel loop pays for waking its threads.
"""


_CHOSEN = "LDM_THREADS"
"""In the environment: the number of threads that was chosen here, not by the user."""


def prepare() -> None:
    """Set the environment of this process and of those it will start."""
    if not any(name in os.environ for name in _WAITING):
        os.environ["GOMP_SPINCOUNT"] = _SPIN
    quota = cpu_quota()
    if "OMP_NUM_THREADS" not in os.environ and quota is not None and quota < affinity():
        os.environ["OMP_NUM_THREADS"] = os.environ[_CHOSEN] = str(max(1, math.floor(quota)))


def share(processes: int) -> None:
    """Share a number of threads that `prepare` has chosen among so many ranks of this machine, in each of them alike.

    Where there is no limit Lightning shares out the machine's processors by itself.
    """
    if _CHOSEN not in os.environ:
        return
    import torch  # late: nothing here may load it before the environment is set

    threads = max(1, int(os.environ[_CHOSEN]) // processes)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def affinity() -> int:
    """Processors that this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Processors' worth of time that the kernel grants (a container's limit); None: no limit.

    The OpenMP library sees a machine's processors, not this limit, and would start a thread for each of them.
    """
    return min(_quotas(root, own), default=None)


def _quotas(root: Path, own: Path) -> Iterator[float]:
    """The limits of this process' control group and of those around it (cgroup v2 and v1)."""
    with suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            mount = root / controllers if controllers else root
            group = mount / path.strip("/")
            for folder in (group, *group.parents):
                if not folder.is_relative_to(mount):
                    break
                yield from _quota(folder)


def _quota(folder: Path) -> Iterator[float]:
    with suppress(OSError, ValueError):  # no such file here, or "max": no limit
        time, period = (folder / "cpu.max").read_text().split()
        yield int(time) / int(period)
    with suppress(OSError, ValueError):
        time, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if int(time) > 0:
            yield int(time) / int(period)
