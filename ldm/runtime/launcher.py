"""The processes of one run on one machine: none outlives the others, and none takes long to exit.

A rank process was started by torchrun, by SLURM, by hand, or by rank 0 itself (Lightning's own launcher). torchrun's
workers and rank 0's children die with the process that started them, however that dies.
"""

import atexit
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from ldm.errors import PeerError
from ldm.ranges import NotNegative

_STARTER = "LDM_STARTER"
"""Environment variable of rank 0's children: the id of the process that they belong to."""

_AGENT = "TORCHELASTIC_RUN_ID"
_PR_SET_PDEATHSIG = 1


def tie_to_starter() -> None:
    """Called when main.py starts: die with the launcher, or make this process known to the ranks it will start."""
    if _AGENT in os.environ:
        die_with_parent()
    elif has_launching_parent():
        die_with_parent(int(os.environ[_STARTER]))
    else:
        os.environ[_STARTER] = str(os.getpid())


def has_launching_parent() -> bool:
    """Whether this process is a rank that was started by rank 0."""
    return _STARTER in os.environ and _AGENT not in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent dies (Linux; elsewhere nothing happens).

    Args:
        parent: the parent's id, if known: the parent may have died before this was called.
    """
    if sys.platform != "linux":
        return
    parent = parent or os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


class Watch:
    """Ends this process if a rank that it has started is gone and it does not notice by itself.

    A dead peer is noticed at once if sockets connect the ranks, but not by every device's communication library.

    Args:
        children: the ranks.
        report: called with the reason before this process exits, in another thread.
        grace: seconds between a child's death and the exit.
    """

    def __init__(
        self, children: Sequence[subprocess.Popen[bytes]], report: Callable[[str], None], grace: NotNegative = 8.0
    ) -> None:
        self._children = children
        self._report = report
        self._grace = grace
        self._over = threading.Event()
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def close(self) -> None:
        """From now on the children may exit."""
        self._over.set()

    def _look(self) -> None:
        while not self._over.wait(0.5):
            # No rank exits with 0, or because of a signal, without all the others.
            gone = [child for child in self._children if child.poll() is not None and 0 != child.returncode < 128]
            if gone and not self._over.wait(self._grace):
                self._report(f"the rank with process id {gone[0].pid} ended with {gone[0].returncode}")
                os._exit(PeerError.exit_code)


def end_children(children: Sequence[subprocess.Popen[bytes]], seconds: float = 3.0) -> None:
    """Wait for the ranks that this process has started; kill those still alive after `seconds`."""
    deadline = time.monotonic() + seconds
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()


def end_stopped() -> None:
    """After a peer timed out: end the ranks of this machine that will never answer because they are suspended.

    torchrun would wait half a minute for its workers; nothing waits for a suspended rank 0 of Lightning's launcher.
    """
    if has_launching_parent():
        suspects = [os.getppid()]
    elif _AGENT in os.environ:
        suspects = [*_siblings()]
    else:
        return
    for rank in suspects:
        if _state(rank) == "T":
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)


def leave(code: int) -> NoReturn:
    """Exit now, running exit hooks, but without the seconds that libraries take to free memory.

    It also does not wait in the destructor of a process group whose other ranks are gone.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _siblings() -> Iterator[int]:
    """The other processes that this one's parent has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            # pid (name) state ppid ...; the name may hold anything.
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getppid() and folder.name != str(os.getpid()):
                yield int(folder.name)


def _state(process: int) -> str:
    """One letter, T if the process is suspended; empty if it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    return ""
