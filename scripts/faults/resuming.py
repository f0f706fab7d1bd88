"""Faults of going on: wherever a run was interrupted, and on however many ranks it goes on, it stays the same run."""

import os
import shutil
import signal
import time
from pathlib import Path

from ldm.checkpoints import store
from scripts.faults.harness import Place, fault
from scripts.faults.inject import diary, slow_steps
from scripts.faults.processes import demand
from scripts.faults.runs import Run, demand_same, essence, last_line, no_leftovers
from scripts.faults.tiny import GROUP, Tree, elastic, mid_epoch, pictures, stage2


@fault(2, "kill -9 anywhere, again and again", limit=2400)
def chains_of_kills(place: Place) -> str:
    """Runs with two loader workers are killed at random moments, start-up included, and started again until done.

    Expected: weights, average, optimizer, rate and logged losses equal those of the undisturbed run, bit for bit.
    """
    tree = stage2(place.lab, steps=30, every=3, validate=10, num_workers=2)
    straight = Run(place.new("straight"), tree)
    began = time.monotonic()
    straight.complete()
    whole = time.monotonic() - began
    kills, wanted = 0, place.count(100, quick=2)
    for _ in place.repeats(100, quick=2):
        if kills == wanted:
            break
        with place.trial(f"chain after {kills} kills"):
            run = Run(place.new("chain"), tree)
            kills += _killed_until_done(place, run, whole, wanted - kills)
            demand_same(run.final(), straight.final())
            demand(run.metrics() == straight.metrics(), "logged numbers differ")
            no_leftovers(run)
            shutil.rmtree(run.place)
    return f"chains, {kills} kills in all; every chain ended as the undisturbed run"


def _killed_until_done(place: Place, run: Run, whole: float, most: int) -> int:
    kills = 0
    while True:
        child = run.start()
        if kills < most:
            child.ended(place.random.uniform(0.1, 1.0) * whole)
            child.send(signal.SIGKILL)
        code = child.wait(120)
        if code == 0:
            return kills
        demand(code == -signal.SIGKILL, f"exit code {code} after {kills} kills: {last_line(child.output())}")
        kills += 1


