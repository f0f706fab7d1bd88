import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm import run_folder
from ldm.errors import CheckpointError, ConfigError, LockError
from ldm.run_folder import RunFolder, RunState

HOLD_LOCK = """
import sys, time
from pathlib import Path
from ldm.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).owned():
    print("held", flush=True)
    time.sleep(60)
"""


def made(logdir: Path, name: str) -> RunFolder:
    folder = RunFolder(logdir / name)
    folder.make()
    folder.config_file.write_text("seed: 1\n")
    return folder


def test_create_makes_the_whole_folder_and_never_the_same_twice(tmp_path):
    first = run_folder.create(tmp_path, "faces", "_big")
    second = run_folder.create(tmp_path, "faces", "_big")
    assert first.path != second.path
    assert first.name == "faces_big"
    assert {path.relative_to(first.path).as_posix() for path in first.path.rglob("*")} == {
        *("checkpoints", "configs", "images", "images/train", "images/val"),
    }


def test_newest_goes_by_the_time_in_the_name(tmp_path):
    new = made(tmp_path, "2026-02-01T00-00-00_faces")
    old = made(tmp_path, "2026-01-31T23-59-59_faces")
    made(tmp_path, "2026-03-01T00-00-00_faces_big")
    (tmp_path / "2026-04-01T00-00-00_faces").mkdir()  # died before it wrote its configuration
    os.utime(old.path)
    assert run_folder.newest(tmp_path, "faces") == new
    assert run_folder.newest(tmp_path, "face") is None
    assert run_folder.newest(tmp_path / "missing", "faces") is None


def test_both_ways_to_the_newest_run_agree(tmp_path):
    made(tmp_path, "2026-01-31T23-59-59_faces")
    for start in ("2026-02-01T00-00-00", "20260202T000000", "2026-02-02T00-00-01"):
        new = made(tmp_path, f"{start}_faces")
        assert run_folder.newest(tmp_path, "faces") == new
        assert run_folder.newest_run(f"{tmp_path}/*_faces") == str(new.path)


@pytest.mark.parametrize("copy", ["20261122-old-99", "2026-11-22T09-00-00-copy2", "2026-11-22"])
def test_a_renamed_copy_is_not_the_newest_run(tmp_path, copy):
    run = made(tmp_path, "2026-01-31T23-59-59_faces")
    made(tmp_path, f"{copy}_faces")
    assert run_folder.newest(tmp_path, "faces") == run


def test_resolve_takes_a_folder_a_checkpoint_or_a_file_elsewhere(tmp_path):
    folder = made(tmp_path, "2026-01-01T00-00-00_faces")
    inside = folder.checkpoints / "step=1.ckpt"
    elsewhere = tmp_path / "downloaded.ckpt"
    inside.touch()
    elsewhere.touch()
    assert run_folder.resolve(str(folder.path), tmp_path) == (folder, None)
    assert run_folder.resolve(str(folder.checkpoints), tmp_path) == (folder, None)
    assert run_folder.resolve(str(inside), tmp_path) == (folder, inside)
    assert run_folder.resolve(str(elsewhere), tmp_path) == (None, elsewhere)


def test_resolve_says_which_runs_there_are(tmp_path):
    made(tmp_path, "2026-01-01T00-00-00_faces")
    with pytest.raises(CheckpointError, match=r"does not exist(.|\n)*2026-01-01T00-00-00_faces"):
        run_folder.resolve(str(tmp_path / "2026-01-01T00-00-00_face"), tmp_path)
    with pytest.raises(CheckpointError, match=r"has no configs/config\.yaml"):
        run_folder.resolve(str(tmp_path), tmp_path)


def test_state_round_trip_and_damage(tmp_path):
    folder = made(tmp_path, "2026-01-01T00-00-00_faces")
    assert folder.read_state() is None
    state = RunState("stopped", 7, "signal 15", 143, "checkpoints/step=7.ckpt")
    folder.write_state(state)
    assert folder.read_state() == state
    assert json.loads(folder.state_file.read_text())["pid"] == os.getpid()
    assert not list(folder.path.glob("*.tmp.*"))
    folder.state_file.write_text("{")
    assert folder.read_state() is None


def test_a_second_process_is_refused_and_told_who(tmp_path):
    folder = made(tmp_path, "2026-01-01T00-00-00_faces")
    holder = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, str(folder.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockError, match=f"process {holder.pid} on "), folder.owned():
            pass
    finally:
        holder.kill()
        holder.wait()
    leftovers = [folder.path / "run_state.json.tmp.host.1", folder.config_file.with_name("facts.json.tmp.host.2")]
    for leftover in leftovers:
        leftover.touch()
    with folder.owned():  # a dead owner's lock is free
        assert json.loads((folder.path / "lock").read_text())["pid"] == os.getpid()
        assert not any(leftover.exists() for leftover in leftovers)
    assert folder.config_file.exists()


@pytest.mark.parametrize("name", ["a/b", "..\\x", "two words", ""])
def test_names_that_are_no_folder_names(name):
    with pytest.raises(ConfigError):
        run_folder.check_name(name)


WRITTEN = ["configs/config.yaml", "metrics.csv", "wandb/run/files/a", "lightning_logs/version_0/b", "fit-profile.txt"]


def test_a_run_without_a_step_leaves_no_folder_and_one_with_a_step_all_of_it(tmp_path):
    def start(folder: RunFolder) -> None:
        for file in (*WRITTEN, "configs/source.yaml", "configs/facts.json", "lock"):
            (folder.path / file).parent.mkdir(parents=True, exist_ok=True)
            (folder.path / file).touch()
        folder.write_state(RunState("failed"))
        raise KeyboardInterrupt

    for used in (False, True):
        folder = run_folder.create(tmp_path, "faces")
        with pytest.raises(KeyboardInterrupt), run_folder.removed_if_unused(folder, lambda used=used: used):
            start(folder)
        assert folder.path.exists() == used
    assert all((folder.path / file).exists() for file in WRITTEN)


@pytest.mark.parametrize("file", ["checkpoints/stopped.ckpt", "metrics.csv", "wandb/run", "images/val/a.png"])
def test_results_are_all_but_what_says_how_a_run_stands(tmp_path, file):
    folder = made(tmp_path, "2026-01-01T00-00-00_faces")
    folder.write_state(RunState("failed"))
    for known in (folder.source_file, folder.facts_file, folder.path / "lock"):
        known.touch()
    assert not folder.has_results()
    (folder.path / file).parent.mkdir(exist_ok=True)
    (folder.path / file).touch()
    assert folder.has_results()
