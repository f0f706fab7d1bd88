"""ldm.runtime.launcher: no process of a run outlives the others."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ldm.runtime import launcher
from tests.points import in_a_child, wait_until

ROOT = Path(launcher.__file__).parents[2]
SLEEPER = "import time; from ldm.runtime import launcher; launcher.tie_to_starter(); print(flush=True); time.sleep(100)"


def alive(process: int) -> bool:
    return launcher._state(process) not in ("", "Z")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_RANK", "LDM_STARTER"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("starter", ["torchrun", "rank 0", "shell"])
def test_a_rank_dies_with_its_launcher_and_a_program_not_with_its_shell(tmp_path: Path, starter: str) -> None:
    def launching() -> None:
        environment = {"torchrun": {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "0"}, "rank 0": {"LOCAL_RANK": "1"}}
        launcher.tie_to_starter()  # known to its children
        own = os.environ | environment.get(starter, {})
        child = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, env=own, cwd=ROOT)
        assert child.stdout is not None
        child.stdout.readline()
        (tmp_path / "child").write_text(str(child.pid))
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(launching) == -signal.SIGKILL
    child = int((tmp_path / "child").read_text())
    if starter == "shell":
        time.sleep(0.5)
        assert alive(child)
        os.kill(child, signal.SIGKILL)
    assert wait_until(lambda: not alive(child), 5)


def test_a_rank_whose_parent_died_before_it_looked_does_not_stay() -> None:
    os.environ.update(LDM_STARTER=str(os.getppid()), LOCAL_RANK="1")  # not the parent of what follows
    try:
        ended = subprocess.run([sys.executable, "-c", SLEEPER], capture_output=True, timeout=20, cwd=ROOT)
    finally:
        del os.environ["LDM_STARTER"], os.environ["LOCAL_RANK"]
    assert ended.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("child_does", "expected"), [("sys.exit(3)", 7), ("os.kill(os.getpid(), 9)", 7), ("sys.exit(0)", 0)]
)
def test_the_watch_ends_a_process_that_misses_its_child(tmp_path: Path, child_does: str, expected: int) -> None:
    def watching() -> None:
        child = subprocess.Popen([sys.executable, "-c", f"import os, sys; {child_does}"])
        launcher.Watch([child], lambda reason: (tmp_path / "told").write_text(reason) and None, grace=0.5)
        time.sleep(5)  # in a collective

    assert in_a_child(watching) == expected
    assert (tmp_path / "told").exists() == bool(expected)


def test_the_watch_leaves_alone_who_is_about_to_leave() -> None:
    def watching() -> None:
        child = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(1)"])
        watch = launcher.Watch([child], lambda reason: None, grace=1.0)
        child.wait()
        time.sleep(0.7)
        watch.close()
        time.sleep(2)

    assert in_a_child(watching) == 0


def test_children_are_waited_for_and_then_killed() -> None:
    children = [subprocess.Popen(["sleep", seconds]) for seconds in ("0.2", "100")]
    os.kill(children[1].pid, signal.SIGSTOP)
    launcher.end_children(children, seconds=1.0)
    assert children[0].returncode == 0
    assert children[1].wait(5) == -signal.SIGKILL


def test_stopped_ranks_of_the_same_agent_are_ended() -> None:
    def agent() -> None:
        workers = [subprocess.Popen(["sleep", "100"]) for _ in range(2)]
        os.kill(workers[0].pid, signal.SIGSTOP)
        assert wait_until(lambda: launcher._state(workers[0].pid) == "T", 5)
        finder = [sys.executable, "-c", "from ldm.runtime import launcher; launcher.end_stopped()"]
        for environment, code in ({}, None), ({"TORCHELASTIC_RUN_ID": "x"}, -signal.SIGKILL):
            assert subprocess.run(finder, env=os.environ | environment, cwd=ROOT).returncode == 0
            assert wait_until(lambda code=code: workers[0].poll() == code, 5)
        assert workers[1].poll() is None
        workers[1].kill()

    assert in_a_child(agent) == 0


def test_a_stopped_rank_0_is_ended_by_its_child() -> None:
    def rank_0() -> None:
        launcher.tie_to_starter()
        child = os.fork()
        if child == 0:
            os.environ["LOCAL_RANK"] = "1"
            wait_until(lambda: launcher._state(os.getppid()) == "T", 10)
            launcher.end_stopped()
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSTOP)

    assert in_a_child(rank_0) == -signal.SIGKILL


def test_leaving_runs_exit_hooks_and_flushes(tmp_path: Path) -> None:
    program = (
        "import atexit, sys; from pathlib import Path; from ldm.runtime import launcher;"
        f"atexit.register(lambda: Path({str(tmp_path / 'hook')!r}).touch()); print('said', end=''); launcher.leave(5)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=20)
    assert (ended.returncode, ended.stdout) == (5, "said")
    assert (tmp_path / "hook").exists()
