"""Faults of sharded and of asynchronous saves, and of the queue that starts a run again."""

import os
import signal
import time
from pathlib import Path

from ldm.checkpoints import store
from scripts.faults.harness import Place, fault
from scripts.faults.inject import diary, slow_saves, slow_steps
from scripts.faults.processes import demand
from scripts.faults.runs import Run, all_gone, demand_same, essence, last_line, no_leftovers
from scripts.faults.tiny import Tree, elastic, node, stage2


def _sharded(place: Place, steps: int = 24, every: int = 4) -> Tree:
    """FSDP2 on two ranks, each of which saves its own rows."""
    tree = stage2(place.lab, steps=steps, every=every, keep=3, validate=12)
    tree["lightning"]["trainer"]["devices"] = 2
    tree["lightning"]["strategy"] = node("ldm.training.strategies.FSDP2", timeout=20, sharded_checkpoints=True)
    return tree


def _demand_close(ours: Tree, theirs: Tree) -> None:
    """Raise Wrong unless two states agree to the rounding of another order of summation."""
    demand(ours["images_seen"] == theirs["images_seen"], "another number of images was seen")
    weights = [one["state_dict"] for one in (ours, theirs)]
    demand(weights[0].keys() == weights[1].keys(), "other weights")
    for name, value in weights[0].items():
        if hasattr(value, "sub"):
            apart = float((value.float() - weights[1][name].float()).abs().max())
            demand(apart < 1e-5, f"{name} differs by {apart:g}")


@fault(42, "sharded checkpoints", limit=1800)
def sharded(place: Place) -> str:
    """FSDP2 on two ranks, each saving its rows: kill -9 of both during saves; a shard flipped, cut or missing; going on
    on one rank and on two.

    Expected: the newest checkpoint whose shards are all whole is used, what is half written is swept, the samples are
    those of one rank, and on two ranks the end is that of the undisturbed run, bit for bit.
    """
    tree = _sharded(place)
    straight = Run(place.new("straight"), tree)
    straight.complete(launcher="lightning")
    folders = list(straight.folder.checkpoints.glob("*.shards"))
    demand(folders, "there are no shards")
    for number in place.repeats(20, quick=1):
        with place.trial(f"killed {number}"):
            run = Run(place.new("run"), tree)
            child = run.start(
                "lightning.callbacks.checkpoints.params.every=1", launcher="lightning", hook=slow_steps(0.02)
            )
            run.wait_for_step(place.random.randint(2, 12), child)
            time.sleep(place.random.uniform(0.0, 0.1))
            child.send_group(signal.SIGKILL)
            all_gone(child, 10)
            run.complete(launcher="lightning")
            demand_same(run.final(), straight.final())
            no_leftovers(run)
            named = {path.name.rpartition(".ckpt")[0] for path in run.folder.checkpoints.glob("*.shards")}
            files = {path.stem for path in run.folder.checkpoints.glob("*.ckpt")}
            demand(named <= files, f"shards of no checkpoint: {named - files}")
    for harm in place.some(("flipped", "cut", "missing"), quick=1):
        with place.trial(f"shard {harm}"):
            run = straight.copy(place.new("harmed"))
            newest = run.newest()
            shard = sorted((run.folder.checkpoints).glob(f"{newest.name}.*.shards/*.safetensors"))[-1]
            _harm(shard, harm)
            text = run.complete(launcher="lightning").output()
            demand(shard.name in text, f"{shard.name} is not named")
            demand_same(run.final(), straight.final())
    for launcher in place.some(("torchrun", "lightning"), quick=1):
        with place.trial(f"2 -> 1 -> 2, {launcher}"):
            _on_other_ranks(place, launcher)
    return "the newest whole one is used"


def _harm(shard: Path, harm: str) -> None:
    data = bytearray(shard.read_bytes())
    if harm == "missing":
        shard.unlink()
        return
    data[len(data) // 2] ^= 4
    shard.write_bytes(data if harm == "flipped" else data[: len(data) // 2])


def _on_other_ranks(place: Place, launcher: str) -> None:
    tree, one_rank = elastic(_sharded(place)), ("lightning.trainer.devices=1", "lightning.strategy=auto")
    straight = Run(place.new("alone"), tree)
    straight.complete(*one_rank)
    run, folder = Run(place.new("elastic"), tree), place.new("diary")
    legs = ((7, launcher, ()), (15, "single", one_rank), (24, launcher, ()))
    for until, how, words in legs:
        run.complete(f"lightning.trainer.max_steps={until}", *words, launcher=how, hook=diary(folder))
    seen = sorted(line for file in folder.iterdir() for line in file.read_text().splitlines())
    demand([line.split()[:2] for line in seen] == sorted([str(n // 6), str(n)] for n in range(144)), "other samples")
    _demand_close(run.final(), straight.final())


@fault(43, "training goes on during a save")
def asynchronous(place: Place) -> str:
    """Every save takes 0.3 s, in which some ten steps change weights, average and moments.

    Expected: each file holds the state of its own step, as a run that waits for its saves writes it.
    """
    tree = stage2(place.lab, steps=24, every=6, keep=9)
    waiting = Run(place.new("waiting"), tree)
    waiting.complete("lightning.callbacks.checkpoints.params.asynchronous=false")
    for number in place.repeats(5, quick=1):
        with place.trial(f"run {number}"):
            run = Run(place.new("run"), tree)
            run.complete(hook=slow_saves(0.3))
            names = sorted(file.name for file in run.folder.checkpoints.glob("step=*.ckpt"))
            demand(len(names) == 4, f"saved: {names}")
            for name in names:
                ours, theirs = (essence(one.folder.checkpoints / name) for one in (run, waiting))
                demand_same(ours, theirs, name)
    return "each of its own step"


@fault(44, "SLURM's warning, in front of a stand-in for scontrol")
def requeued(place: Place) -> str:
    """SIGUSR1 to a run with SLURM's variables, where `scontrol` is a script that writes down what it is asked for.

    Expected: saved, code 138, requeued once by its number; the same command goes on to the end of an undisturbed run.
    """
    straight = Run(place.new("straight"), stage2(place.lab, steps=40, every=5))
    straight.complete()
    for number in place.repeats(5, quick=1):
        with place.trial(f"run {number}"):
            tools, asked = place.new("bin"), place.new("asked") / "asked"
            (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
            (tools / "scontrol").chmod(0o755)
            job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "ldm", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
            job |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "SLURM_NNODES": "1"}
            job |= {"PATH": f"{tools}:{os.environ['PATH']}"}
            run = Run(place.new("run"), straight.tree)
            child = run.start(environment=job, hook=slow_steps(0.02))
            run.wait_for_step(place.random.randint(2, 20), child)
            child.send(signal.SIGUSR1)
            code = child.wait(30)
            demand(code == 138, f"exit code {code}: {last_line(child.output())}")
            demand(asked.exists() and asked.read_text() == "requeue 4711\n", "it was not requeued, once")
            saved = store.load(run.newest())["global_step"]
            demand(saved == run.state.step > 0, f"{saved} is saved, {run.state.step} was reached")
            run.complete(environment=job)
            demand_same(run.final(), straight.final())
            demand(not list(run.folder.path.rglob("hpc_ckpt*")), "a checkpoint of Lightning's own")
    return "saved, requeued, gone on (the real scontrol was not asked)"
