"""Faults in the middle of training: numbers that are not finite, workers that die, second runs, loggers that fail."""

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints import store
from scripts.faults import machine
from scripts.faults.harness import NotTried, Place, fault
from scripts.faults.inject import after_backward, before_each_step, slow_steps
from scripts.faults.interpreter import Hook
from scripts.faults.processes import children, demand, descendants, wait_until
from scripts.faults.runs import Run, all_gone, demand_same, last_line, no_leftovers
from scripts.faults.tiny import BATCH, stage2


def _poison(kind: str, bad: Callable[[int], bool]) -> Hook:
    """Make the loss or the gradient of the steps `bad` (counted from 0 by sample number) not finite."""

    def on_batch(module: Any, batch: dict[str, Any]) -> None:
        module.bad = bad(int(batch["draws"].numbers.min()) // BATCH)
        if module.bad and kind != "gradient NaN":
            batch["latent"].fill_(float("nan") if kind == "loss NaN" else 1e30)

    def on_gradient(module: Any) -> None:
        if module.bad and kind == "gradient NaN":
            next(p for p in module.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")

    def hook() -> None:
        before_each_step(on_batch)()
        after_backward(on_gradient)()

    return hook


def _demand_finite(run: Run) -> None:
    for file in run.folder.checkpoints.glob("*.ckpt"):
        state = store.load(file)
        tensors = [*state["state_dict"].values()]
        tensors += [
            t for one in state["optimizer_states"] for moments in one["state"].values() for t in moments.values()
        ]
        bad = [t for t in tensors if isinstance(t, torch.Tensor) and not bool(torch.isfinite(t).all())]
        demand(not bad, f"{file.name} holds values that are not finite")


@fault(26, "loss or gradient not finite")
def not_finite(place: Place) -> str:
    """The loss becomes NaN or infinite, or the gradient NaN: in one step, and in every step from one on.

    Expected: one bad step changes no weight, is counted and skipped, and the run ends well; a row of them ends with 5
    and names step, sample numbers and picture files; no file ever holds a value that is not finite.
    """
    for kind in place.some(("loss NaN", "gradient NaN", "loss infinite"), quick=1):
        with place.trial(f"{kind} once"):
            run = Run(place.new("once"), stage2(place.lab, steps=12, every=1, keep=99))
            text = run.complete(hook=_poison(kind, lambda step: step == 6)).output()
            demand("not finite" in text, "not a word of it")
            _demand_finite(run)
            before, after = (run.final(run.folder.checkpoints / f"step={step:08d}.ckpt") for step in (6, 7))
            weights = [{k: v for k, v in one["state_dict"].items() if "denoiser" in k} for one in (before, after)]
            demand_same(weights[0], weights[1], "a weight after the skipped step")
        with place.trial(f"{kind} from step 7 on"):
            run = Run(place.new("always"), stage2(place.lab, steps=100, every=2, keep=99))
            child = run.start(hook=_poison(kind, lambda step: step >= 6))
            code, text = child.wait(60), child.output()
            demand(code == 5, f"exit code {code}: {last_line(text)}")
            demand(run.state.exit_code == 5, f"run_state.json says {run.state.exit_code}")
            named = re.search(r"error: step (\d+): .*?sample numbers (\d+) to (\d+).*?\.png", text)
            demand(named, f"step, samples or files are not named: {last_line(text)}")
            assert named is not None
            step, first, last = map(int, named.groups())
            demand((first, last) == (BATCH * (step - 1), BATCH * step - 1), f"wrong samples: {named[0]}")
            _demand_finite(run)
            demand(run.step() < 50, f"only at step {run.step()}")
    return "skipped once, ended in a row"


@fault(28, "loader worker killed")
def worker_killed(place: Place) -> str:
    """kill -9 of one of two loader workers.

    Expected: no hang; code 6 within 10 s, saying that a worker died, likely for want of memory; the run can go on.
    """
    straight = Run(place.new("straight"), stage2(place.lab, steps=60, every=5, num_workers=2))
    straight.complete()
    slowest = 0.0
    for number in place.repeats(10, quick=1):
        with place.trial(f"kill {number}"):
            run = Run(place.new("run"), straight.tree)
            child = run.start(hook=slow_steps(0.02))
            run.wait_for_step(place.random.randint(6, 30), child)
            os.kill(place.random.choice(children(child.pid)), signal.SIGKILL)
            slowest = max(slowest, all_gone(child, 10))
            demand(child.code == 6, f"exit code {child.code}: {last_line(child.output())}")
            demand("worker" in child.output() and "memory" in child.output(), f"it says: {last_line(child.output())}")
            run.complete()
            demand_same(run.final(), straight.final())
    return f"code 6 after at most {slowest:.1f} s; resumed to the same end"


@fault(39, "two runs in one folder")
def two_runs(place: Place) -> str:
    """A run is started a second time while the first is at work; then the first is killed, its loader workers left.

    Expected: the second ends with 8 and names host, process and time of the first, which does not notice; the lock of
    a dead run blocks nobody.
    """
    straight = Run(place.new("straight"), stage2(place.lab, steps=40, every=5, num_workers=2))
    straight.complete()
    for number in place.repeats(20, quick=1):
        with place.trial(f"second start {number}"):
            run = Run(place.new("run"), straight.tree)
            child = run.start(hook=slow_steps(0.04))
            run.wait_for_step(6, child)
            second = run.start()
            code, text = second.wait(60), second.output()
            demand(code == 8, f"exit code {code}: {last_line(text)}")
            named = (str(child.pid), socket.gethostname(), str(time.gmtime().tm_year))
            demand(all(word in text for word in named), f"the first is not named: {last_line(text)}")
            if number % 2:
                child.send(signal.SIGKILL)
                child.wait(10)
                run.complete()
            else:
                demand(child.wait(60) == 0, f"the first ended with {child.code}")
            demand_same(run.final(), straight.final())
            no_leftovers(run)
    return "refused, the first untouched; a dead one's lock was taken over"


@fault(40, "logger outage")
def logger_outage(place: Place) -> str:
    """wandb's server refuses, or takes the connection and is silent; its folder's disk is full; its service is killed.

    Expected: code, steps and final state as without a logger, with at most 30 s of waiting at the start and at the
    end; metrics.csv complete.
    """
    straight = Run(place.new("straight"), stage2(place.lab, steps=20))
    straight.complete()
    waited, skipped = 0.0, []
    for kind in place.some(("service killed", "none", "refused", "silent", "disk full"), quick=1):
        try:
            with place.trial(kind):
                waited = max(waited, _with_wandb(place, straight, kind))
        except NotTried as reason:
            skipped.append(f"{kind} ({reason})")
    return f"waited {waited:.0f} s at most" + (f"; not tried: {', '.join(skipped)}" if skipped else "")


def _with_wandb(place: Place, straight: Run, kind: str) -> float:
    folder = place.new(kind.replace(" ", "_"))
    environment = {
        "HOME": str(folder),
        "WANDB_CACHE_DIR": str(folder / "cache"),
        "WANDB_DATA_DIR": str(folder / "data"),
    }
    environment |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    tree = json.loads(json.dumps(straight.tree))
    logger = {"project": "faults", "offline": kind not in ("refused", "silent")}
    with ExitStack() as held:
        address = "http://127.0.0.1:9"
        if kind == "silent":
            server = held.enter_context(socket.create_server(("127.0.0.1", 0)))
            address = f"http://127.0.0.1:{server.getsockname()[1]}"
        if not logger["offline"]:
            environment |= {"WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": address}
        disk = folder / "wandb"
        if kind == "disk full":
            machine.private_mounts()
            machine.small_disk(disk, 3)
        disk.mkdir(exist_ok=True)
        tree["lightning"]["logger"] = {
            "target": "ldm.training.loggers.FencedWandb",
            "params": {"save_dir": str(disk), **logger},
        }
        run = Run(folder / "run", tree)
        began = time.monotonic()
        child = run.start(environment=environment, hook=slow_steps(0.2))
        if kind == "disk full":
            run.wait_for_step(1, child, 90)
            machine.fill(disk)
        if kind == "service killed":
            run.wait_for_step(1, child, 90)
            demand(wait_until(lambda: _service(child.pid), 40), "wandb's service did not start")
            for pid in _service(child.pid):
                os.kill(pid, signal.SIGKILL)
        code = child.wait(180)
        took = time.monotonic() - began
    demand(code == 0, f"exit code {code}: {last_line(child.output())}")
    demand_same(run.final(), straight.final())
    demand(run.metrics() == straight.metrics(), "metrics.csv differs")
    waited = max(0.0, took - 20 * 0.2 - 2)
    demand(waited < 60, f"waited {waited:.0f} s in all")
    return waited


def _service(pid: int) -> list[int]:
    found = []
    for one in descendants(pid):
        with suppress(OSError):
            if b"wandb-core" in Path(f"/proc/{one}/cmdline").read_bytes():
                found.append(one)
    return found
