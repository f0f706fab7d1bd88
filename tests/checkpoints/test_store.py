"""The store: a save is all or nothing, a damaged file is never loaded, and nothing but data goes in or out."""

import errno
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoints import sealed_file, state_tree, store, writer
from ldm.errors import CheckpointError, NumericError, ResourceError


def a_state(step: int, values: int = 1000) -> dict:
    weights = OrderedDict(weight=torch.full((values,), float(step)), count=torch.tensor(step))
    return {
        "state_dict": weights,
        "global_step": step,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"betas": (0.9, 0.999)}]}],
        "ldm": {"format": 1, "step": step, "config": {"model": {"target": "x", "flag": True, "none": None}}},
    }


@pytest.fixture(autouse=True)
def _a_safe_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", raising=False)


@pytest.fixture
def shared_memory(tmp_path: Path):
    """A folder on another file system than the temporary one."""
    if not Path("/dev/shm").is_dir() or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("no second file system at /dev/shm")
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    state = a_state(7)
    store.save(tmp_path / "deep" / "last.ckpt", state)
    back = store.load(tmp_path / "deep" / "last.ckpt")
    assert torch.equal(back["state_dict"]["weight"], state["state_dict"]["weight"])
    assert back["optimizer_states"][0]["param_groups"] == state["optimizer_states"][0]["param_groups"]
    assert back["ldm"] == state["ldm"]
    assert os.listdir(tmp_path / "deep") == ["last.ckpt"]


def test_every_permitted_type_loads_again(tmp_path: Path) -> None:
    values = {
        "leaves": [None, True, 3, 2.5, 1j, "text", b"bytes", torch.float16, torch.device("cpu")],
        "containers": [{}, OrderedDict(a=1), [1], (1, 2), {1, 2}, torch.Size([2, 3])],
        "tensors": [torch.ones(2), torch.nn.Parameter(torch.ones(2)), torch.ones(2, dtype=torch.bfloat16)],
    }
    store.save(tmp_path / "a.ckpt", values)
    back = store.load(tmp_path / "a.ckpt")
    assert back["leaves"] == values["leaves"]
    assert back["containers"] == values["containers"]
    assert all(torch.equal(new, old) for new, old in zip(back["tensors"], values["tensors"], strict=True))


def test_plain_torch_can_read_the_file(tmp_path: Path) -> None:
    store.save(tmp_path / "a.ckpt", a_state(3))
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (OmegaConf.create({"a": 1}), "omegaconf"),
        (np.float64(1.0), "numpy.float64"),
        (np.zeros(2), "numpy.ndarray"),
        (Path("x"), "pathlib"),
        (print, "builtin"),
    ],
)
def test_a_value_that_would_not_load_again_is_refused_by_key(tmp_path: Path, value: object, kind: str) -> None:
    state = a_state(1) | {"hyper_parameters": {"deep": [0, {"lr": value}]}}
    with pytest.raises(CheckpointError, match=r"hyper_parameters\.deep\[1\]\.lr") as caught:
        store.save(tmp_path / "a.ckpt", state)
    assert kind in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_key_that_would_not_load_again_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"callbacks: a key: numpy\.int64"):
        store.save(tmp_path / "a.ckpt", {"callbacks": {np.int64(1): 2}})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_published(tmp_path: Path, bad: float) -> None:
    store.save(tmp_path / "last.ckpt", a_state(1))
    broken = a_state(2)
    broken["state_dict"]["weight"][17] = bad
    with pytest.raises(NumericError, match=r"state_dict\.weight"):
        store.save(tmp_path / "last.ckpt", broken)
    assert store.load(tmp_path / "last.ckpt")["global_step"] == 1


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    store.save(tmp_path / "a.ckpt", a_state(5, values=100))
    good = (tmp_path / "a.ckpt").read_bytes()
    draw = random.Random(0)
    for place in {*draw.sample(range(len(good)), 100), *range(64), *range(len(good) - 64, len(good))}:
        flipped = bytearray(good)
        flipped[place] ^= 1 << draw.randrange(8)
        (tmp_path / "a.ckpt").write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"a\.ckpt"):
            store.load(tmp_path / "a.ckpt")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_newest_gives_way_to_the_one_before(
    tmp_path: Path, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20):
        store.save(tmp_path / f"step={step}.ckpt", a_state(step))
    os.truncate(tmp_path / "step=20.ckpt", int(share * os.path.getsize(tmp_path / "step=20.ckpt")))
    with caplog.at_level(logging.WARNING):
        assert store.newest(tmp_path) == tmp_path / "step=10.ckpt"
    assert "step=20.ckpt" in caplog.text
    assert ("empty" if share == 0 else "seal") in caplog.text
    assert sorted(os.listdir(tmp_path)) == ["step=10.ckpt", "step=20.ckpt.corrupt"]


