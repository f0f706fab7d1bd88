"""What every program of ldm does around its own work: listen for signals, exit with its launcher, exit quickly."""

import io
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from ldm import errors
from ldm.errors import LdmError, PeerError
from ldm.runtime import allocator, launcher, signals, slurm, threads
from ldm.runtime.signals import Stopped


def run(main: Callable[[], int]) -> NoReturn:
    """Do `main` as the work of this process, and exit with the code that it returns.

    A program that SLURM has warned (SIGUSR1) requeues its job, once it has stopped with nothing lost.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: a path need not be UTF-8
    threads.prepare()
    allocator.keep_freed_memory()
    signals.listen()
    launcher.tie_to_starter()
    code = _done(main)
    if code == 128 + signal.SIGUSR1 and (job := slurm.job()) is not None:
        from ldm.runtime import distributed

        if distributed.is_main():
            slurm.requeue(job)
    if code == PeerError.exit_code:
        launcher.end_stopped()
    launcher.leave(code)


def answer(
    work: Callable[[], int | None],
    examine: Callable[[], None] | None = None,
    memory: str = "Take a device, or a machine, that has more.",
) -> int:
    """The exit code of a program's `work`: what it returns (None: 0), or an LdmError's, which is reported in one line.

    A place that cannot be written to (a file where a folder is needed, a full disk) counts as one, and so does
    exhausted memory.

    Args:
        examine: called before an error is reported, while it is being handled.
        memory: what helps where there is too little of it.
    """
    try:
        return work() or 0
    except (LdmError, OSError, MemoryError, RuntimeError) as error:
        known = _known(error, memory)
        if known is None:
            raise
        if examine is not None:
            examine()
        print(f"error: {known}", file=sys.stderr)
        return known.exit_code


def _known(error: Exception, memory: str) -> LdmError | None:
    """The error as one that the user can fix; None: it is a bug."""
    if isinstance(error, LdmError):
        return error
    if isinstance(error, OSError):
        return errors.of_place(error)
    from ldm.runtime.memory import exhausted, explained  # they import torch, which no wrong flag waits for

    return explained(error, memory) if exhausted(error) else None


def _done(main: Callable[[], int]) -> int:
    try:
        return main()
    except Stopped as stopped:
        print(f"stopped by {stopped.signal.name}; nothing is lost, the same command goes on", file=sys.stderr)
        return 128 + stopped.signal
    except SystemExit as end:  # of --help
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
