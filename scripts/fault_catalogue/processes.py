"""Processes that faults happen to: forked with the imports done, watched, and ended with all that they started.

A new interpreter needs seconds to import torch; a fork of one that has done so needs milliseconds. `python` does in
such a fork what the interpreter would do for a script, and `Started` lets the launchers (torchrun's agent, Lightning's
own) start their ranks in the same way: as their own children, in sessions of their own, with their environment.
"""

import atexit
import ctypes
import multiprocessing.util
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
Hook = Callable[[], None]

_PR_SET_CHILD_SUBREAPER = 36
_hook: Hook | None = None


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
        demand(wait_until(lambda: self.code is not None, seconds), f"still alive after {seconds:.0f} s")
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

    def output(self) -> str:
        return self.log.read_text(errors="replace")


def fork(work: Callable[[], None], log: Path) -> Child:
    """Do `work` in a fork of this process, in a process group of its own; its output goes to `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _leave_with(lambda: (os.setpgid(0, 0), _redirect(log), work()))
    with suppress(OSError):  # whoever of the two comes first
        os.setpgid(pid, pid)
    return Child(pid, log)


def python(
    script: Path, words: Sequence[str], environment: Mapping[str, str] | None = None, hook: Hook | None = None
) -> None:
    """Be `python script words` from here on, but for the libraries' imports, which this process has done already.

    Args:
        script: file to run as `__main__`.
        words: its arguments.
        environment: additional variables.
        hook: done first, here and in every rank that a launcher starts from here: what is to go wrong.
    """
    _become([str(script), *words], environment, hook)
    sys.path.insert(0, str(script.parent))
    if hook is not None:
        hook()
    runpy.run_path(str(script), run_name="__main__")


def torchrun(
    options: Sequence[str], words: Sequence[str], environment: Mapping[str, str] | None = None, hook: Hook | None = None
) -> None:
    """Be torchrun's agent from here on, with `options`; its ranks run the script `words`, with the hook."""
    from torch.distributed.run import main

    _become(["torchrun", *options, *words], environment, hook)
    main(sys.argv[1:])


def _become(line: list[str], environment: Mapping[str, str] | None, hook: Hook | None) -> None:
    global _hook
    _hook = hook
    _warm_launchers()
    atexit.register(multiprocessing.util._exit_function)  # as its import does, which was made before the fork
    os.environ.update(environment or {})
    sys.argv = line


class Started:
    """What launchers use of `subprocess.Popen`, starting `[python, (-u,) script, *words]` by a fork."""

    def __init__(
        self,
        args: Sequence[str],
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdout: Any = None,
        stderr: Any = None,
        start_new_session: bool = False,
    ) -> None:
        place = next(index for index, word in enumerate(args) if word.endswith(".py"))
        script, words = Path(args[place]), list(args[place + 1 :])
        self.args = args
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            if start_new_session:
                os.setsid()
            for number, file in ((1, stdout), (2, stderr)):
                if file is not None:
                    os.dup2(file.fileno(), number)
            _leave_with(lambda: _as_new_interpreter(script, words, dict(os.environ if env is None else env), cwd))

    def poll(self) -> int | None:
        if self.returncode is None:
            with suppress(ChildProcessError):
                found, status = os.waitpid(self.pid, os.WNOHANG)
                if found:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() >= end:
                raise subprocess.TimeoutExpired(list(self.args), timeout or 0.0)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _warm_launchers() -> None:
    """Let the launchers of this process start their ranks by `Started`."""
    from pytorch_lightning.strategies.launchers import subprocess_script
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    class Module:
        Popen = Started

    vars(subprocess_script)["subprocess"] = Module
    vars(subprocess_handler)["Popen"] = Started


def _as_new_interpreter(script: Path, words: list[str], environment: dict[str, str], cwd: str | None) -> None:
    """Leave behind what a fork has from the launcher and a new interpreter would not have."""
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.closerange(3, 1024)
    os.environ.clear()
    if cwd:
        os.chdir(cwd)
    for name in [name for name in sys.modules if name.split(".")[0] in ("ldm", "main")]:
        del sys.modules[name]
    python(script, words, environment, _hook)


def _leave_with(work: Callable[[], Any]) -> NoReturn:
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
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))


def wait_until(condition: Callable[[], object], seconds: float) -> bool:
    """Whether the condition came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(0.01)
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
