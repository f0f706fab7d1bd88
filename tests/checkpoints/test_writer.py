"""Saves in a thread, kill -9 during one, which checkpoints are kept, and what is swept away."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from ldm.checkpoints import store, writer
from ldm.checkpoints.writer import Writer
from tests.points import wait_until


def test_training_goes_on_during_a_save_and_the_save_is_of_its_own_step(tmp_path, monkeypatch):
    opened, tried, save = threading.Event(), [], store.save

    def waits(path: Path, state: dict) -> None:
        tried.append(state["global_step"])
        opened.wait(30)
        save(path, state)

    monkeypatch.setattr(store, "save", waits)
    files = Writer()
    files.asynchronous = True
    weight = torch.zeros(1000)
    files.save({"global_step": 1, "state_dict": {"weight": weight}}, tmp_path / "1.ckpt")
    weight += 1  # the next step
    second = threading.Thread(
        target=files.save, args=({"global_step": 2, "state_dict": {"weight": weight}}, tmp_path / "2.ckpt")
    )
    second.start()
    time.sleep(0.2)
    assert tried == [1]  # one at a time
    assert not (tmp_path / "1.ckpt").exists()
    opened.set()
    second.join()
    assert files.wait() is None
    for step in (1, 2):
        state = store.load(tmp_path / f"{step}.ckpt")
        assert torch.equal(state["state_dict"]["weight"], torch.full((1000,), step - 1.0))


def test_no_thread_outlives_its_save(tmp_path):
    """Its OpenMP team would: two threads too many, and training on a CPU takes twice as long from then on."""
    files = Writer()
    files.asynchronous = True
    for step in (1, 2):
        files.save({"global_step": step}, tmp_path / f"{step}.ckpt")
    files.wait()
    assert wait_until(lambda: not any(thread.name.startswith("checkpoint") for thread in threading.enumerate()), 5)


def test_the_first_save_is_read_back(tmp_path, monkeypatch):
    read: list[Path] = []
    monkeypatch.setattr(store, "verify", read.append)
    files = Writer()
    for step in (1, 2):
        files.save({"global_step": step}, tmp_path / f"{step}.ckpt")
    assert read == [tmp_path / "1.ckpt"]


def test_a_first_save_that_cannot_be_read_back_is_a_failure(tmp_path, monkeypatch):
    files, save = Writer(), store.save

    def damages(path: Path, state: dict) -> None:
        save(path, state)
        os.truncate(path, 100)

    monkeypatch.setattr(store, "save", damages)
    with pytest.raises(Exception, match="truncated"):
        files.save({"global_step": 1}, tmp_path / "1.ckpt")


# ---------------------------------------------------------------------- kill -9


def saves_for_ever(folder: Path, acknowledged: int) -> None:
    """Saves as training does; writes each step that is on the disk to the pipe."""
    files = Writer()
    files.asynchronous = True
    weight, step = torch.zeros(1 << 20), 0
    last: list[int] = []

    def published() -> None:
        writer.tidy(folder, keep=2, keep_every=None, scores={}, keep_best=1)
        os.write(acknowledged, f"{last[0]}\n".encode())

    files.published = published
    while True:
        step += 1
        weight.fill_(step)
        files.wait()
        last[:] = [step]
        files.save({"global_step": step, "state_dict": {"weight": weight}}, writer.file_of(folder, step))


def kill_while_saving(folder: Path, seconds: float) -> None:
    folder.mkdir(parents=True)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        killer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        killer.start()
        saves_for_ever(folder, writing)
    os.close(writing)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with os.fdopen(reading) as pipe:
        steps = [int(line) for line in pipe.read().split("\n")[:-1]]
    newest = store.newest(folder)
    if steps:
        assert newest is not None
        state = store.load(newest)
        assert state["global_step"] >= steps[-1]
        assert bool((state["state_dict"]["weight"] == state["global_step"]).all())
    assert not list(folder.glob("*.corrupt"))
    writer.sweep(folder)
    assert not list(folder.glob("*.tmp.*"))
    assert len(list(folder.iterdir())) <= 3


@pytest.mark.parametrize("number", [3, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", ["temporary", "/dev/shm"])
def test_kill_9_during_a_save_in_the_background(tmp_path, place, number):
    folder = tmp_path if place == "temporary" else Path(place) / f"ldm-test-{os.getpid()}"
    draw = random.Random(number)
    try:
        for trial in range(number):
            kill_while_saving(folder / str(trial), draw.uniform(0.0, 0.3))
            shutil.rmtree(folder / str(trial))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------------- names and leftovers


def test_later_checkpoints_are_set_aside(tmp_path):
    for step in (2, 4, 6):
        store.save(writer.file_of(tmp_path, step), {"global_step": step})
    (tmp_path / "best.ckpt").symlink_to("step=00000006.ckpt")
    aside = writer.set_aside_later(tmp_path, 4)
    assert not (tmp_path / "best.ckpt").is_symlink()
    assert [path.name for path in aside] == ["step=00000006.ckpt.superseded"]
    assert store.newest(tmp_path) == tmp_path / "step=00000004.ckpt"


def test_sweep_spares_a_living_saver(tmp_path: Path) -> None:
    dead = tmp_path / "a.ckpt.tmp.elsewhere.4711"
    dead.write_bytes(b"half a checkpoint")
    alive = tmp_path / "b.ckpt.tmp.elsewhere.4712"
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'wb'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True)"
    with subprocess.Popen([sys.executable, "-c", code + "; time.sleep(60)", alive], stdout=subprocess.PIPE) as saver:
        assert saver.stdout is not None
        assert saver.stdout.readline()
        assert writer.sweep(tmp_path) == [dead]
        saver.kill()
    assert writer.sweep(tmp_path) == [alive]
