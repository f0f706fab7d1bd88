"""Checkpoints say where they come from, and a signal gives one checkpoint that resumes exactly."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning.strategies import DDPStrategy

from ldm.checkpoints import store
from ldm.errors import CheckpointError
from ldm.runtime import signals
from ldm.training.callbacks.provenance import Provenance
from ldm.training.callbacks.stop import StopOnSignal
from tests.points import BATCH, Automatic, PointData, a_trainer, in_a_child, ranks_at, same, wait_until, weights

# ---------------------------------------------------------------------- checkpoints


def test_lightning_saves_and_resumes_through_our_files(tmp_path: Path) -> None:
    straight = Automatic()
    a_trainer(tmp_path, 12).fit(straight, PointData(BATCH, seed=1))
    first = Automatic()
    trainer = a_trainer(tmp_path, 7, [Provenance({"seed": 1})])
    trainer.fit(first, PointData(BATCH, seed=1))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    record = store.load(tmp_path / "last.ckpt")["ldm"]
    assert record["versions"]["torch"] == torch.__version__
    told = {name: record[name] for name in ("config", "step", "images_seen", "kind")}
    assert told == {"config": {"seed": 1}, "step": 7, "images_seen": 7 * BATCH, "kind": "test"}
    second = Automatic()
    a_trainer(tmp_path, 12).fit(second, PointData(BATCH, seed=1), ckpt_path=tmp_path / "last.ckpt")
    assert same(weights(second), weights(straight))


def test_a_damaged_file_is_refused_at_resume(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path, 2)
    trainer.fit(Automatic(), PointData(BATCH, seed=1))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    damaged = bytearray((tmp_path / "last.ckpt").read_bytes())
    damaged[1000] ^= 4
    (tmp_path / "last.ckpt").write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"last\.ckpt"):
        a_trainer(tmp_path, 4).fit(Automatic(), PointData(BATCH, seed=1), ckpt_path=tmp_path / "last.ckpt")


# ---------------------------------------------------------------------- signals


def send_at(first: int, number: int) -> Callable[[np.ndarray], None]:
    """Sends a signal to this process' group while the batch with sample number `first` is trained on."""

    def send(numbers: np.ndarray) -> None:
        if first not in numbers:
            return
        sender = os.fork()
        if sender == 0:  # from outside of the group: a loader's worker obeys its own parent
            group = os.getpgrp()
            os.setpgid(0, 0)
            os.killpg(group, number)
            os._exit(0)
        os.waitpid(sender, 0)

    return send


@pytest.mark.parametrize(
    ("number", "workers"),
    [(signal.SIGTERM, 0), (signal.SIGTERM, 2), (signal.SIGUSR1, 2), (signal.SIGINT, 2), (signal.SIGHUP, 0)],
)
def test_a_signal_saves_once_and_the_run_resumes_exactly(tmp_path: Path, number: int, workers: int) -> None:
    def interrupted() -> None:
        os.setpgid(0, 0)  # a group of its own, with the loader's workers
        module = Automatic(on_batch=send_at(6 * BATCH, number))
        data = PointData(BATCH, seed=1, micro_batch_size=2, num_workers=workers)
        a_trainer(tmp_path, 12, [StopOnSignal(tmp_path)], accumulate_grad_batches=2).fit(module, data)

    assert in_a_child(interrupted) == 128 + number
    assert store.load(tmp_path / "stopped.ckpt")["global_step"] == 7
    results = []
    for start in (None, tmp_path / "stopped.ckpt"):
        module = Automatic()
        trainer = a_trainer(tmp_path, 12, accumulate_grad_batches=2)
        trainer.fit(module, PointData(BATCH, seed=1, micro_batch_size=2), ckpt_path=start)
        results.append(weights(module))
    assert same(*results)


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_a_signal_during_validation_saves_and_validation_is_done_again(tmp_path: Path, batch: int) -> None:
    class Stopping(Automatic):
        def on_validation(self, batch_idx: int) -> None:
            if batch_idx == batch and self.trainer.global_step == 10:
                os.kill(os.getpid(), signal.SIGTERM)

    validating = {"limit_val_batches": 1.0}

    def interrupted() -> None:
        trainer = a_trainer(tmp_path, 20, [StopOnSignal(tmp_path)], **validating)
        trainer.fit(Stopping(), PointData(BATCH, seed=1))

    assert in_a_child(interrupted) == 128 + signal.SIGTERM
    assert store.load(tmp_path / "stopped.ckpt")["global_step"] == 10
    modules = [Automatic(), Automatic()]
    for module, start in zip(modules, (None, tmp_path / "stopped.ckpt"), strict=True):
        trainer = a_trainer(tmp_path, 20, [StopOnSignal(tmp_path)], **validating)
        trainer.fit(module, PointData(BATCH, seed=1), ckpt_path=start)
        assert trainer.global_step == 20
    assert same(weights(modules[0]), weights(modules[1]))
    assert modules[1].validated == modules[0].validated[1:]  # those after steps 10, 15, 20; the first was after 5