def test_newest_goes_by_the_step_inside(tmp_path: Path) -> None:
    for name, step in (("zz.ckpt", 3), ("aa.ckpt", 12), ("last.ckpt", 9)):
        store.save(tmp_path / name, a_state(step))
    os.utime(tmp_path / "aa.ckpt", (0, 0))
    (tmp_path / "aa.ckpt.tmp.host.1").write_bytes(b"half")
    assert store.newest(tmp_path) == tmp_path / "aa.ckpt"


def test_nothing_at_all_is_none_but_only_damaged_ones_are_an_error(tmp_path: Path) -> None:
    assert store.newest(tmp_path) is None
    (tmp_path / "a.ckpt").write_bytes(b"x" * 100)
    (tmp_path / "b.ckpt").write_bytes(b"")
    for _ in range(2):  # the second time there are only files set aside
        with pytest.raises(CheckpointError, match=r"(?s)a\.ckpt\.corrupt.*b\.ckpt\.corrupt"):
            store.newest(tmp_path)


def test_verify_takes_a_run_a_folder_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run" / "checkpoints" / "last.ckpt"
    store.save(file, a_state(1))
    assert [store.verify(path).path for path in (tmp_path / "run", file.parent, file)] == [file] * 3
    for wrong in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError, match=str(wrong)):
            store.verify(wrong)


def test_what_was_verified_is_not_read_for_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    fault = sealed_file.fault
    monkeypatch.setattr(sealed_file, "fault", lambda path: read.append(path) or fault(path))
    for step in (1, 2):
        store.save(tmp_path / f"{step}.ckpt", a_state(step))
    verified = store.verify(tmp_path)
    assert store.load(verified)["global_step"] == 2
    assert store.load(verified)["global_step"] == 2
    assert read == [tmp_path / "2.ckpt"]


def test_a_file_that_changes_after_the_verification_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    store.save(path, a_state(1))
    verified, good, times = store.verify(path), path.read_bytes(), path.stat()
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 1
    path.write_bytes(damaged)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(CheckpointError, match=r"a\.ckpt: damaged"):
        store.load(verified)
    store.save(path, a_state(2))
    with pytest.raises(CheckpointError, match=r"a\.ckpt: was replaced after"):
        store.load(verified)
    (tmp_path / "copy").write_bytes(good)  # as on another machine
    (tmp_path / "copy").replace(path)
    assert store.load(verified)["global_step"] == 1


def test_the_record_is_read_without_the_weights(tmp_path: Path) -> None:
    store.save(tmp_path / "a.ckpt", a_state(1) | {"ldm": {"step": 1, "config": {"seed": 3}}})
    assert store.record(tmp_path / "a.ckpt")["config"] == {"seed": 3}


@pytest.mark.parametrize("foreign", [{}, {"ldm": None}, {"ldm": "0.9"}, {"ldm": [1]}])
def test_a_file_of_another_program_has_no_record(tmp_path: Path, foreign: dict[str, Any]) -> None:
    torch.save(foreign, tmp_path / "a.ckpt")
    assert store.record(tmp_path / "a.ckpt") == {}


class _Harm:
    def __reduce__(self) -> tuple:
        return os.system, ("touch harm_was_done",)


@pytest.mark.parametrize("sealed", [False, True])
def test_a_malicious_file_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sealed: bool) -> None:
    monkeypatch.chdir(tmp_path)
    if sealed:  # an attacker can compute a checksum too
        monkeypatch.setattr(state_tree, "check_plain", lambda state: None)
        store.save(tmp_path / "a.ckpt", {"state_dict": {}, "x": _Harm()})
    else:
        (tmp_path / "a.ckpt").write_bytes(pickle.dumps(_Harm()))
    with pytest.raises(CheckpointError, match=r"a\.ckpt"):
        store.load(tmp_path / "a.ckpt")
    assert not (tmp_path / "harm_was_done").exists()


