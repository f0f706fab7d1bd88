"""Processes that faults happen to: forked, watched, and ended with all that they have started."""

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

_PR_SET_CHILD_SUBREAPER = 36


class Wrong(Exception):
    """Something was not as a run promises it."""


def demand(condition: object, text: str) -> None:
    """Raise Wrong with `text` unless the condition holds."""
    if not condition:
        raise Wrong(text)


def adopt_orphans() -> None:
    """From now on processes whose parent dies become children of this one, so that none is lost sight of."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Child:
    """A process started by this one.

    Attributes:
        pid: its id; also of its process group.
        log: the file that holds what it printed.
    """

    def __init__(self, pid: int, log: Path) -> None:
        self.pid = pid
        self.log = log
        self._code: int | None = None

    @property
    def code(self) -> int | None:
        """Its exit code (negative: the signal it died of), or None while it lives."""
        if self._code is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def wait(self, seconds: float) -> int:
        """Its exit code. Raises Wrong if it lives for longer than so many seconds."""
        demand(self.ended(seconds), f"still alive after {seconds:.0f} s")
        assert self._code is not None
        return self._code

    def send(self, number: int) -> None:
        """Send it a signal."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def send_group(self, number: int) -> None:
        """Send a signal to its process group."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def ended(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        return wait_until(lambda: self.code is not None, seconds)

    def says(self, text: str, seconds: float) -> bool:
        """Whether it prints this within so many seconds."""
        return wait_until(lambda: text in self.output(), seconds)

    def output(self) -> str:
        return self.log.read_text(errors="replace")


def fork(work: Callable[[], None], log: Path) -> Child:
    """Do `work` in a fork of this process, in a process group of its own; its output goes to `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    log.touch()  # here, since the fork may be killed before it does anything
    pid = os.fork()
    if pid == 0:

        def all_of_it() -> None:
            os.setpgid(0, 0)
            _redirect(log)
            work()

        leave_with(all_of_it)
    with suppress(OSError):  # whoever of the two comes first
        os.setpgid(pid, pid)
    return Child(pid, log)


def leave_with(work: Callable[[], Any]) -> NoReturn:
    """Do `work` and leave as an interpreter would, with its exit code, but without what this one would clear up."""
    code = 1
    atexit._clear()
    try:
        try:
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code & 0xFF)


def _redirect(log: Path) -> None:
    for source, flags, numbers in ((Path(os.devnull), os.O_RDONLY, (0,)), (log, os.O_WRONLY | os.O_CREAT, (1, 2))):
        handle = os.open(source, flags | os.O_APPEND, 0o644)
        for number in numbers:
            os.dup2(handle, number)
        os.close(handle)
    # As an interpreter opens them: stderr takes every text, also a path that is not UTF-8.
    for number, name, errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):
        setattr(sys, name, os.fdopen(number, "w", buffering=1, errors=errors, closefd=False))


def wait_until(condition: Callable[[], object], seconds: float, every: float = 0.01) -> bool:
    """Whether the condition came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(every)
    return True


def descendants(pid: int) -> list[int]:
    """All living processes that descend from `pid`, without itself."""
    children: dict[int, list[int]] = {}
    for child, parent in _living():
        children.setdefault(parent, []).append(child)
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def children(pid: int) -> list[int]:
    """The living children of `pid`, in the order of their ids."""
    return sorted(child for child, parent in _living() if parent == pid)


def _living() -> Iterator[tuple[int, int]]:
    """(id, parent's id) of every process that is no zombie."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                state, parent = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    yield int(entry), int(parent)


def end_descendants(pid: int) -> None:
    """Kill everything that descends from `pid`, which has to be a process that adopts orphans."""
    for _ in range(100):
        found = descendants(pid)
        for child in found:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        if not found:
            return
        time.sleep(0.01)


@contextmanager
def ended_afterwards() -> Iterator[None]:
    """Nothing that this process has started within the block is alive after it."""
    try:
        yield
    finally:
        end_descendants(os.getpid())
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
