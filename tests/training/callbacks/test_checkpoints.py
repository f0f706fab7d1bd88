"""When checkpoints are written and which are kept, under a real Trainer with a model of one number."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

from ldm.checkpoints import store
from ldm.errors import ConfigError, ResourceError
from ldm.training.callbacks.checkpoints import AtomicCheckpointIO, Checkpoints
from ldm.training.callbacks.stop import StopOnSignal
from tests.points import Automatic, PointData, a_trainer, ranks_at, wait_until


class One(LightningModule):
    """Its validation scores are given."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.scores = iter(scores)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.weight - 1).square().sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/score", next(self.scores))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    folder: Path, callback: Checkpoints, scores: tuple[float, ...] = (3.0, 1.0, 2.0), *more: Any, **arguments: Any
) -> One:
    """6 steps, with a validation after each second one."""
    model = One(list(scores))
    trainer = Trainer(
        **{"max_steps": 6, "val_check_interval": 2} | arguments,
        accelerator="cpu",
        callbacks=[*more, callback],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        default_root_dir=folder,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(range(100)), DataLoader(range(1)))
    return model


def saved(folder: Path) -> dict[str, int]:
    return {path.name: store.load(path)["global_step"] for path in (folder / "checkpoints").iterdir()}


def test_the_last_ones_are_kept_and_the_end_is_saved(tmp_path):
    fit(tmp_path, Checkpoints(every=2))
    assert saved(tmp_path) == {"step=00000004.ckpt": 4, "step=00000006.ckpt": 6}


def test_a_short_run_is_saved_at_its_end(tmp_path):
    fit(tmp_path, Checkpoints())
    assert saved(tmp_path) == {"step=00000006.ckpt": 6}


def test_steps_are_counted_and_not_batches(tmp_path):
    fit(tmp_path, Checkpoints(every=1, keep=3), accumulate_grad_batches=3, val_check_interval=6)
    assert saved(tmp_path) == {f"step={step:08d}.ckpt": step for step in (4, 5, 6)}


@pytest.mark.parametrize(("higher", "step"), [(False, 4), (True, 2)])
def test_the_best_is_kept(tmp_path, higher, step):
    fit(tmp_path, Checkpoints(keep=1, monitor="val/score", higher_is_better=higher))
    assert saved(tmp_path) == {"best.ckpt": step, f"step={step:08d}.ckpt": step, "step=00000006.ckpt": 6}
    assert (tmp_path / "checkpoints" / "best.ckpt").readlink() == Path(f"step={step:08d}.ckpt")


def test_some_of_the_best_are_kept(tmp_path):
    scores = (3.0, 5.0, 4.0, float("nan"), 2.0, 6.0)
    fit(tmp_path, Checkpoints(keep=1, monitor="val/score", keep_best=2), scores, max_steps=12)
    assert saved(tmp_path) == {"best.ckpt": 10, **{f"step={step:08d}.ckpt": step for step in (2, 10, 12)}}


def test_milestones_are_never_removed(tmp_path):
    fit(tmp_path, Checkpoints(every=2, keep=1, keep_every=3), (1.0,) * 6, max_steps=12)
    assert sorted(saved(tmp_path).values()) == [3, 6, 9, 12]


def test_what_a_stop_has_saved_is_kept_as_long_as_any_other(tmp_path):
    folder = tmp_path / "checkpoints"
    for name, step in {"stopped.ckpt": 3, "finite.ckpt": 1, "mine.ckpt": 1}.items():
        store.save(folder / name, {"global_step": step})
    fit(tmp_path, Checkpoints(every=4))
    assert saved(tmp_path) == {"mine.ckpt": 1, "step=00000004.ckpt": 4, "step=00000006.ckpt": 6}


def test_the_best_so_far_survives_a_resume(tmp_path):
    first = Checkpoints(monitor="val/score")
    fit(tmp_path, first)
    second = Checkpoints(monitor="val/score")
    second.load_state_dict(first.state_dict())
    fit(tmp_path, second, (1.5, 2.0, 3.0))
    assert saved(tmp_path)["best.ckpt"] == 4
    other = Checkpoints(monitor="val/other")  # another metric starts anew
    other.load_state_dict(first.state_dict())
    assert other.state_dict()["scores"] == {}


def test_a_metric_that_does_not_exist(tmp_path):
    with pytest.raises(ConfigError, match="val/scores"):
        fit(tmp_path, Checkpoints(monitor="val/scores"))
    for name in ("every", "keep", "keep_every", "keep_best"):
        with pytest.raises(ConfigError, match=f"{name}=0"):
            Checkpoints(**{name: 0})


