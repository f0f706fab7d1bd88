"""Whole programs under each launcher: a rank that is lost ends the run, or is replaced, and nobody is left behind.

Each starts interpreters of its own, which takes half a minute: a few of the combinations that the catalogue of faults
(16, 20, 21, 23) tries all of.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import main
from ldm.checkpoints import store
from ldm.config.load import to_yaml
from ldm.run_folder import RunFolder, RunState
from tests.points import wait_until

pytestmark = pytest.mark.slow

ROOT = Path(main.__file__).parent
TIMEOUT = 15.0
START = 200.0  # seconds, on a busy machine
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]


class Program:
    """main.py on two ranks, in a process group of its own."""

    def __init__(self, launcher: list[str], *words: str) -> None:
        self.mark = f"{Path.cwd()}:{time.monotonic()}"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        environment["LDM_TEST"] = self.mark
        command = [*launcher, str(ROOT / "main.py"), "--base", "stage1.yaml", *words]
        with Path("log").open("wb") as log:
            self.top = subprocess.Popen(
                command, env=environment, start_new_session=True, stdout=log, stderr=subprocess.STDOUT
            )

    def processes(self) -> dict[int, str]:
        """{process id: rank, or "" for a launcher} of all that it has started and that live, loader workers too."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                environment = (folder / "environ").read_text(errors="replace").split("\0")
                variables = dict(line.split("=", 1) for line in environment if "=" in line)
                if variables.get("LDM_TEST") == self.mark:
                    found[int(folder.name)] = variables.get("LOCAL_RANK", "")
        return found

    def rank(self, number: int) -> int:
        """The process id of a rank; rank 0 of Lightning's launcher was started without a number."""
        found = [process for process, rank in self.processes().items() if rank == str(number)]
        return min(found) if found else self.top.pid

    def end(self) -> None:
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


@pytest.fixture
def stage1(autoencoder_tree, tmp_path, monkeypatch) -> dict[str, Any]:
    """Stage 1 on two ranks, for ever, saved every 10 steps, written to stage1.yaml in the working folder."""
    monkeypatch.chdir(tmp_path)
    trainer = {"max_steps": 1_000_000, "val_check_interval": 1_000_000, "log_every_n_steps": 10, "devices": 2}
    autoencoder_tree["lightning"]["trainer"] |= trainer
    autoencoder_tree["lightning"]["strategy"] = {
        "target": "ldm.training.strategies.DDP",
        "params": {"timeout": TIMEOUT},
    }
    autoencoder_tree["lightning"]["callbacks"] = {
        "checkpoints": {"target": "ldm.training.callbacks.checkpoints.Checkpoints", "params": {"every": 10}}
    }
    Path("stage1.yaml").write_text(to_yaml(autoencoder_tree))
    return autoencoder_tree


@pytest.fixture
def programs(stage1) -> Iterator[list[Program]]:
    """Filled by the test; all of them are ended after it."""
    started: list[Program] = []
    yield started
    for program in started:
        program.end()
        print(Path("log").read_text()[-4000:])


def folder() -> RunFolder | None:
    runs = [*Path("logs").glob("*")]
    return RunFolder(runs[0]) if runs else None


def saved() -> bool:
    run = folder()
    return run is not None and any(run.checkpoints.glob("*.ckpt"))


def step() -> int:
    """Of the newest checkpoint, which is whole."""
    run = folder()
    assert run is not None
    return int(store.load(store.verify(run.path).path)["global_step"])


def state() -> RunState:
    run = folder()
    found = None if run is None else run.read_state()
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("launcher", "lost", "number"),
    [
        ("torchrun", 0, signal.SIGSTOP),
        ("torchrun", 1, signal.SIGKILL),
        ("lightning", 0, signal.SIGKILL),
        ("lightning", 1, signal.SIGSTOP),
    ],
)
def test_a_lost_rank_ends_the_run_and_nobody_stays(programs, launcher, lost, number):
    program = Program(TORCHRUN if launcher == "torchrun" else [sys.executable])
    programs.append(program)
    assert wait_until(saved, START)
    before = time.monotonic()
    os.kill(program.rank(lost), number)
    limit = 10 if number == signal.SIGKILL else TIMEOUT + 10
    assert wait_until(lambda: program.top.poll() is not None, limit + 5)
    assert wait_until(lambda: not program.processes(), 5)
    assert time.monotonic() - before < limit
    if launcher == "lightning" and (lost == 0):
        assert program.top.returncode == -signal.SIGKILL  # the first rank is the program
    else:
        assert program.top.returncode == (1 if launcher == "torchrun" else 7)
    if (launcher, lost, number) != ("lightning", 0, signal.SIGKILL):  # there its children die in the same moment
        assert (state().status, state().exit_code) == ("failed", 7)
    assert step() > 0


@pytest.mark.parametrize(
    ("target", "number"), [("first", signal.SIGTERM), ("second", signal.SIGUSR1), ("group", signal.SIGTERM)]
)
def test_lightnings_launcher_stops_as_one(programs, target, number):
    program = Program([sys.executable])
    programs.append(program)
    assert wait_until(saved, START)
    before = time.monotonic()
    if target == "group":
        os.killpg(program.top.pid, number)
    else:
        os.kill(program.rank(int(target == "second")), number)
    assert program.top.wait(30) == 128 + number
    assert wait_until(lambda: not program.processes(), 5)
    assert time.monotonic() - before < 30
    assert (state().status, state().exit_code) == ("stopped", 128 + number)
    assert step() > 10


def test_the_launcher_killed_takes_its_ranks_along(programs):
    program = Program(TORCHRUN)
    programs.append(program)
    assert wait_until(saved, START)
    program.top.kill()
    program.top.wait()
    assert wait_until(lambda: not program.processes(), 5)


def test_torchrun_replaces_a_lost_rank_and_the_run_goes_on(programs):
    steps = 60
    words = ("-r", "auto", f"lightning.trainer.max_steps={steps}")
    program = Program([*TORCHRUN, "--max-restarts=1"], *words)
    programs.append(program)
    assert wait_until(saved, START)
    os.kill(program.rank(1), signal.SIGKILL)
    assert program.top.wait(START) == 0
    assert (state().status, state().step) == ("finished", steps)
    assert len([*Path("logs").iterdir()]) == 1
