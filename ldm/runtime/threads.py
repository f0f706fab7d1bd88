"""How many CPU threads a process computes with, and how they wait for each other.

The OpenMP library reads this from the environment when it is loaded, so it must be set before torch is imported;
the ranks and workers that a process starts inherit it. Values set by the user are kept.
"""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")

_SPIN = "20000"
"""Iterations for which a thread of libgomp (torch's on Linux) spins before it sleeps, up to a millisecond.

The default is ten milliseconds and more: when another process takes a core, the other threads spend them spinning for
the one without a core, and training becomes ten times slower. With much less each parallel loop pays for waking
threads, which takes as long as the loop on some virtual machines (docs/scale.md has figures).
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
    """Divide the number of threads that `prepare` has chosen equally among this many ranks of this machine.

    If there is no limit, Lightning divides the machine's processors itself.
    """
    if _CHOSEN not in os.environ:
        return
    import torch  # imported late: nothing here may load it before the environment is set

    threads = max(1, int(os.environ[_CHOSEN]) // processes)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def affinity() -> int:
    """Processors that this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """The CPU quota in processors (a container's limit); None: no limit.

    The OpenMP library sees the machine's processors, not this limit, and would start a thread for each of them.
    """
    return min(_quotas(root, own), default=None)


def _quotas(root: Path, own: Path) -> Iterator[float]:
    """The limits of this process's control group and its ancestors (cgroup v2 and v1)."""
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
