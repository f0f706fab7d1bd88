"""Faults tried each in a process of its own, several at a time, which leave nothing behind however they end."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from scripts.faults import processes
from scripts.faults.harness import Fault, Figures, Result, attempt, reported
from scripts.faults.processes import Child


class Attempt:
    """A fault being tried in a process of its own, which is the parent of all that the fault starts."""

    def __init__(self, fault: Fault, folder: Path, lab: Path, figures: Figures) -> None:
        self.fault = fault
        self.folder = folder
        self.began = time.monotonic()
        folder.mkdir(parents=True)

        def work() -> None:
            processes.adopt_orphans()
            os.chdir(folder)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(number, signal.SIG_DFL)  # whatever nohup or a shell has made of them
            signal.signal(signal.SIGINT, signal.default_int_handler)
            result = attempt(fault, folder / "scratch", lab, figures)
            processes.end_descendants(os.getpid())
            (folder / "result.tmp").write_text(json.dumps(asdict(result)))
            (folder / "result.tmp").rename(folder / "result.json")

        self.child: Child = processes.fork(work, folder / "log")

    @property
    def count(self) -> str:
        """How many trials have passed so far."""
        with suppress(OSError):
            return (self.folder / "scratch" / "count").read_text()
        return ""

    def result(self) -> Result | None:
        """What came of it; None while it is under way."""
        seconds = time.monotonic() - self.began
        if self.child.code is None and seconds < self.fault.limit:
            return None
        late = self.child.code is None
        self.end()
        with suppress(OSError):
            return Result.from_dict(json.loads((self.folder / "result.json").read_text()))
        why = f"not done after {self.fault.limit:.0f} s" if late else f"its process ended with {self.child.code}"
        return reported(self.fault, "fail", f"{why}; {self.count} trials passed", 0, 0, seconds, [])

    def end(self) -> None:
        """Kill it, with everything below it."""
        if self.child.code is None:
            self.child.send(signal.SIGSTOP)  # so that it starts nothing more; orphans still fall to it
            processes.end_descendants(self.child.pid)
            self.child.send(signal.SIGKILL)
            self.child.wait(30)


def run_all(
    faults: Sequence[Fault], folder: Path, figures: Figures, jobs: int, watch: Callable[[Sequence[Attempt]], None]
) -> Iterator[Result]:
    """Try the faults, several at a time, and give each result as it comes.

    Args:
        folder: holds `lab`; for scratch folders, of which that of a fault that is passed is removed.
        watch: called often with what is under way.
    """
    waiting, under_way = list(faults), list[Attempt]()
    try:
        while waiting or under_way:
            while waiting and len(under_way) < jobs:
                next_one = waiting.pop(0)
                under_way.append(Attempt(next_one, folder / str(next_one.number), folder / "lab", figures))
            for one in list(under_way):
                if result := one.result():
                    under_way.remove(one)
                    if result.verdict == "pass":
                        shutil.rmtree(one.folder, ignore_errors=True)
                    yield result
            watch(under_way)
            time.sleep(0.1)
    finally:
        for one in under_way:
            one.end()
