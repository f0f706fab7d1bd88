"""What processes do with signals: the main process notes that it should stop, loader workers take no notice."""

import os
import signal
import sys
import threading
import time
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""The polite requests to stop: of schedulers, launchers, terminals and people."""

_PATIENCE = 3  # so many requests end the process at once
_SAME_REQUEST = 1.0  # seconds: torchrun passes on what the process group has received already


class Stopped(SystemExit):
    """The run stopped because of a signal, after a good save; left alone, the process exits with 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class Listener:
    """Notes the first signal that asks to stop; whoever does the work looks at `received` where stopping is safe.

    Attributes:
        received: the signal's number, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._requests = 0
        self._last = 0.0

    def install(self) -> None:
        """Handle the signals of `STOPPING` from now on, in place of whoever did.

        Two are left as they are: a SIGUSR that already has a handler (Lightning's, which saves and requeues under
        SLURM), and a SIGHUP that is ignored (nohup).
        """
        for number in STOPPING:
            current = signal.getsignal(number)
            requeues = number in (signal.SIGUSR1, signal.SIGUSR2) and callable(current)
            if not requeues and not (number == signal.SIGHUP and current is signal.SIG_IGN):
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Nothing more than a note: the main thread may be in the middle of a collective, or of a save.
        now = time.monotonic()
        if self._requests and now - self._last < _SAME_REQUEST:
            return
        self._last = now
        self._requests += 1
        name = signal.Signals(number).name
        if self._requests == 1:
            self.received = number
            _say(f"{name}: stopping after this step, with a checkpoint (twice more: stop at once)")
        elif self._requests >= _PATIENCE:
            _say(f"{name}: stopping at once; the last checkpoint stands")
            os._exit(128 + number)


def ignore_in_worker(worker_id: int) -> None:
    """A DataLoader's `worker_init_fn`: leave every request to stop to the main process.

    A signal to the process group would otherwise kill the workers first, and the main process would end with
    "worker exited unexpectedly" instead of saving. Only the parent's own SIGTERM ends a worker: with it
    multiprocessing clears up at exit, and then waits for ever for a worker that takes no notice.
    """
    for number in STOPPING:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere nobody can tell who sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_for, args=(os.getppid(),), daemon=True).start()


def _end_for(parent: int) -> None:
    """Exit when `parent` asks to; swallow the same request from anyone else."""
    while sys.platform == "linux" and signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)


def _say(text: str) -> None:
    # print() may not be called again from within itself, as a handler might.
    os.write(2, f"\n{text}\n".encode())
