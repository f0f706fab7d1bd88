"""Programs without their start-up time: a fork of a process with the imports done, made to look like a new interpreter.

A new interpreter needs seconds to import torch, a fork milliseconds. `python` does in such a fork what the interpreter
would do for a script, and `Started` lets the launchers (torchrun's agent, Lightning's own) start their ranks in the
same way: as their own children, in sessions of their own, with their environment.
"""

import atexit
import logging
import multiprocessing.util
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from scripts.faults.processes import leave_with

ROOT = Path(__file__).parents[2]
Hook = Callable[[], None]

_hook: Hook | None = None


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
    atexit.register(vars(multiprocessing.util)["_exit_function"])  # as its import does, made before the fork
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
            leave_with(lambda: as_new_interpreter(script, words, dict(os.environ if env is None else env), cwd))

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


def as_new_interpreter(
    script: Path, words: Sequence[str], environment: Mapping[str, str], cwd: str | None = None
) -> None:
    """`python` without what a fork has from its parent and a new interpreter would not have."""
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
    for logger in logging.root.manager.loggerDict.values():
        for handler in logger.handlers if isinstance(logger, logging.Logger) else ():
            if type(handler) is logging.StreamHandler:
                handler.stream = sys.stderr  # Not by setStream, which flushes the parent's: that may be closed.
    python(script, words, environment, _hook)