def test_the_variable_that_permits_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(tmp_path / "a.ckpt", a_state(1))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(CheckpointError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        store.load(tmp_path / "a.ckpt")


def test_too_little_space_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(tmp_path / "last.ckpt", a_state(1))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=12345))
    with pytest.raises(ResourceError, match=r"free 12345 bytes, needed about \d{7} bytes"):
        store.save(tmp_path / "last.ckpt", a_state(2))
    assert store.load(tmp_path / "last.ckpt")["global_step"] == 1
    assert os.listdir(tmp_path) == ["last.ckpt"]


def _save_with_a_file_limit(path: Path, report: Path) -> int:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    try:
        store.save(path, a_state(2, values=200_000))
    except ResourceError as error:
        report.write_text(str(error))
        return error.exit_code
    return 0


def test_a_write_that_fails_halfway_leaves_the_old_file(tmp_path: Path) -> None:
    path, report = tmp_path / "run" / "last.ckpt", tmp_path / "report"
    store.save(path, a_state(1))
    child = os.fork()
    if child == 0:
        try:
            os._exit(_save_with_a_file_limit(path, report))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 6
    assert os.strerror(errno.EFBIG) in report.read_text()
    assert "needed about" in report.read_text()
    assert os.listdir(path.parent) == ["last.ckpt"]
    assert store.load(path)["global_step"] == 1


def test_a_full_file_system_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not permitted")
    try:
        store.save(small / "last.ckpt", a_state(1, values=200_000))
        usage = shutil.disk_usage(small)
        for free in (usage.free, 10**9):  # noticed before, and only while writing
            monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
            with pytest.raises(ResourceError, match=f"free {free} bytes, needed about"):
                store.save(small / "last.ckpt", a_state(2, values=500_000))
            assert os.listdir(small) == ["last.ckpt"]
            assert store.load(small / "last.ckpt")["global_step"] == 1
    finally:
        subprocess.run(["umount", str(small)], check=True)


def _save_for_ever(folder: Path, acknowledged: Path) -> None:
    for step in range(1, 10_000):
        store.save(folder / "last.ckpt", a_state(step, values=400_000))
        acknowledged.write_text(json.dumps(step))


def _kill_savers(folder: Path, acknowledged: Path, rounds: int) -> None:
    draw = random.Random(0)
    store.save(folder / "last.ckpt", a_state(0, values=400_000))
    for _ in range(rounds):
        acknowledged.write_text("0")
        child = os.fork()
        if child == 0:
            try:
                _save_for_ever(folder, acknowledged)
            finally:
                os._exit(1)
        time.sleep(draw.uniform(0.005, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        state = store.load(folder / "last.ckpt")
        assert (state["state_dict"]["weight"] == state["global_step"]).all()
        assert state["global_step"] >= int(acknowledged.read_text() or 0)
    writer.sweep(folder)
    assert os.listdir(folder) == ["last.ckpt"]


@pytest.mark.parametrize("rounds", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_kill_9_during_a_save_leaves_a_good_file(tmp_path: Path, rounds: int) -> None:
    (tmp_path / "checkpoints").mkdir()
    _kill_savers(tmp_path / "checkpoints", tmp_path / "acknowledged", rounds)


@pytest.mark.parametrize("rounds", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_kill_9_leaves_a_good_file_on_another_file_system(tmp_path: Path, shared_memory: Path, rounds: int) -> None:
    _kill_savers(shared_memory, tmp_path / "acknowledged", rounds)


def test_a_saver_that_waits_for_the_disk_is_seen_to_live(tmp_path, monkeypatch):
    """Until its file has its name: a sweep in the meantime would take it away."""
    taken = []

    def waits(handle: int) -> None:
        taken.extend(sealed_file.abandoned(file) for file in tmp_path.glob("*.tmp.*"))

    monkeypatch.setattr(os, "fsync", waits)
    sealed_file.write(tmp_path / "a.ckpt", {"x": 1}, step=3)
    assert taken == [False]
    assert sealed_file.read(tmp_path / "a.ckpt") == {"x": 1}
    assert sealed_file.fault(tmp_path / "a.ckpt") is None
