"""Progress of long tasks: a bar in a terminal, an occasional line in a log file, where it may take hours."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ldm.runtime.durations import so_far

LOG_SECONDS = 30.0
"""Between two lines of a log."""

Item = TypeVar("Item")


@contextmanager
def shown(title: str, silent: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show progress within the block, once there is any: yields a function of (done, total).

    What is done at the first call was there before, and does not count toward the speed.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[times]}"))
    bar = Progress(*columns, disable=silent)
    task = bar.add_task(title, times="")
    began = said = time.monotonic()
    found: int | None = None

    def show(done: int, total: int) -> None:
        nonlocal said, found
        now = time.monotonic()
        found = done if found is None else found
        times = so_far(now - began, done - found, total - found)
        bar.update(task, completed=done, total=total, times=times)
        if bar.console.is_terminal:
            bar.start()
        elif not silent and now - said > LOG_SECONDS:
            said = now
            print(f"{title}: {done}/{total}  {times}", flush=True)

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
