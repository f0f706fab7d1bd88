"""Progress of long tasks: a bar in a terminal, an occasional line in a log file, where it may take hours."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ldm.runtime.durations import so_far

LOG_SECONDS = 30.0
"""Between two lines of a log."""

Item = TypeVar("Item")


class Show(Protocol):
    """How far something is."""

    def __call__(self, done: int, total: int, part: str = ...) -> None: ...


@contextmanager
def shown(title: str, silent: bool = False) -> Iterator[Show]:
    """Show progress within the block, once there is any: yields a function of (done, total).

    What is done at the first call was there before, and does not count toward the speed. Of work in
    several parts a third argument is the title of the one that it is in now, whose speed is its own.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[times]}"))
    bar = Progress(*columns, disable=silent)
    task = bar.add_task(title, times="")
    said = time.monotonic()
    began = {title: said}
    found: dict[str, int] = {}

    def show(done: int, total: int, part: str = title) -> None:
        nonlocal said
        now = time.monotonic()
        before = found.setdefault(part, done)
        times = so_far(now - began.setdefault(part, now), done - before, total - before)
        bar.update(task, description=part, completed=done, total=total, times=times)
        if bar.console.is_terminal:
            bar.start()
        elif not silent and now - said > LOG_SECONDS:
            said = now
            print(f"{part}: {done}/{total}  {times}", flush=True)

    try:
        yield show
    finally:
        bar.stop()


def tracked(items: Sequence[Item], title: str, silent: bool = False) -> Iterator[Item]:
    """The items one by one, with a progress display."""
    with shown(title, silent) as show:
        for done, item in enumerate(items):
            show(done, len(items))
            yield item
        show(len(items), len(items))
