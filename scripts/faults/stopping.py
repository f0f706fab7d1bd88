"""Faults of signals: whoever gets one, whenever, the run saves once and leaves with a code that says so."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldm.checkpoints import store
from scripts.faults.harness import Place, fault
from scripts.faults.inject import both, in_validation, slow_saves, slow_steps
from scripts.faults.interpreter import ROOT
from scripts.faults.processes import Child, Wrong, demand, descendants, wait_until
from scripts.faults.runs import Run, all_gone, demand_same, last_line, no_leftovers, ranks
from scripts.faults.tiny import Tree, stage2, two_ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)
TARGETS = (
    *(("torchrun", "rank 1"), ("lightning", "main"), ("lightning", "rank 1"), ("lightning", "all")),
    *(("torchrun", "agent"), ("torchrun", "rank 0"), ("torchrun", "all")),
)
GRACE = 30.0
"""Seconds that the issue grants a run to leave."""


def _tree(place: Place, steps: int = 30, workers: int = 0) -> Tree:
    # Saves and validations often, so that signals meet them.
    return stage2(place.lab, steps=steps, every=4, validate=6, num_workers=workers)


def _demand_stopped(run: Run, code: int | None, number: int, launcher: str = "single") -> int:
    """The step of a run that was stopped by a signal, as it has to be reported and saved."""
    state = run.state
    demand(state.status == "stopped", f"status {state.status}, {state.reason}")
    demand(state.exit_code == 128 + number, f"run_state.json says exit code {state.exit_code}")
    expected = 1 if launcher == "torchrun" else 128 + number  # torchrun returns 1 whatever its workers do
    demand(code == expected, f"exit code {code}, expected {expected}")
    demand(state.resume_from is not None, "nothing to resume from")
    saved = store.load(run.folder.path / str(state.resume_from))["global_step"]
    demand(saved == state.step > 0, f"step {state.step} was reached, {saved} is saved")
    no_leftovers(run)
    return state.step


@fault(15, "signal to a single process")
def single(place: Place) -> str:
    """SIGTERM, SIGUSR1, SIGUSR2, SIGHUP and SIGINT in turn, at a random step, to the process or to its group.

    Expected: one save at a step's border, code 128 + the signal within 30 s; resumed, it ends as undisturbed.
    """
    straight = Run(place.new("straight"), _tree(place))
    straight.complete()
    slowest = 0.0
    for number in place.repeats(20, quick=1):
        for target in ("main", "group"):
            name, workers = SIGNALS[number % 5], 2 * (number // 5 % 2)
            with place.trial(f"{name.name} to the {target}, {workers} workers"):
                run = Run(place.new("run"), straight.tree)
                words = [f"data.params.num_workers={workers}"]
                child = run.start(*words)
                run.wait_for_step(place.random.randint(1, 16), child)
                (child.send if target == "main" else child.send_group)(name)
                slowest = max(slowest, all_gone(child, GRACE))
                _demand_stopped(run, child.code, name)
                run.complete(*words)
                demand_same(run.final(), straight.final())
    return f"gone after at most {slowest:.1f} s"


@fault(16, "signal to one of two ranks, to all, to the launcher", limit=3600)
def two(place: Place) -> str:
    """The same signals, at a random step, to one rank, to all processes, to Lightning's launcher or torchrun's agent.

    Expected: both ranks stop after the same step, one save, all gone within 30 s, run_state.json says by which
    signal; every fifth is resumed and ends as undisturbed.
    """
    straight = Run(place.new("straight"), two_ranks(_tree(place)))
    straight.complete(launcher="lightning")
    cells = place.some(TARGETS, quick=2)
    passed, slowest = dict.fromkeys(cells, 0), 0.0
    for number in place.repeats(20, quick=1):
        for launcher, target in cells:
            name, workers = SIGNALS[number % 5], 2 * (number // 5 % 2)
            with place.trial(f"{launcher}: {name.name} to {target}, {workers} workers"):
                run = Run(place.new("run"), straight.tree)
                words = [f"data.params.num_workers={workers}"]
                child = run.start(*words, launcher=launcher)
                run.wait_for_step(place.random.randint(1, 16), child)
                _send(child, launcher, target, name)
                slowest = max(slowest, all_gone(child, GRACE))
                _demand_stopped(run, child.code, name, launcher)
                if number % 5 == 0:
                    run.complete(*words, launcher=launcher)
                    demand_same(run.final(), straight.final())
                passed[launcher, target] += 1
    cases = "; ".join(f"{launcher}, {target}: {passed[launcher, target]} of {number + 1}" for launcher, target in cells)
    return f"{cases}; gone after at most {slowest:.1f} s"


def _send(child: Child, launcher: str, target: str, number: int) -> None:
    if target in ("main", "agent"):
        child.send(number)
    elif target == "all":  # every process, as a scheduler does
        for pid in [child.pid, *descendants(child.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
    else:
        os.kill(ranks(child, launcher)[int(target[-1])], number)


@fault(17, "SLURM's warning signal outside of SLURM")
def warning(place: Place) -> str:
    """SIGUSR1 to a run that nobody requeues.

    Expected: saved, and code 138.
    """
    for number in place.repeats(5, quick=1):
        with place.trial(f"run {number}"):
            run = Run(place.new("run"), _tree(place, steps=100_000))
            child = run.start()
            run.wait_for_step(place.random.randint(1, 10), child)
            child.send(signal.SIGUSR1)
            demand(child.wait(GRACE) == 138, f"exit code {child.code}")
            _demand_stopped(run, child.code, signal.SIGUSR1)
    return "saved, 138"


@fault(18, "signal at an awkward moment")
def awkward(place: Place) -> str:
    """A second and a third signal; a signal during a save, during a validation; one at a random moment of the start,
    imports included, of a new interpreter.

    Expected: the save under way is completed; the third request ends at once; before there is anything to save the
    code is 128 + the signal, too, and nothing hangs.
    """
    for number in place.repeats(3, quick=1):
        with place.trial(f"second signal {number}"):
            _second_signal(place)
        with place.trial(f"third signal {number}"):
            _third_signal(place)
        with place.trial(f"during a save {number}"):
            _during_a_save(place)
        with place.trial(f"during a validation {number}"):
            _during_a_validation(place)
    for number in place.repeats(10, quick=1):
        with place.trial(f"at the start {number}"):
            _at_the_start(place, SIGNALS[number % 5])
    return "saved where there was something to save"


def _second_signal(place: Place) -> None:
    run = Run(place.new("run"), _tree(place, steps=100_000))
    child = run.start(hook=both(slow_steps(1.5)))
    run.wait_for_step(1, child)
    child.send(signal.SIGTERM)
    time.sleep(1.1)
    child.send(signal.SIGINT)
    child.wait(GRACE)
    _demand_stopped(run, child.code, signal.SIGTERM)


def _third_signal(place: Place) -> None:
    run = Run(place.new("run"), _tree(place, steps=100_000))
    child = run.start(hook=slow_steps(60))
    demand(wait_until(lambda: _has_lock(run), 60), f"did not start: {last_line(child.output())}")
    time.sleep(1)
    for _ in range(3):
        child.send(signal.SIGTERM)
        time.sleep(1.2)
    demand(child.wait(5) == 143, f"exit code {child.code}")


def _has_lock(run: Run) -> bool:
    return run.logs.is_dir() and any((path / "run_state.json").exists() for path in run.logs.iterdir())


def _during_a_save(place: Place) -> None:
    begun = place.new("mark") / "begun"
    run = Run(place.new("run"), _tree(place, steps=100_000))
    child = run.start(hook=slow_saves(1.0, begun))
    demand(wait_until(begun.exists, 60), f"no save: {last_line(child.output())}")
    child.send(signal.SIGTERM)
    child.wait(GRACE)
    _demand_stopped(run, child.code, signal.SIGTERM)


def _during_a_validation(place: Place) -> None:
    mark = place.new("mark") / "begun"
    run = Run(place.new("run"), stage2(place.lab, steps=30, every=1000, validate=10))

    def validating(module: Any) -> None:
        if not module.trainer.sanity_checking and not mark.exists():
            mark.touch()
            time.sleep(1.0)

    child = run.start(hook=in_validation(validating))
    demand(wait_until(mark.exists, 60), f"no validation: {last_line(child.output())}")
    child.send(signal.SIGTERM)
    child.wait(GRACE)
    demand(_demand_stopped(run, child.code, signal.SIGTERM) == 10, "it went on for a while")
    run.complete()
    straight = Run(place.new("straight"), run.tree)
    straight.complete()
    demand_same(run.final(), straight.final())


def _at_the_start(place: Place, number: int) -> None:
    """A signal to a real interpreter, at any moment after it has set its handlers."""
    run = Run(place.new("run"), _tree(place, steps=100_000))
    words = [sys.executable, str(ROOT / "main.py"), "--base", str(run.file), "--logdir", str(run.logs)]
    log = run.place / "log.start"
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file)
        handled = wait_until(lambda: _handles(process.pid, number), 60)
        took = _processor_time(process.pid)
        demand(handled and took < 1, f"signals are handled only {took:.1f} s of processor time after the start")
        moment = place.random.uniform(0.0, 6.0)
        wait_until(lambda: _processor_time(process.pid) > moment, 60)
        process.send_signal(number)
        try:
            code = process.wait(180)  # on a busy machine the imports take their time
        except subprocess.TimeoutExpired:
            raise Wrong("hung") from None
    demand(code == 128 + number, f"exit code {code}: {last_line(log.read_text())}")
    if _has_lock(run):
        demand(run.state.status == "stopped", f"status {run.state.status}")


def _processor_time(pid: int) -> float:
    """Seconds that a process has used of a processor: what a busy machine does not change."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _handles(pid: int, number: int) -> bool:
    """Whether a process catches a signal, by what the kernel knows of it."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
    # Python itself handles SIGINT from the beginning; SIGTERM tells when it is ours.
    return all(int(caught, 16) >> (one - 1) & 1 for one in (number, signal.SIGTERM))


@fault(19, "grace too short for the save")
def short_grace(place: Place) -> str:
    """SIGTERM, while a save takes 5 s; SIGKILL after 1 s.

    Expected: the old checkpoint is intact, nothing half-written bears a valid name, and the run goes on from it.
    """
    straight = Run(place.new("straight"), _tree(place))
    straight.complete()
    for number in place.repeats(5, quick=1):
        with place.trial(f"run {number}"):
            begun = place.new("mark") / "begun"
            run = Run(place.new("run"), straight.tree)
            child = run.start(hook=slow_steps(0.03))
            run.wait_for_step(9, child)
            child.send(signal.SIGKILL)
            child.wait(10)
            old = store.load(run.newest())["global_step"]
            child = run.start(hook=slow_saves(5.0, begun))
            demand(wait_until(begun.exists, 60), f"no save: {last_line(child.output())}")
            child.send(signal.SIGTERM)
            time.sleep(1.0)
            child.send(signal.SIGKILL)
            demand(child.wait(10) == -signal.SIGKILL, f"exit code {child.code}")
            demand(store.load(run.newest())["global_step"] == old, "another checkpoint than the old one")
            run.complete()
            demand_same(run.final(), straight.final())
            no_leftovers(run)
    return "old one intact, same end"
