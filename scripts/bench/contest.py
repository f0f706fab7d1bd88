"""Several sides in turn, each in a process of its own: one timed step of A, of B, of C, of A, ..., never two at once.

So a busy machine slows all of them, and what one has imported or allocated is not in the memory of another.
"""

import multiprocessing
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from scripts.bench.child import Answer, Failed, Make, Place, Request, counted, run, timed

WARM_UP = 1
"""Steps before the first that counts: they make the optimizers' state, and compile."""

_PATIENCE = 20.0


class SideFailed(Exception):
    """What went wrong in a side's process, in one line; `details` is the traceback there."""

    def __init__(self, name: str, reason: str, details: str = "") -> None:
        super().__init__(f"{name}: {reason}")
        self.details = details


@dataclass(frozen=True)
class Side:
    """A name, and a function of a module, or a partial of one, that makes the side in its process."""

    name: str
    make: Make


@dataclass(frozen=True)
class Case:
    """A row of a table: sides that do the same, the first of which is ours.

    Args:
        images: of a step.
    """

    name: str
    images: int
    sides: Sequence[Side]


@dataclass
class Measured:
    """What is known of one side in one precision; `inside` are seconds of each step that its networks took."""

    side: str
    bf16: bool
    parameters: int
    seconds: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    flops: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Child:
    """A side's process, which ends with the block."""

    def __init__(self, side: Side, place: Place) -> None:
        self.side, self.place = side, place
        context = multiprocessing.get_context("spawn")  # a fork would share what the parent has imported
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=run, args=(theirs, side.make, place), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: Any) -> None:
        with suppress(OSError):
            self._connection.send(None)
        self._process.join(_PATIENCE)
        self._process.kill()

    def answer(self) -> Answer:
        """Raises SideFailed if it cannot go on."""
        try:
            found = self._connection.recv()
        except EOFError as error:
            self._process.join(_PATIENCE)
            raise SideFailed(self.side.name, f"ended with exit code {self._process.exitcode}") from error
        if isinstance(found, Failed):
            raise SideFailed(self.side.name, *found)
        return found

    def begin(self, request: Request) -> None:
        """Have it take a step; its `answer` follows."""
        with suppress(OSError):  # it has ended: its last answer says why
            self._connection.send(request)

    def ask(self, request: Request) -> Answer:
        """Have it take a step."""
        self.begin(request)
        return self.answer()


def contest(case: Case, places: Sequence[Place], repeats: int) -> tuple[list[Measured], list[str]]:
    """Each side's figures in each place, in that order, and notes on sides that do not run here.

    Raises:
        SideFailed: ours does not run.
    """
    found, notes = [], []
    with ExitStack() as stack:
        entered = [stack.enter_context(Child(side, place)) for place in places for side in case.sides]
        ready: list[tuple[Child, Measured]] = []
        for child in entered:
            try:
                measured = Measured(child.side.name, child.place.bf16, child.answer()["parameters"])
                for _ in range(WARM_UP):
                    child.ask(timed)
                ready.append((child, measured))
            except SideFailed as failure:
                if child.side is case.sides[0]:
                    print(failure.details, file=sys.stderr)
                    raise
                notes.append(f"{case.name}: without {failure}")
        for _ in range(repeats):
            for child, measured in ready:
                answer = child.ask(timed)
                measured.seconds.append(answer["seconds"])
                measured.inside.append(answer["inside"])
                measured.peak_bytes = answer["peak_bytes"]
        for child, measured in ready:
            measured.flops = child.ask(counted)["flops"]
            found.append(measured)
    return found, list(dict.fromkeys(notes))
