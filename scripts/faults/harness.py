"""What every fault shares: how it is declared, tried in a process of its own, counted, and reported.

A fault is a function of a `Place`. Its docstring says what is injected and, after "Expected:", what has to follow. It
makes trials (`with place.trial("..."):` around code that raises `Wrong` where a run breaks its promise) and returns a
remark on what was observed. The counts, not the function, decide whether the fault is passed.
"""

import math
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Any, TypeVar

from scripts.faults import processes
from scripts.faults.processes import Wrong

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

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Result":
        """What `asdict` made, by way of JSON."""
        return cls(**{**record, "failures": tuple(record["failures"])})


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


@dataclass(frozen=True)
class Figures:
    """How often things are tried.

    Attributes:
        quick: a sample instead of the catalogue's figures.
        minutes: after so many a fault that repeats something comes to its end.
    """

    quick: bool = False
    minutes: float = math.inf


class Place:
    """Where one fault is tried: a scratch folder, the counts, and what all faults share.

    Attributes:
        folder: scratch, empty, on the disk of the temporary folder.
        lab: what tiny.prepare made for all faults, to be read only.
        figures: how often things are tried.
        cut_short: whether time was up before that.
        random: seeded by the fault's number.
    """

    def __init__(self, fault: Fault, folder: Path, lab: Path, figures: Figures) -> None:
        self.folder = folder
        self.lab = lab
        self.figures = figures
        self.cut_short = False
        self._end = time.monotonic() + 60 * figures.minutes
        self.random = random.Random(fault.number)
        self.passed = 0
        self.tried = 0
        self.failures: list[str] = []

    def count(self, full: int, quick: int) -> int:
        """How many times: the catalogue's figure, or a sample."""
        return quick if self.figures.quick else full

    def repeats(self, full: int, quick: int) -> Iterator[int]:
        """0, 1, ...: as often as the catalogue says, or a sample; at least once, and then until time is up."""
        for number in range(self.count(full, quick)):
            if number and time.monotonic() > self._end:
                self.cut_short = True
                return
            yield number

    def some(self, items: Iterable[Item], quick: int) -> list[Item]:
        """All of them, or the first so many as a sample."""
        return list(items)[: quick if self.figures.quick else None]

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
            note(f"FAILED {name}: {wrong}")
            self.failures.append(f"{name}: {wrong}")
        except Exception as error:
            traceback.print_exc()
            self.failures.append(f"{name}: {type(error).__name__}: {error}")
        finally:
            (self.folder / "count").write_text(f"{self.passed} of {self.tried}")


def attempt(fault: Fault, folder: Path, lab: Path, figures: Figures) -> Result:
    """Try one fault here and now."""
    folder.mkdir(parents=True, exist_ok=True)
    place = Place(fault, folder, lab, figures)
    began = time.monotonic()
    try:
        remark, verdict = fault.body(place), None
        if place.cut_short:
            remark += f" (stopped after {figures.minutes:g} minutes, before the full number of trials)"
    except NotTried as reason:
        remark, verdict = str(reason), "not tried"
    except Exception as error:
        traceback.print_exc()
        remark, verdict = f"{type(error).__name__}: {error}", "fail"
    if verdict is None:
        verdict = "pass" if place.tried and place.passed == place.tried else "fail"
    return reported(fault, verdict, remark, place.passed, place.tried, time.monotonic() - began, place.failures)


def reported(
    fault: Fault, verdict: str, remark: str, passed: int, tried: int, seconds: float, failures: Sequence[str]
) -> Result:
    """The result of a fault, its counts before the remark."""
    counts = f"{passed} of {tried}" if tried else ""
    observed = ": ".join(part for part in (counts, remark) if part)
    return Result(
        *(fault.number, fault.name, fault.injected, fault.expected, verdict, observed),
        *(passed, tried, round(seconds, 1), tuple(failures)),
    )


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
