"""Break runs in every way of the catalogue, and tell which promises held.

    python scripts/faults                        # every fault, at the full figures; as root for disks and networks
    python scripts/faults --quick                # a sample of each, in minutes
    python scripts/faults --only 1 8 "rank killed" --minutes 10 --jobs 2 --json faults.json
    python scripts/faults --table faults.json    # several files make one table

Each fault is tried on real runs of main.py, small ones, in processes of its own, all of which are killed at its end.
The table that is printed at the end is Markdown. Exit code 1: some promise did not hold.
"""

import argparse
import gc
import importlib
import json
import math
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType

os.environ.setdefault("OMP_NUM_THREADS", "1")
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # in place of this folder: its files are scripts.faults.*
    from ldm.runtime import threads

    threads.prepare()  # before torch is imported

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ldm.cli.options import path, positive, whole_number
from ldm.runtime.launcher import leave
from scripts.faults import processes
from scripts.faults.attempts import Attempt, run_all
from scripts.faults.harness import CATALOGUE, Fault, Figures, Result, chosen, table

PARTS = (
    *("saving", "resuming", "stopping", "peers", "training"),
    *("pictures", "caches", "mistakes", "attacks", "sharded", "elsewhere"),
)
"""Modules of the catalogue."""

MARKS = {"pass": "[green]pass[/]", "fail": "[red]FAIL[/]", "not tried": "[yellow]not tried[/]"}


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    options = parse(argv)
    for part in PARTS:
        importlib.import_module(f"scripts.faults.{part}")
    try:
        faults = chosen(options.only)
    except KeyError as error:
        print(f"error: {error.args[0]}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(f"{fault.number:3} {fault.name}" for fault in faults))
        return 0
    if options.table:
        records = [json.loads(file.read_text()) for file in options.table]
        found = {one["number"]: Result.from_dict(one) for record in records for one in record["results"]}
        print(table([found[number] for number in sorted(found)]))
        print("\n".join(f"\n{record['summary']}" for record in records))
        return 0
    console = Console(stderr=True)
    with _ended_on_signals(), _scratch(options.keep) as folder:
        console.print(f"{len(CATALOGUE)} faults in the catalogue, {len(faults)} to try; scratch in {folder}")
        warm_up(folder)
        began = time.monotonic()
        results: list[Result] = []
        for result in _tried(faults, folder, options, console):
            results = sorted([*results, result], key=lambda one: one.number)
            summed = summary(results, time.monotonic() - began, options)
            if options.json:
                record = {"summary": summed, "results": [asdict(one) for one in results]}
                options.json.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{table(results)}\n\n{summed}")
    return int(any(result.verdict == "fail" for result in results))


def summary(results: Sequence[Result], seconds: float, options: argparse.Namespace) -> str:
    """One line: what came of how many faults, where and when."""
    counts = [f"{sum(result.verdict == verdict for result in results)} {verdict}" for verdict in MARKS]
    trials = f"{sum(result.passed for result in results)} of {sum(result.tried for result in results)} trials passed"
    figures = "a sample (--quick)" if options.quick else "the full figures"
    if options.minutes < math.inf:
        figures += f", at most {options.minutes:g} minutes of trials a fault"
    where = f"{os.cpu_count()} CPU cores, {platform.system()} {platform.release().split('-')[0]}"
    when = time.strftime("%Y-%m-%d", time.gmtime())
    return f"{when}, {where}, {figures}: {', '.join(counts)}; {trials} in {seconds / 60:.0f} minutes."


def _tried(faults: Sequence[Fault], folder: Path, options: argparse.Namespace, console: Console) -> Iterator[Result]:
    """Try them, with a line for each that is done and for each that is under way."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks = {fault.number: progress.add_task(fault.name, visible=False, start=False) for fault in faults}

        figures = Figures(options.quick, options.minutes)

        def watch(under_way: Sequence[Attempt]) -> None:
            for one in under_way:
                task, text = tasks[one.fault.number], f"{one.fault.number} {one.fault.name} {one.count}"
                progress.start_task(task)
                progress.update(task, visible=True, description=text)

        for result in run_all(faults, folder, figures, options.jobs, watch):
            progress.update(tasks[result.number], visible=False)
            line = (
                f"{MARKS[result.verdict]} {result.number:2} {result.name}: {result.observed} ({result.seconds:.0f} s)"
            )
            console.print(line, highlight=False, soft_wrap=True)
            for failure in result.failures[:3]:
                console.print(f"       {failure}", highlight=False, markup=False, soft_wrap=True)
            yield result


def warm_up(folder: Path) -> None:
    """Make what all faults share, and import whatever a run imports, so that forks need not."""
    import ldm.training.trainer  # noqa: F401
    from scripts.faults.runs import prepare

    processes.adopt_orphans()
    listing = folder / "modules"
    child = processes.fork(lambda: prepare(folder / "lab", listing), folder / "log.lab")
    if child.wait(300) != 0:
        raise SystemExit(f"the runs that all faults start from failed:\n{child.output()}")
    for name in listing.read_text().split():
        with suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # forks share these pages


@contextmanager
def _scratch(keep: bool) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="faults."))
    folder.chmod(0o755)  # a trial becomes another user
    try:
        yield folder
    finally:
        processes.end_descendants(os.getpid())
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _ended_on_signals() -> Iterator[None]:
    """SIGTERM ends the catalogue as Ctrl-C does: with everything that it has started."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="faults", description="Break runs in every way of the catalogue.")
    parser.add_argument("--only", nargs="+", default=[], metavar="FAULT", help="numbers, or parts of names")
    parser.add_argument("--quick", action="store_true", help="a sample of each fault instead of the full figures")
    parser.add_argument(
        "--minutes", type=positive, default=math.inf, help="repeat the trials of a fault for so long only"
    )
    parser.add_argument("--jobs", type=whole_number, default=1, help="faults tried at a time (default: 1)")
    parser.add_argument("--json", type=path, metavar="FILE", help="write the results there, too, as they come")
    parser.add_argument("--table", nargs="+", type=path, metavar="FILE", help="try nothing: print what --json has kept")
    parser.add_argument("--keep", action="store_true", help="leave the scratch folders of failed faults")
    parser.add_argument("--list", action="store_true", help="list the faults and leave")
    return parser.parse_args(argv)


if __name__ == "__main__":
    os.environ.update(WANDB_MODE="disabled", WANDB_SILENT="true")
    leave(main(sys.argv[1:]))  # without the libraries' farewells
