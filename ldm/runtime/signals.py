"""How processes handle signals: a run records that it should stop and does so when it is safe; workers ignore them.

What a run then does, on all ranks after a step, is in ldm/training/callbacks/stop.py.

Handlers belong to the process, and so does the state here. A handler only sets a flag, since the main thread may be in
the middle of a collective or of a save. A thread is notified of each signal at once, even while the main thread is
inside a library call that may never return: it informs the user, and ends the process at the third request.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ldm.runtime import launcher

if sys.platform == "win32":  # which has neither these signals nor the locks of run folders and caches
    raise SystemExit("ldm runs on Linux and macOS; on Windows run it inside of WSL 2 (README.md, Platforms)")

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""The polite requests to stop: of schedulers, launchers, terminals and people."""

_PATIENCE = 3  # so many requests end the process at once
_SAME_REQUEST = 1.0  # seconds: torchrun forwards what the process group has already received


class Stopped(SystemExit):
    """The run stopped on a signal, with nothing lost; unless caught, the process exits with 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class _Listener:
    """Handlers of the signals in `STOPPING`, and the thread that is notified of them; removed by `close`."""

    def __init__(self) -> None:
        self.received = 0
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        # Ignored signals stay ignored, as nohup requires.
        before = {number: signal.getsignal(number) for number in STOPPING}
        self._before: dict[signal.Signals, Any] = {
            number: handler for number, handler in before.items() if handler is not signal.SIG_IGN
        }
        for number in self._before:
            signal.signal(number, self._note)
        threading.Thread(target=self._hear, args=(self._pipe[0],), name="signals", daemon=True).start()

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(self._pipe[1])  # the thread reads end-of-file, and exits

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    def _hear(self, pipe: int) -> None:
        requests, last = 0, 0.0
        while numbers := os.read(pipe, 1):
            number = numbers[0]
            if number not in STOPPING or (requests and time.monotonic() - last < _SAME_REQUEST):
                continue
            last = time.monotonic()
            requests += 1
            name = signal.Signals(number).name
            if requests == 1:
                _say(f"{name}: stopping at the next safe place (twice more: stop at once)")
                if launcher.has_launching_parent():
                    os.kill(os.getppid(), number)  # it decides for all
            elif requests >= _PATIENCE:
                _say(f"{name}: stopping at once; the last checkpoint stands")
                os._exit(128 + number)
        os.close(pipe)


_listener: _Listener | None = None


def listen() -> bool:
    """From now on the signals in `STOPPING` are requests to stop; False: they already were.

    Call it from the main thread, as early as possible.
    """
    global _listener
    if _listener is not None:
        return False
    _listener = _Listener()
    return True


def listen_no_more() -> None:
    """Restore the handlers from before `listen`, and forget what was received."""
    global _listener
    if _listener is not None:
        _listener.close()
        _listener = None


def received() -> int:
    """The number of the first request to stop, or 0."""
    return 0 if _listener is None else _listener.received


def stop_if_asked() -> None:
    """Exit on request, at a point where nothing is lost and no other rank has to agree.

    A rank that was started by another one must stay until that one exits, which would otherwise report a lost rank.

    Raises:
        Stopped: a stop was requested.
    """
    if received() and not launcher.has_launching_parent():
        raise Stopped(received())


def _forget_in_child() -> None:
    # A forked child must not write into its parent's pipe. It keeps the handlers, whose flag nothing reads there: a
    # signal to the whole group is for the parent to handle, until the child has its own handlers.
    global _listener
    if _listener is not None:
        signal.set_wakeup_fd(-1)
        _listener = None


os.register_at_fork(after_in_child=_forget_in_child)


@contextmanager
def held_back() -> Iterator[None]:
    """Block SIGTERM within the block; a process started there receives none until it unblocks it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_in_worker(worker_id: int) -> None:
    """A DataLoader's `worker_init_fn`: leave every request to stop to the main process, and die with it.

    A signal to the process group would otherwise kill the workers first, and the main process would fail with
    "worker exited unexpectedly" instead of saving. Only the parent's own SIGTERM ends a worker: multiprocessing sends
    it at exit, and then would wait forever for a worker that ignores it.
    """
    launcher.die_with_parent()
    for number in STOPPING:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere the sender is unknown
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_for, args=(os.getppid(),), daemon=True).start()


def _end_for(parent: int) -> None:
    """Exit if `parent` sends the signal; ignore it from any other process."""
    while sys.platform == "linux" and signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)


def _say(text: str) -> None:
    # Not by print(), which the main thread may be in the middle of.
    os.write(2, f"\n{text}\n".encode())
