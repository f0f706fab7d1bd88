"""What every fault shares: how it is declared, tried in a process of its own, counted, and told.

A fault is a function of a `Place`. Its docstring says what is injected and, after "Expected:", what has to follow. It
makes trials (`with place.trial("..."):` around code that raises `Wrong` where a run breaks its promise) and returns a
remark on what was observed. The counts, not the function, decide whether the fault is passed.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from inspect import cleandoc
from pathlib import Path
from typing import TypeVar

from scripts.fault_catalogue import processes
from scripts.fault_catalogue.processes import Child, Wrong

Body = Callable[["Place"], str]
Item = TypeVar("Item")


class NotTried(Exception):
    """This machine cannot show it; the message says why."""


@dataclass(frozen=True)
class Fault:
    """One entry of the catalogue.

    Attributes:
        number: in the catalogue.
        name: a few words.
        injected, expected: a sentence each, from the docstring of `body`.
        body: makes the trials.
        limit: seconds after which it has failed, whatever it says.
    """

    number: int
    name: str
    injected: str
    expected: str
    body: Body
    limit: float


@dataclass(frozen=True)
class Result:
    """What came of a fault.

    Attributes:
        verdict: "pass", "fail" or "not tried".
        observed: what was seen, or why nothing was.
        passed, tried: trials.
        seconds: of the clock.
        failures: trials that went wrong, each with what was wrong.
    """

    number: int
    name: str
    injected: str
    expected: str
    verdict: str
    observed: str
    passed: int
    tried: int
    seconds: float
    failures: tuple[str, ...] = ()


CATALOGUE: dict[int, Fault] = {}


def fault(number: int, name: str, limit: float = 900.0) -> Callable[[Body], Body]:
    """Enter a function into the catalogue."""

    def enter(body: Body) -> Body:
        if number in CATALOGUE:
            raise ValueError(f"fault {number} is there twice: {CATALOGUE[number].name} and {name}")
        injected, found, expected = cleandoc(body.__doc__ or "").partition("Expected: ")
        if not found:
            raise ValueError(f"fault {number}: the docstring of {body.__name__} says nothing after 'Expected: '")
        CATALOGUE[number] = Fault(number, name, _line(injected), _line(expected), body, limit)
        return body

    return enter


def chosen(words: Sequence[str]) -> list[Fault]:
    """The faults that numbers, or parts of names, mean; all of them for no words at all. KeyError names a bad word."""
    found: dict[int, Fault] = {}
    for word in words:
        meant = [f for f in CATALOGUE.values() if word == str(f.number) or (not word.isdigit() and word in f.name)]
        if not meant:
            raise KeyError(f"no fault has the number or the name {word!r}; --list shows them")
        found |= {f.number: f for f in meant}
    return sorted(found.values() if words else CATALOGUE.values(), key=lambda f: f.number)


class Place:
    """Where one fault is tried: a scratch folder, the counts, and what all faults share.

    Attributes:
        folder: scratch, empty, on the disk of the temporary folder.
        lab: what tiny.prepare made for all faults, to be read only.
        quick: a sample instead of the full figures.
        random: seeded by the fault's number.
    """

    def __init__(self, fault: Fault, folder: Path, lab: Path, quick: bool) -> None:
        self.folder = folder
        self.lab = lab
        self.quick = quick
        self.random = random.Random(fault.number)
        self.passed = 0
        self.tried = 0
        self.failures: list[str] = []

    def count(self, full: int, quick: int) -> int:
        """How many times: the catalogue's figure, or a sample."""
        return quick if self.quick else full

    def some(self, items: Iterable[Item], quick: int) -> list[Item]:
        """All of them, or the first so many as a sample."""
        return list(items)[: quick if self.quick else None]

    def new(self, name: str) -> Path:
        """A new folder whose name begins with `name`, which every user may read."""
        folder = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=self.folder))
        folder.chmod(0o755)
        return folder

    @contextmanager
    def trial(self, name: str) -> Iterator[None]:
        """Count the block as one trial; whatever it raises makes it a failed one. Ends what it has started."""
        self.tried += 1
        try:
            with processes.ended_afterwards():
                yield
            self.passed += 1
        except NotTried:
            self.tried -= 1
            raise
        except Wrong as wrong:
            self.failures.append(f"{name}: {wrong}")
        except Exception as error:
            traceback.print_exc()
            self.failures.append(f"{name}: {type(error).__name__}: {error}")
        finally:
            (self.folder / "count").write_text(f"{self.passed} of {self.tried}")


def attempt(fault: Fault, folder: Path, lab: Path, quick: bool) -> Result:
    """Try one fault here and now."""
    folder.mkdir(parents=True, exist_ok=True)
    place = Place(fault, folder, lab, quick)
    began = time.monotonic()
    try:
        remark, verdict = fault.body(place), None
    except NotTried as reason:
        remark, verdict = str(reason), "not tried"
    except Exception as error:
        traceback.print_exc()
        remark, verdict = f"{type(error).__name__}: {error}", "fail"
    if verdict is None:
        verdict = "pass" if place.tried and place.passed == place.tried else "fail"
    return _result(fault, verdict, remark, place.passed, place.tried, time.monotonic() - began, place.failures)


class Attempt:
    """A fault being tried in a process of its own, which is the parent of all that the fault starts."""

    def __init__(self, fault: Fault, folder: Path, lab: Path, quick: bool) -> None:
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
            result = attempt(fault, folder / "scratch", lab, quick)
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
            record = json.loads((self.folder / "result.json").read_text())
            return Result(**record | {"failures": tuple(record["failures"])})
        why = f"not done after {self.fault.limit:.0f} s" if late else f"its process ended with {self.child.code}"
        return _result(self.fault, "fail", f"{why}; {self.count} trials passed", 0, 0, seconds, [])

    def end(self) -> None:
        """Kill it, with everything below it."""
        if self.child.code is None:
            self.child.send(signal.SIGSTOP)  # so that it starts nothing more; orphans still fall to it
            processes.end_descendants(self.child.pid)
            self.child.send(signal.SIGKILL)
            self.child.wait(30)


def _result(
    fault: Fault, verdict: str, remark: str, passed: int, tried: int, seconds: float, failures: Sequence[str]
) -> Result:
    counts = f"{passed} of {tried}" if tried else ""
    observed = ": ".join(part for part in (counts, remark) if part)
    return Result(
        *(fault.number, fault.name, fault.injected, fault.expected, verdict, observed),
        *(passed, tried, round(seconds, 1), tuple(failures)),
    )


def run_all(
    faults: Sequence[Fault], folder: Path, quick: bool, jobs: int, watch: Callable[[Sequence[Attempt]], None]
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
                under_way.append(Attempt(next_one, folder / str(next_one.number), folder / "lab", quick))
            for one in list(under_way):
                if result := one.result():
                    under_way.remove(one)
                    if result.verdict == "pass":
                        shutil.rmtree(one.folder, ignore_errors=True)
                    yield result
            watch(under_way)
            time.sleep(0.05)
    finally:
        for one in under_way:
            one.end()


def table(results: Sequence[Result]) -> str:
    """The results as a Markdown table."""
    lines = ["| # | fault | injected | expected | observed | result |", "|---|---|---|---|---|---|"]
    for result in results:
        first = f" First failure: {result.failures[0]}" if result.failures else ""
        cells = (result.name, result.injected, result.expected, result.observed + first, result.verdict)
        lines.append(f"| {result.number} | " + " | ".join(_line(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _line(text: str) -> str:
    return " ".join(text.split())


def note(text: str) -> None:
    """A line for whoever reads the log of a fault."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
