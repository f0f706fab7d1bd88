"""Faults of ranks, launchers and networks: nobody waits for ever, nobody trains on alone, the checkpoint stands."""

import os
import signal
import time
from functools import partial

from ldm.checkpoints import store
from scripts.faults import machine
from scripts.faults.harness import Place, fault
from scripts.faults.inject import before_each_step, both, environments_as_started, slow_steps
from scripts.faults.interpreter import torchrun
from scripts.faults.processes import Child, Wrong, demand, descendants, fork, wait_until
from scripts.faults.runs import AGENT, MAIN, Run, all_gone, demand_same, last_line, ranks
from scripts.faults.tiny import Tree, stage2, two_ranks

LAUNCHERS = ("lightning", "torchrun")
CELLS = (("lightning", 1), ("torchrun", 0), ("lightning", 0), ("torchrun", 1))
TIMEOUT = 20.0
"""Seconds of the process group's patience in these trials; 300 by default."""


def _tree(place: Place, steps: int = 100_000) -> Tree:
    return two_ranks(stage2(place.lab, steps=steps, every=3, validate=10), TIMEOUT)


def _under_way(place: Place, launcher: str, workers: int = 0) -> tuple[Run, Child]:
    """A run on two ranks that has saved."""
    run = Run(place.new("run"), _tree(place))
    words, hook = [f"data.params.num_workers={workers}"], both(slow_steps(0.02), environments_as_started())
    child = run.start(*words, launcher=launcher, hook=hook)
    run.wait_for_step(place.random.randint(4, 12), child, 120)
    demand(len(ranks(child, launcher)) == 2, "there are no two ranks")
    return run, child


def _demand_peer_error(run: Run) -> None:
    """What a surviving rank has to say of the other."""
    state = run.state
    demand(
        state.status == "failed" and state.exit_code == 7,
        f"{state.status}, exit code {state.exit_code}: {state.reason}",
    )
    demand("rank" in state.reason, f"no rank is named: {state.reason}")


def _demand_intact(run: Run) -> None:
    """The last checkpoint is good, and the run can go on from it."""
    before = store.load(run.newest())["global_step"]
    alone = ("lightning.trainer.devices=1", "lightning.trainer.num_nodes=1")
    run.complete(f"lightning.trainer.max_steps={before + 3}", *alone)
    demand(store.load(run.newest())["global_step"] == before + 3, "it did not go on from the last checkpoint")


@fault(20, "rank killed")
def rank_killed(place: Place) -> str:
    """kill -9 of rank 0 or rank 1 of two, under both launchers.

    Expected: all processes gone within 10 s; the surviving rank says so with code 7 in run_state.json; the last
    checkpoint is good and the run goes on from it.
    """
    slowest = 0.0
    for number in place.repeats(5, quick=1):
        for launcher, rank in place.some(CELLS, quick=2):
            with place.trial(f"{launcher}, rank {rank}, {number}"):
                run, child = _under_way(place, launcher, workers=2 * (number % 2))
                os.kill(ranks(child, launcher)[rank], signal.SIGKILL)
                slowest = max(slowest, all_gone(child, 10))
                demand(child.code != 0, "exit code 0")
                if (launcher, rank) != ("lightning", 0):  # its launcher, with which everything ends at once
                    _demand_peer_error(run)
                _demand_intact(run)
    return f"all gone after at most {slowest:.1f} s"


@fault(21, "rank stopped")
def rank_stopped(place: Place) -> str:
    """SIGSTOP of rank 0 or rank 1 of two, under both launchers, with a timeout of 20 s.

    Expected: all processes, the stopped one too, gone within 30 s; code 7 in run_state.json; the checkpoint is good.
    """
    slowest = 0.0
    for number in place.repeats(2, quick=1):
        for launcher, rank in place.some(CELLS, quick=1):
            with place.trial(f"{launcher}, rank {rank}, {number}"):
                run, child = _under_way(place, launcher)
                os.kill(ranks(child, launcher)[rank], signal.SIGSTOP)
                slowest = max(slowest, all_gone(child, TIMEOUT + 10))
                _demand_peer_error(run)
                _demand_intact(run)
    return f"all gone after at most {slowest:.1f} s"


@fault(22, "network cut between two nodes")
def network_cut(place: Place) -> str:
    """Two nodes (network namespaces with a cable between them), a torchrun agent with one rank on each; the cable is
    cut: link down, or packets into a black hole. Timeout 20 s.

    Expected: both ranks gone within 30 s; code 7 in run_state.json; the checkpoint is good.
    """
    slowest = longest = 0.0
    for how in ("link down", "black hole"):
        for number in place.repeats(2, quick=1):
            with place.trial(f"{how} {number}"):
                nodes = machine.TwoNodes()
                try:
                    run, agents = _on_two_nodes(place, nodes)
                    nodes.cut(how)
                    began = time.monotonic()
                    demand(_ranks_gone(agents, TIMEOUT + 10), "a rank is still alive after 30 s")
                    slowest = max(slowest, time.monotonic() - began)
                    demand(all(agent.ended(30) for agent in agents), "an agent is still alive 60 s after the cut")
                    longest = max(longest, time.monotonic() - began)
                    _demand_peer_error(run)
                    _demand_intact(run)
                finally:
                    nodes.remove()
    return f"ranks gone after at most {slowest:.1f} s, agents after {longest:.1f} s"