@fault(10, "resume in the middle of an epoch", limit=2400)
def mid_epoch_resume(place: Place) -> str:
    """Runs go on from 30 random steps in mid-epoch, with 0 and 2 loader workers and 1 and 2 micro-batches a step.

    Expected: weights, average, optimizer, rate, images seen and every logged loss equal the undisturbed run's.
    """
    straight = {}
    for workers, pieces in place.some(((2, 2), (0, 1), (0, 2), (2, 1)), quick=1):
        micro = {"num_workers": workers, "micro_batch_size": 6 // pieces}
        tree = stage2(place.lab, steps=36, every=1, keep=99, validate=9, **micro)
        straight[f"{workers} workers, {pieces} micro-batches"] = run = Run(place.new("straight"), tree)
        run.complete()
    steps = {name: mid_epoch(place.random, 36, 30) for name in straight}
    for number in place.repeats(30, quick=2):
        for name, run in straight.items():
            with place.trial(f"step {steps[name][number]}, {name}"):
                _resume_at(run, steps[name][number], place.new("resumed"))
    return "bit for bit, and every logged loss"


def _resume_at(straight: Run, step: int, folder: Path) -> None:
    run = straight.copy(folder, step)
    run.complete("lightning.callbacks.checkpoints.params.every=1000")
    demand_same(run.final(), straight.final())
    demand(run.metrics(after=step) == straight.metrics(after=step), "logged numbers differ")
    shutil.rmtree(run.place)


@fault(11, "resume at borders")
def border_resume(place: Place) -> str:
    """Runs go on from the end of an epoch, from a validation, from the last step but one, and after the end.

    Expected: no step more or less; the same end; a finished run says "nothing to do" and ends with 0.
    """
    for workers in place.some((0, 2), quick=1):
        tree = stage2(place.lab, steps=2 * GROUP + 4, every=1, keep=99, validate=5, num_workers=workers)
        straight = Run(place.new("straight"), tree)
        straight.complete()
        for name, step in {"end of epoch": GROUP, "validation": 10, "last but one": 2 * GROUP + 3}.items():
            with place.trial(f"{name}, {workers} workers"):
                run = straight.copy(place.new("resumed"), step)
                run.complete()
                demand_same(run.final(), straight.final())
                demand(run.metrics() == straight.metrics(), "logged numbers differ")
        with place.trial(f"after the end, {workers} workers"):
            before = straight.final()
            text = straight.complete().output()
            demand("nothing to do" in text, f"it says: {last_line(text)}")
            demand_same(straight.final(), before)
    return "the same steps, the same end"


@fault(12, "other world size")
def world_sizes(place: Place) -> str:
    """A run goes on with 2, then 1, then 2 ranks, in mid-epoch, under both launchers; 6 images are asked of 4 ranks.

    Expected: every step sees the same samples, latents and labels as on one rank; after 20 steps of SGD without dropout
    the validation losses differ by less than 1e-6 (order of summation); an impossible number of ranks ends with 2 and
    the sizes that are possible.
    """
    legs = ((2, 7), (1, 13), (2, 20))
    tree = elastic(stage2(place.lab, steps=20, every=100, validate=20))
    alone = _trained(place, tree, "single")
    for launcher in place.some(("lightning", "torchrun"), quick=1):
        with place.trial(f"2 -> 1 -> 2, {launcher}"):
            run, folder = Run(place.new(launcher), tree), place.new("diary")
            for world, until in legs:
                words = [f"lightning.trainer.max_steps={until}", f"lightning.trainer.devices={world}"]
                run.complete(*words, launcher=launcher if world > 1 else "single", hook=diary(folder))
            demand(_rows(folder) == alone[0], "samples, latents or labels differ")
            one, other = run.final()["metrics"], alone[1]
            apart = max(abs(one[name] - other[name]) for name in other)
            demand(apart < 1e-6, f"validation losses differ by {apart:g}")
    with place.trial("4 ranks"):
        child = Run(place.new("four"), tree).start("lightning.trainer.devices=4")
        code, text = child.wait(60), child.output()
        demand(code == 2 and "batch_size" in text, f"exit code {code}: {last_line(text)}")
    return "the same samples at every step"


def _trained(place: Place, tree: Tree, launcher: str) -> tuple[list[str], dict[str, float]]:
    run, folder = Run(place.new("resumed"), tree), place.new("diary")
    run.complete(launcher=launcher, hook=diary(folder))
    return _rows(folder), run.final()["metrics"]


def _rows(folder: Path) -> list[str]:
    return sorted(line for file in folder.iterdir() for line in file.read_text().splitlines())


@fault(13, "configuration changed at resume")
def changed_at_resume(place: Place) -> str:
    """A run is resumed with another seed, batch, rate or model, or after its data set has got one more picture.

    Expected: code 2 naming the key, what the run has and what is asked for; --allow-change KEY lets it pass.
    """
    root = pictures(place.folder / "pictures")
    train = {"target": "ldm.data.sources.folder.ImageFolder", "params": {"root": str(root)}}
    first = Run(place.new("first"), stage2(place.lab, steps=4, train=train, cache=None))
    first.complete()
    changes = {
        "seed": "seed=5",
        "data.params.batch_size": "data.params.batch_size=4",
        "model.params.optimizer.params.lr": "model.params.optimizer.params.lr=0.5",
        "model.params.label_dropout": "model.params.label_dropout=0.5",
        "lightning.trainer.precision": "lightning.trainer.precision=bf16-mixed",
        "data": "another picture",
    }
    for key, change in place.some(changes.items(), quick=2):
        with place.trial(key):
            run = first.copy(place.new("changed"))
            words = [change] if "=" in change else []
            if not words:
                shutil.copy(root / "cats" / "0.png", root / "cats" / "new.png")
            child = run.start(*words, "lightning.trainer.max_steps=6")
            code, text = child.wait(60), child.output()
            demand(code == 2, f"exit code {code}: {last_line(text)}")
            demand(key in text and f"--allow-change {key}" in text, f"it says: {last_line(text)}")
            run.complete(*words, "lightning.trainer.max_steps=6", "--allow-change", key)
    return "refused by key, and accepted when allowed by name"


@fault(14, "the average after a resume")
def average(place: Place) -> str:
    """Runs go on from random steps; their later checkpoints are compared with those of the undisturbed run.

    Expected: the average and its count of images are equal at every step, in its early warm-up too.
    """
    straight = Run(place.new("straight"), stage2(place.lab, steps=20, every=1, keep=99))
    straight.complete()
    for step in mid_epoch(place.random, 18, place.count(10, quick=1)):
        with place.trial(f"from step {step}"):
            run = straight.copy(place.new("resumed"), step)
            run.complete()
            for file in sorted(run.folder.checkpoints.glob("step=*.ckpt")):
                ours, theirs = (essence(folder / file.name) for folder in (file.parent, straight.folder.checkpoints))
                averages = [
                    {k: v for k, v in one["state_dict"].items() if k.startswith("ema.")} for one in (ours, theirs)
                ]
                demand(len(averages[0]) > 2, "there is no average in the checkpoint")
                demand_same(averages[0], averages[1], f"the average in {file.name}")
    return "equal in every later checkpoint"


@fault(27, "clock and file times in disorder")
def times(place: Place) -> str:
    """The times of a run's checkpoints are reversed, all equal, or in the future; the clock jumps back by a day.

    Expected: the checkpoint of the highest step is chosen, and the run ends as the undisturbed one.
    """
    straight = Run(place.new("straight"), stage2(place.lab, steps=12, every=3, keep=9))
    straight.complete()
    for kind in place.some(("reversed", "equal", "future"), quick=1):
        with place.trial(kind):
            run = straight.copy(place.new("times"))
            for file in run.folder.checkpoints.iterdir():
                step = store.load(file)["global_step"]
                if step == 12:
                    file.unlink()
                moment = {"reversed": 1e9 - step, "equal": 1e9, "future": 4e9 - step}[kind]
                if file.exists():
                    os.utime(file, (moment, moment))
            run.complete()
            demand_same(run.final(), straight.final())
            demand(min(int(row[0]) for row in run.metrics(after=9)) == 10, "it did not go on from step 9")
            demand(run.state.resume_from == "checkpoints/step=00000012.ckpt", f"{run.state.resume_from}")
    with place.trial("the clock jumps back"):
        run = Run(place.new("clock"), straight.tree)

        def jump() -> None:
            now, began = time.time, time.monotonic()
            time.time = lambda: now() - 86_400 * (time.monotonic() > began + 0.5)
            slow_steps(0.05)()

        run.complete(hook=jump)
        demand_same(run.final(), straight.final())
    return "chosen by step (the system's own clock was left alone)"