def test_the_handlers_of_before_are_back_after_a_run(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in signals.STOPPING]
    a_trainer(tmp_path, 1, [StopOnSignal(tmp_path)]).fit(Automatic(), PointData(BATCH, seed=1))
    assert [signal.getsignal(number) for number in signals.STOPPING] == before


@pytest.mark.parametrize("moment", ["setup", "on_fit_start", "on_train_start"])
def test_a_signal_before_the_first_step_ends_the_run_with_nothing_to_save(tmp_path: Path, moment: str) -> None:
    def interrupted() -> None:
        class Sends(pl.Callback):
            pass

        setattr(Sends, moment, lambda self, *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        signals.listen()
        a_trainer(tmp_path, 12, [Sends(), StopOnSignal(tmp_path)]).fit(Automatic(), PointData(BATCH, seed=1))

    assert in_a_child(interrupted) == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("*.ckpt"))


def test_a_signal_ends_a_validation_alone(tmp_path: Path) -> None:
    class Stopping(Automatic):
        def on_validation(self, batch_idx: int) -> None:
            if batch_idx == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            (tmp_path / f"batch.{batch_idx}").touch()

    def interrupted() -> None:
        trainer = a_trainer(tmp_path, 20, [StopOnSignal(tmp_path)], limit_val_batches=1.0)
        trainer.validate(Stopping(), PointData(BATCH, seed=1), verbose=False)

    assert in_a_child(interrupted) == 128 + signal.SIGTERM
    assert {path.name for path in tmp_path.iterdir()} == {"batch.0", "batch.1"}


def test_lightning_installs_no_handler_not_even_under_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NTASKS": 1, "NTASKS_PER_NODE": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "JOB_ID": 7}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))

    class Looks(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            handlers = [signal.getsignal(number) for number in signals.STOPPING]
            assert {handler.__module__ for handler in handlers} == {"ldm.runtime.signals"}  # type: ignore[union-attr]
            (tmp_path / "looked").touch()

    def trains() -> None:
        trainer = a_trainer(tmp_path, 1, [StopOnSignal(tmp_path), Looks()], strategy="ddp")
        assert isinstance(trainer.strategy, DDPStrategy)
        assert isinstance(trainer.strategy.cluster_environment, SLURMEnvironment)
        trainer.fit(Automatic(), PointData(BATCH, seed=1))

    assert in_a_child(trains) == 0  # with a process group of its own
    assert (tmp_path / "looked").exists()


def trains(folder: Path, workers: int, **arguments: Any) -> Callable[[int], None]:
    """Two ranks that train until they are stopped; `started.<rank>` tells that they do."""

    def train(rank: int) -> None:
        signals.listen()
        module = Automatic(on_batch=lambda numbers: numbers[0] > BATCH and (folder / f"started.{rank}").touch())
        options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "num_sanity_val_steps": 0}
        trainer = a_trainer(folder, 1_000_000, [StopOnSignal(folder)], **options | arguments)
        trainer.fit(module, PointData(BATCH, seed=1, num_workers=workers))

    return train


def started(folder: Path) -> bool:
    return all((folder / f"started.{rank}").exists() for rank in range(2))


@pytest.mark.parametrize("target", [0, 1, None])
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 2), (signal.SIGUSR1, 0), (signal.SIGINT, 2)])
def test_two_ranks_stop_after_the_same_step(tmp_path: Path, number: int, workers: int, target: int | None) -> None:
    with ranks_at(trains(tmp_path, workers)) as ranks:
        assert wait_until(lambda: started(tmp_path), 120)
        ranks.send(number, target)
        assert wait_until(ranks.ended, 60)
    assert ranks.codes == {0: 128 + number, 1: 128 + number}
    assert store.load(tmp_path / "stopped.ckpt")["global_step"] > 1


@pytest.mark.parametrize("target", [0, 1, None])
def test_two_ranks_stop_together_before_the_first_step(tmp_path: Path, target: int | None) -> None:
    class Waits(Automatic):
        """Makes the moment before the process group, and before the first step, long."""

        def __init__(self, rank: int) -> None:
            super().__init__()
            self.rank = rank

        def setup(self, stage: str) -> None:
            (tmp_path / f"started.{self.rank}").touch()
            time.sleep(2)

    def train(rank: int) -> None:
        signals.listen()
        trainer = a_trainer(tmp_path, 1_000_000, [StopOnSignal(tmp_path)], devices=2, strategy="ddp")
        trainer.fit(Waits(rank), PointData(BATCH, seed=1))

    with ranks_at(train) as ranks:
        assert wait_until(lambda: started(tmp_path), 120)
        ranks.send(signal.SIGTERM, target)
        assert wait_until(ranks.ended, 60)
    assert ranks.codes == {0: 128 + signal.SIGTERM, 1: 128 + signal.SIGTERM}
    assert not list(tmp_path.glob("*.ckpt"))