def _ranks_gone(agents: list[Child], seconds: float) -> bool:
    return wait_until(lambda: not any(descendants(agent.pid) for agent in agents), seconds)


def _on_two_nodes(place: Place, nodes: machine.TwoNodes) -> tuple[Run, list[Child]]:
    tree = _tree(place)
    tree["lightning"]["trainer"] |= {"devices": 1, "num_nodes": 2}
    run = Run(place.new("run"), tree)
    line = [str(MAIN), "--base", str(run.file), "--logdir", str(run.logs), "--resume", "auto"]

    def agent(node: int) -> None:
        nodes.enter(node)
        where = ["--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1", *AGENT]
        where += ["--master-addr", nodes.addresses[0], "--master-port", "29511"]
        torchrun(where, line, nodes.environment(node), slow_steps(0.02))

    agents = [fork(partial(agent, node), run.place / f"log.node{node}") for node in range(2)]
    run.wait_for_step(6, agents[0], 120)
    return run, agents


@fault(23, "launcher killed")
def launcher_killed(place: Place) -> str:
    """kill -9 of torchrun's agent, or of Lightning's launcher, which is rank 0, with loader workers.

    Expected: no process is left after 5 s, and the run can be taken up again at once.
    """
    slowest = 0.0
    for launcher in LAUNCHERS:
        for number in place.repeats(5, quick=1):
            with place.trial(f"{launcher} {number}"):
                run, child = _under_way(place, launcher, workers=2)
                child.send(signal.SIGKILL)
                slowest = max(slowest, all_gone(child, 5))
                _demand_intact(run)
    return f"nobody left after at most {slowest:.1f} s"


@fault(24, "error on one rank only")
def one_rank_fails(place: Place) -> str:
    """Rank 1 raises torch.OutOfMemoryError in a step.

    Expected: all gone within 15 s; the text says what to lower, run_state.json code 6; the checkpoint is good.
    """

    def fail(module: object, batch: object) -> None:
        import torch

        step = module.trainer.global_step  # type: ignore[attr-defined]
        if step == 7 and os.environ.get("LOCAL_RANK") == "1":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    slowest = 0.0
    for launcher in LAUNCHERS:
        for number in place.repeats(3, quick=1):
            with place.trial(f"{launcher} {number}"):
                run = Run(place.new("run"), _tree(place))
                child = run.start(launcher=launcher, hook=before_each_step(fail))
                run.wait_for_step(6, child)
                slowest = max(slowest, all_gone(child, 15))
                text = child.output()
                demand(child.code not in (0, None), "exit code 0")
                demand("out of memory" in text and "micro_batch_size" in text, f"it says: {last_line(text)}")
                demand(run.state.exit_code == 6, f"run_state.json says {run.state.exit_code}: {run.state.reason}")
                _demand_intact(run)
    return f"all gone after at most {slowest:.1f} s"


@fault(25, "disk of rank 0 full, on two ranks")
def full_on_two_ranks(place: Place) -> str:
    """The disk of the run folder fills up during a run on two ranks.

    Expected: no hang: both ranks agree to go on, or to end with code 6; the old checkpoint is good.
    """
    machine.private_mounts()
    for launcher in LAUNCHERS:
        for number in place.repeats(3, quick=1):
            with place.trial(f"{launcher} {number}"):
                disk = machine.small_disk(place.new("disk"), 12)
                run = Run(place.new("run"), _tree(place, steps=60), logs=disk / "logs")
                child = run.start(launcher=launcher, hook=slow_steps(0.02))
                run.wait_for_step(6, child)
                filler = machine.fill(disk)
                all_gone(child, 60)
                expected = (6,) if launcher == "lightning" else (1,)
                demand(child.code in expected, f"exit code {child.code}: {last_line(child.output())}")
                demand("needed" in child.output(), "no word of the bytes needed")
                filler.unlink()
                _demand_intact(run)
    return "no hang"


@fault(41, "lost rank, torchrun --max-restarts")
def restarted(place: Place) -> str:
    """kill -9 of a random rank under torchrun --max-restarts 3, with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.

    Expected: the run goes on by itself from its last checkpoint and ends as the undisturbed one.
    """
    straight = Run(place.new("straight"), _tree(place, steps=40))
    straight.complete(launcher="torchrun")
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    for number in place.repeats(6, quick=1):
        with place.trial(f"run {number}"):
            run = Run(place.new("run"), straight.tree)
            how = {"launcher": "torchrun", "environment": environment, "hook": slow_steps(0.02)}
            child = run.start(agent=["--max-restarts", "3"], **how)  # type: ignore[arg-type]
            run.wait_for_step(place.random.randint(5, 20), child)
            os.kill(ranks(child, "torchrun")[place.random.randint(0, 1)], signal.SIGKILL)
            try:
                code = child.wait(90)
            except Wrong:
                raise Wrong(f"hung at step {run.step()}") from None
            demand(code == 0, f"exit code {code}: {last_line(child.output())}")
            demand_same(run.final(), straight.final())
    return "went on by itself"