class Gate:
    """Stands before the writing of each checkpoint: counts, fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> None:
        self.tried: list[int] = []
        self._fails = fails
        self._save = store.save
        monkeypatch.setattr(store, "save", self)

    def __call__(self, path: Path, state: dict[str, Any]) -> None:
        self.tried.append(state["global_step"])
        if self._fails(state["global_step"]):
            raise ResourceError(f"{path}: free 1 bytes, needed about 9 bytes")
        self._save(path, state)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_end_waits_for_all_saves(tmp_path, asynchronous):
    fit(tmp_path, Checkpoints(every=2, keep=9, asynchronous=asynchronous))
    assert sorted(saved(tmp_path).values()) == [2, 4, 6]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_leaves_the_old_checkpoint_and_training_goes_on(tmp_path, monkeypatch, caplog, asynchronous):
    gate = Gate(monkeypatch, fails=lambda step: step in (2, 3, 5))
    callback = Checkpoints(every=1, keep=1, asynchronous=asynchronous)
    fit(tmp_path, callback, (1.0,) * 6, StopOnSignal(tmp_path), val_check_interval=100)
    assert gate.tried == [1, 2, 3, 4, 5, 6]
    assert saved(tmp_path) == {"step=00000006.ckpt": 6}
    said = [record.getMessage() for record in caplog.records if record.name == "ldm.checkpoints.writer"]
    assert [line.partition(":")[0] for line in said] == [f"NOT SAVED ({n} of 3 in a row)" for n in (1, 2, 1)]
    assert "free 1 bytes, needed about 9 bytes" in said[0]
    assert "tries again at the next interval" in said[0]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_third_failure_in_a_row_ends_the_run(tmp_path, monkeypatch, asynchronous):
    gate = Gate(monkeypatch, fails=lambda step: step > 1)
    callback = Checkpoints(every=1, keep=1, asynchronous=asynchronous)
    with pytest.raises(ResourceError, match="needed about 9 bytes"):
        fit(tmp_path, callback, (1.0,) * 60, StopOnSignal(tmp_path), val_check_interval=100, max_steps=60)
    assert gate.tried[:4] == [1, 2, 3, 4]
    assert len(gate.tried) <= 5
    assert saved(tmp_path) == {"step=00000001.ckpt": 1}


def test_the_last_save_has_one_try(tmp_path, monkeypatch):
    Gate(monkeypatch, fails=lambda step: step == 6)
    with pytest.raises(ResourceError):
        fit(tmp_path, Checkpoints(every=5))
    assert saved(tmp_path) == {"step=00000005.ckpt": 5}


def test_a_save_that_is_under_way_at_the_end_still_has_its_tries(tmp_path, monkeypatch):
    def slow_and_full(step: int) -> bool:
        time.sleep(1.0 if step == 5 else 0.0)
        return step == 5

    Gate(monkeypatch, fails=slow_and_full)
    fit(tmp_path, Checkpoints(every=5))
    assert saved(tmp_path) == {"step=00000006.ckpt": 6}


def test_what_is_no_want_of_room_ends_the_run_at_once(tmp_path, monkeypatch):
    def broken(path: Path, state: dict[str, Any]) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(store, "save", broken)
    with pytest.raises(KeyError, match="a bug"):
        fit(tmp_path, Checkpoints(every=1), (1.0,) * 60, StopOnSignal(tmp_path), val_check_interval=100, max_steps=60)


@pytest.mark.parametrize("ends", ["stop", "intervals", "end"])
def test_two_ranks_end_together_where_one_cannot_save(tmp_path, monkeypatch, ends):
    Gate(monkeypatch, fails=lambda step: True)

    def train(rank: int) -> None:
        def halfway(numbers: Any) -> None:
            if ends == "stop" and rank == 1 and numbers[0] > 20:
                os.kill(os.getpid(), signal.SIGTERM)

        callbacks = [StopOnSignal(tmp_path), Checkpoints(every=5 if ends == "intervals" else 1000)]
        steps = 20 if ends == "end" else 1_000_000
        trainer = a_trainer(tmp_path, steps, callbacks, devices=2, strategy="ddp", enable_checkpointing=True)
        try:
            trainer.fit(Automatic(on_batch=halfway), PointData(4, seed=1))
        except ResourceError as error:
            raise SystemExit(error.exit_code) from None

    with ranks_at(train) as ranks:
        assert wait_until(ranks.ended, 100)
    assert ranks.codes == {0: 6, 1: 6}
    assert not list(tmp_path.rglob("*.ckpt*"))


@pytest.mark.parametrize(("monitor", "higher", "kept"), [("a", False, True), ("a", True, False), ("b", False, False)])
def test_scores_are_kept_for_the_same_metric_and_direction(monitor, higher, kept):
    saved = Checkpoints(monitor="a")
    saved._scores = {3: 0.5}
    resumed = Checkpoints(monitor=monitor, higher_is_better=higher)
    resumed.load_state_dict(saved.state_dict())
    assert resumed._scores == ({3: 0.5} if kept else {})
    old = {"scores": {3: 0.5}, "monitor": "a"}
    resumed = Checkpoints(monitor=monitor, higher_is_better=higher)
    resumed.load_state_dict(old)
    assert bool(resumed._scores) == (monitor == "a")
