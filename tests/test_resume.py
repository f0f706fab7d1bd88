"""A resumed run is the same run, bit for bit: weights, average, optimizer, schedule, order of the data, metrics."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import main
from ldm import checkpoint
from ldm.autoencoder.module import AutoencoderKL
from ldm.config import to_yaml
from ldm.data.datamodules import ElasticDataModule
from ldm.diffusion.module import LatentDiffusion
from ldm.loggers import read_metrics
from ldm.signals import STOPPING

STEPS = 12


@pytest.fixture(autouse=True)
def quiet_place(tmp_path, monkeypatch):
    """Run in a folder of our own, and leave no signal handler behind."""
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def trained_autoencoder(tmp_path_factory) -> Path:
    """Filled in by the first test of stage 2 that runs; a logs folder."""
    return tmp_path_factory.mktemp("stage1")


@pytest.fixture
def order(monkeypatch) -> list[tuple[bytes, bytes]]:
    """What training sees from here on: (sample numbers, labels) of each micro-batch."""
    seen: list[tuple[bytes, bytes]] = []
    attach = ElasticDataModule.attach_draws

    def noted(self: Any, batch: dict[str, Any], device: torch.device) -> Any:
        draws = attach(self, batch, device)
        if self.trainer.training:
            seen.append((draws.numbers.tobytes(), batch["class_label"].numpy().tobytes()))
        return draws

    monkeypatch.setattr(ElasticDataModule, "attach_draws", noted)
    return seen


@pytest.fixture
def stage(request, autoencoder_tree, diffusion_tree, trained_autoencoder) -> dict[str, Any]:
    """The configuration of the stage that the test names."""
    if request.param == "autoencoder":
        return autoencoder_tree
    if not any(trained_autoencoder.iterdir()):
        run(autoencoder_tree, "first.yaml", logdir=trained_autoencoder)
    diffusion_tree["data"]["params"]["autoencoder"] = str(only(trained_autoencoder))
    diffusion_tree["data"]["params"]["cache"] = str(trained_autoencoder.parent / "cache")
    return diffusion_tree


def run(tree: dict[str, Any], name: str, *words: str, logdir: Path) -> int:
    Path(name).write_text(to_yaml(tree))
    return main.main(["--base", name, "--logdir", str(logdir), *words])


def only(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def saves(tree: dict[str, Any], every: int) -> dict[str, Any]:
    node = {"target": "ldm.saving.Checkpoints", "params": {"every": every, "keep": 9}}
    tree["lightning"]["callbacks"] = {"checkpoints": node}
    return tree


def as_killed_after(run_folder: Path, step: int, place: Path) -> Path:
    """A copy of a run as it was right after the save of `step`."""
    copy = place / run_folder.name
    shutil.copytree(run_folder, copy)
    for file in (copy / "checkpoints").iterdir():
        if file.name != f"step={step:08d}.ckpt":
            file.unlink()
    (copy / "run_state.json").unlink()
    return copy


def final(run_folder: Path) -> dict[str, Any]:
    state = checkpoint.load(run_folder / "checkpoints" / f"step={STEPS:08d}.ckpt")
    state["ldm"]["metrics"] = {
        name: value for name, value in state["ldm"]["metrics"].items() if name.startswith("val/")
    }
    # How often Lightning began an epoch or a batch anew differs, and means nothing here.
    return {key: value for key, value in state.items() if key not in ("loops", "epoch")}


def metrics(run_folder: Path, after: int) -> list[tuple[str, str, str]]:
    """(step, name, value) of every logged number but the speeds."""
    rows = [row for row in read_metrics(run_folder / "metrics.csv") if int(row["step"]) > after]
    assert {int(row["step"]) for row in rows} == {step for step in range(after + 1, STEPS + 1) if step % 2 == 0}
    speeds = ("step", "images_per_second", "data_wait")
    return sorted((row["step"], name, value) for row in rows for name, value in row.items() if name not in speeds)


def assert_same(ours: Any, theirs: Any, key: str = "") -> None:
    """Equal bit for bit, and of one type, at every key."""
    assert type(ours) is type(theirs), key
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype, key
        assert torch.equal(ours, theirs), key
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), key
        for name in ours:
            assert_same(ours[name], theirs[name], f"{key}.{name}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), key
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, f"{key}.{index}")
    else:
        assert ours == theirs, key


# Killed in the middle of an epoch (5 steps of 6 are 30 images, of 16), or right where a validation was (4).
@pytest.mark.parametrize(("killed_after", "workers", "micro_batch"), [(5, 0, None), (5, 2, 3), (4, 0, 2)])
@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"], indirect=True)
def test_killed_and_resumed_is_the_same_run(stage, killed_after, workers, micro_batch, order, tmp_path):
    stage["data"]["params"] |= {"num_workers": workers, "micro_batch_size": micro_batch}
    assert run(saves(stage, every=killed_after), "run.yaml", logdir=tmp_path / "straight") == 0
    straight = only(tmp_path / "straight")
    pieces = 6 // (micro_batch or 6)
    assert len(order) == STEPS * pieces
    expected = order[killed_after * pieces :]
    order.clear()

    killed = as_killed_after(straight, killed_after, tmp_path / "killed")
    assert main.main(["--resume", str(killed)]) == 0
    assert order == expected
    assert_same(final(killed), final(straight))
    assert final(killed)["ldm"]["images_seen"] == 6 * STEPS
    assert metrics(killed, after=killed_after) == metrics(straight, after=killed_after)


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"], indirect=True)
def test_stopped_by_a_signal_and_resumed_is_the_same_run(stage, tmp_path, monkeypatch):
    assert run(stage, "run.yaml", logdir=tmp_path / "straight") == 0

    module = AutoencoderKL if stage["name"] == "tiny_autoencoder" else LatentDiffusion
    step = module.training_step

    def interrupted(self: Any, batch: dict[str, Any], batch_idx: int) -> Any:
        if self.global_step == 6:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(module, "training_step", interrupted)
    assert run(stage, "run.yaml", logdir=tmp_path / "stopped") == 128 + signal.SIGUSR1
    monkeypatch.setattr(module, "training_step", step)
    stopped = only(tmp_path / "stopped")
    assert checkpoint.load(checkpoint.find(stopped))["global_step"] == 7
    assert run(stage, "run.yaml", "--resume", "auto", logdir=tmp_path / "stopped") == 0
    assert_same(final(only(tmp_path / "stopped")), final(only(tmp_path / "straight")))


@pytest.mark.parametrize("stage", ["diffusion"], indirect=True)
def test_a_finished_run_goes_on_when_it_is_made_longer(stage, tmp_path, capsys):
    assert run(stage, "run.yaml", logdir=tmp_path / "straight") == 0
    assert run(stage, "run.yaml", "lightning.trainer.max_steps=5", logdir=tmp_path / "short") == 0
    short = only(tmp_path / "short")
    assert main.main(["--resume", str(short)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main.main(["--resume", str(short), f"lightning.trainer.max_steps={STEPS}"]) == 0
    ours, theirs = final(short), final(only(tmp_path / "straight"))
    assert_same(ours.pop("ldm")["images_seen"], theirs.pop("ldm")["images_seen"])
    assert_same(ours, theirs)
