"""What ldm relies on of Lightning without a promise: a test for each function of lightning_internals.

One that fails after an update of Lightning says which function has to be looked at.
"""

import ast
import importlib
import inspect
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher
from pytorch_lightning.utilities import rank_zero_info
from torch.utils.data import DataLoader

from ldm.runtime.step_metrics import is_logged
from ldm.training import lightning_internals
from ldm.training.loggers import MetricsFile
from ldm.training.metrics_table import read_metrics
from ldm.training.strategies import DDP
from tests.points import Automatic, Manual, PointData, a_trainer, ranks_at, wait_until

ROOT = Path(__file__).parents[2]
OURS = [
    name
    for name, value in vars(lightning_internals).items()
    if isinstance(value, FunctionType) and value.__module__ == lightning_internals.__name__
]


def test_every_function_has_a_test():
    tested = Path(__file__).read_text()
    for name in OURS:
        assert f"lightning_internals.{name}(" in tested, name


class Seen(pl.Callback):
    """Numbers noted at a hook of Lightning."""

    def __init__(self, hook: str, look: Any) -> None:
        self.values: list[Any] = []
        setattr(self, hook, lambda trainer, module, *_: self.values.append(look(trainer)))


# ---------------------------------------------------------------------- what it prints


def test_the_expected_warnings_are_silenced_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))  # workers are missed only where there is room

    def warned() -> list[str]:
        module = Automatic()
        module.other.eval()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if silent:
                lightning_internals.ignore_expected_warnings()
            warnings.warn_explicit("isinstance(treespec, X)", FutureWarning, "x.py", 1, "pytorch_lightning.x")
            warnings.warn("something else", stacklevel=1)
            trainer = a_trainer(tmp_path, 1)
            trainer.fit(module, DataLoader([torch.zeros(2)] * 3, collate_fn=lambda rows: a_batch(len(rows))))
        return [str(one.message) for one in caught]

    silent = False
    text = "\n".join(warned())
    for part in ("in eval mode", "does not have many workers", "treespec"):
        assert part in text
    silent = True
    text = "\n".join(warned())
    for part in ("in eval mode", "does not have many workers", "treespec"):
        assert part not in text
    assert "something else" in text


def a_batch(rows: int) -> dict[str, Any]:
    draws = SimpleNamespace(numbers=torch.arange(rows).numpy(), normal=lambda *_: torch.zeros(rows, 1))
    return {"x": torch.zeros(rows, 2), "draws": draws}


def test_a_trainer_is_made_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    logging.getLogger("pytorch_lightning").propagate = True
    with lightning_internals.muted():
        a_trainer(tmp_path, 1)
    assert not caplog.messages
    a_trainer(tmp_path, 1)
    assert any("available" in message for message in caplog.messages)


def test_muted_blocks_that_overlap_leave_nothing_muted(caplog: pytest.LogCaptureFixture) -> None:
    """As those of trainers that are made in two threads do."""
    caplog.set_level(logging.INFO)
    logging.getLogger("pytorch_lightning").propagate = True
    first, second = lightning_internals.muted(), lightning_internals.muted()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    rank_zero_info("not heard")
    second.__exit__(None, None, None)
    rank_zero_info("heard")
    assert set(caplog.messages) == {"heard"}


def test_early_stopping_says_that_its_metric_is_missing(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path, 5, [EarlyStopping("val/beauty")], limit_val_batches=1.0)
    with pytest.raises(RuntimeError) as caught:
        trainer.fit(Automatic(), datamodule=PointData(4, seed=1))
    assert lightning_internals.is_missing_metric(caught.value)
    assert not lightning_internals.is_missing_metric(RuntimeError("something else"))


# ---------------------------------------------------------------------- how it counts


def test_the_validation_interval_of_a_trainer_that_is_made(tmp_path: Path) -> None:
    validated = Seen("on_validation_start", lambda trainer: trainer.global_step)
    trainer = a_trainer(tmp_path, 6, [validated], limit_val_batches=1.0, num_sanity_val_steps=0)
    lightning_internals.set_validation_interval(trainer, 3)
    trainer.fit(Automatic(), datamodule=PointData(4, seed=1))
    assert validated.values == [3, 6]


class Accumulates(pl.Callback):
    def __init__(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        lightning_internals.set_accumulation(trainer, self.micro_batches)


class Places(pl.Callback):
    """Of a checkpoint of step 2, now that a step has three micro-batches."""

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        lightning_internals.place_batch_count(checkpoint, checkpoint["global_step"] * 3)


def test_accumulation_from_the_start_of_training_on(tmp_path: Path) -> None:
    steps = Seen("on_train_batch_end", lambda trainer: trainer.global_step)
    trainer = a_trainer(tmp_path, 2, [Accumulates(3), steps])
    trainer.fit(Automatic(), datamodule=PointData(4, seed=1))
    assert steps.values == [0, 0, 1, 1, 1, 2]


class Stepless(Manual):
    """Steps once in three micro-batches."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        self.log("train/loss", 1.0)
        if (batch_idx + 1) % 3:
            return None
        return super().training_step(batch, batch_idx)


def test_loggers_count_by_it_in_manual_optimization_too(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    trainer = a_trainer(tmp_path, 4, [Accumulates(3), Logs()], logger=MetricsFile(file), log_every_n_steps=2)
    trainer.fit(Stepless(), datamodule=PointData(4, seed=1))
    assert {int(row["step"]) for row in read_metrics(file)} == {2, 4}


@pytest.mark.parametrize("before", [1, 2])
def test_a_run_goes_on_with_another_number_of_micro_batches(tmp_path: Path, before: int) -> None:
    first = a_trainer(tmp_path, 2, [Accumulates(before)])
    first.fit(Automatic(), datamodule=PointData(4, seed=1))
    first.save_checkpoint(tmp_path / "2.ckpt")
    steps = Seen("on_train_batch_end", lambda trainer: trainer.global_step)
    validated = Seen("on_validation_start", lambda trainer: trainer.global_step)
    options: dict[str, Any] = {"limit_val_batches": 1.0, "num_sanity_val_steps": 0, "val_check_interval": 6}
    trainer = a_trainer(tmp_path, 4, [Accumulates(3), Places(), steps, validated], **options)
    trainer.fit(Automatic(), datamodule=PointData(4, seed=1), ckpt_path=tmp_path / "2.ckpt", weights_only=True)
    assert steps.values == [2, 2, 3, 3, 3, 4]
    assert validated.values == [4]


class Logs(pl.Callback):
    """Logs something in every batch, in rows that are numbered by the step to come."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if is_logged(trainer):
            lightning_internals.number_row(pl_module, trainer.global_step + 1)


def test_rows_are_numbered_by_the_metric_step_and_logged_when_we_say(tmp_path: Path) -> None:
    """`is_logged` (ldm/runtime/step_metrics.py) decides as Lightning does."""
    file = tmp_path / "metrics.csv"
    options: dict[str, Any] = {"logger": MetricsFile(file), "log_every_n_steps": 3, "accumulate_grad_batches": 2}
    a_trainer(tmp_path, 7, [Logs()], **options).fit(Automatic(), datamodule=PointData(4, seed=1))
    rows = read_metrics(file)
    assert [row["step"] for row in rows] == ["3", "6"]
    assert all(row.keys() == {"step", "train/loss"} for row in rows)


@pytest.mark.parametrize(("module", "divisor"), [(Automatic, 2), (Stepless, 1)])
def test_the_loss_of_callbacks_is_divided_in_automatic_optimization(
    tmp_path: Path, module: type[Automatic], divisor: int
) -> None:
    losses: list[tuple[float, float]] = []

    class Compares(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
            if outputs:
                assert lightning_internals.loss_divisor(trainer, pl_module) == divisor
                losses.append((float(outputs["loss"]) * divisor, pl_module.last))

    class Remembers(module):  # type: ignore[valid-type,misc]
        last = 0.0

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            made = super().training_step(batch, batch_idx)
            if made is not None:
                self.last = (made["loss"] if isinstance(made, dict) else made).item()
            return made

    trainer = a_trainer(tmp_path, 2, [Accumulates(2), Compares()])
    trainer.fit(Remembers(), datamodule=PointData(4, seed=1))
    assert losses
    assert all(ours == pytest.approx(own) for ours, own in losses)


# ---------------------------------------------------------------------- validation


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_validation_that_follows_is_foreseen(tmp_path: Path, accumulation: int) -> None:
    order: list[bool | str] = []

    class Foresees(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            order.append(lightning_internals.validation_follows(trainer))

        def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            order.append("validation")

    options: dict[str, Any] = {"limit_val_batches": 1.0, "num_sanity_val_steps": 0, "val_check_interval": 4}
    trainer = a_trainer(tmp_path, 8 // accumulation, [Foresees()], accumulate_grad_batches=accumulation, **options)
    trainer.fit(Automatic(), datamodule=PointData(4, seed=1))
    assert order == [False, False, False, True, "validation"] * 2


def test_a_validation_that_was_cut_short_is_done_anew_in_a_resumed_run(tmp_path: Path) -> None:
    class Cuts(pl.Callback):
        def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if _[3] == 1:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")
                raise KeyError("cut")

        def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: Any) -> None:
            lightning_internals.restart_validation(checkpoint)

    options: dict[str, Any] = {"limit_val_batches": 1.0, "num_sanity_val_steps": 0}
    with pytest.raises(KeyError, match="cut"):
        a_trainer(tmp_path, 10, [Cuts()], **options).fit(Automatic(), datamodule=PointData(4, seed=1))
    validated = Seen("on_validation_batch_end", lambda trainer: trainer.global_step)
    trainer = a_trainer(tmp_path, 10, [validated], **options)
    trainer.fit(Automatic(), datamodule=PointData(4, seed=1), ckpt_path=tmp_path / "cut.ckpt", weights_only=True)
    assert validated.values == [5, 5, 5, 10, 10, 10]


# ---------------------------------------------------------------------- signals and processes


@pytest.mark.parametrize("ours", [True, False])
def test_lightning_installs_no_handlers(tmp_path: Path, ours: bool) -> None:
    class Leaves(pl.Callback):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            if ours:
                lightning_internals.leave_signals_alone(trainer)

    before = signal.getsignal(signal.SIGTERM)
    handlers = Seen("on_train_start", lambda trainer: signal.getsignal(signal.SIGTERM))
    a_trainer(tmp_path, 1, [Leaves(), handlers]).fit(Automatic(), datamodule=PointData(4, seed=1))
    assert (handlers.values == [before]) is ours


@pytest.mark.parametrize("ours", [True, False])
def test_ranks_do_not_ask_one_another_before_every_batch(tmp_path: Path, ours: bool) -> None:
    class Skips(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if ours:
                lightning_internals.skip_sigterm_broadcast(trainer)

    def train(rank: int) -> None:
        trainer = a_trainer(tmp_path, 2, [Skips()], devices=2, strategy=DDP())
        ask = _TrainingEpochLoop._broadcast_sigterm_tensor

        def asks(loop: Any) -> None:
            (tmp_path / f"asked.{rank}").touch()
            ask(loop)

        _TrainingEpochLoop._broadcast_sigterm_tensor = asks  # type: ignore[method-assign]
        trainer.fit(Automatic(), datamodule=PointData(4, seed=1))

    with ranks_at(train) as ranks:
        assert wait_until(ranks.ended, 100)
    assert ranks.codes == {0: 0, 1: 0}
    assert len([*tmp_path.glob("asked.*")]) == (0 if ours else 2)


def test_the_ranks_that_lightning_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), num_processes=2, num_nodes=1)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher))
    assert lightning_internals.started_ranks(trainer) == []
    assert lightning_internals.started_ranks(a_trainer(tmp_path, 1)) == []

    def start(self: Any) -> None:
        self.procs.append(subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]))

    monkeypatch.setattr(_SubprocessScriptLauncher, "_call_children_scripts", start)
    killed: list[Any] = []
    monkeypatch.setattr(_ChildProcessObserver, "_terminate_all", lambda self: killed.append(self))
    launcher.launch(lambda: None)
    (child,) = lightning_internals.started_ranks(trainer)
    (observer,) = [thread for thread in threading.enumerate() if isinstance(thread, _ChildProcessObserver)]
    lightning_internals.dismiss_observers()
    assert child.wait() == 3
    observer.join(timeout=20)  # it looks every five seconds
    assert not observer.is_alive()
    assert not killed


def test_all_ranks_share_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    made: list[tuple[Any, ...]] = []
    module = sys.modules[ModelParallelStrategy.__module__]
    monkeypatch.setattr(module, "_setup_device_mesh", lambda *sizes: made.append(sizes))
    monkeypatch.setattr(ModelParallelStrategy, "_setup_distributed", lambda self: None)
    monkeypatch.setattr(ModelParallelStrategy, "world_size", 6)
    strategy = ModelParallelStrategy(tensor_parallel_size=1)
    strategy.parallel_devices = [torch.device("cpu")] * 3
    strategy.num_nodes = 2
    strategy.accelerator = SimpleNamespace(setup_device=lambda device: None)  # type: ignore[assignment]
    strategy.cluster_environment = LightningEnvironment()
    strategy._lightning_module = Automatic()
    lightning_internals.shard_over_all_ranks(strategy)
    strategy.setup_environment()
    assert [sizes[:2] for sizes in made] == [(6, 1)]


# ---------------------------------------------------------------------- checkpoints and loggers


def test_a_checkpoint_is_put_together_as_it_would_be_saved(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path, 2)
    trainer.fit(Automatic(), datamodule=PointData(4, seed=1))
    state = lightning_internals.assemble_checkpoint(trainer)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    saved = trainer.strategy.checkpoint_io.load_checkpoint(tmp_path / "saved.ckpt")
    assert saved.keys() == state.keys()
    assert saved["loops"] == state["loops"]
    assert saved["state_dict"].keys() == state["state_dict"].keys()


def private_names(kind: type) -> set[str]:
    """`self._name` and the private methods in the source of a class."""
    nodes = [*ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind))))]
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"}
    names |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


# Fields of WandbLogger that ours keeps: whether to stay offline, and wandb's run.
INHERITED = {"FencedWandb": {"_offline", "_experiment"}}


@pytest.mark.parametrize("file", sorted((ROOT / "ldm").rglob("*.py")), ids=lambda file: file.stem)
def test_no_class_uses_or_hides_a_private_name_of_its_base(file: Path) -> None:
    """An attribute of ours that Lightning has as well, by now or from some version on, would break in silence."""
    if "pytorch_lightning" not in file.read_text():
        return
    module = importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
    for name, kind in vars(module).items():
        if isinstance(kind, type) and kind.__module__ == module.__name__:
            bases = [
                base for base in kind.__mro__ if base.__module__.startswith(("pytorch_lightning", "lightning_fabric"))
            ]
            shared = private_names(kind) & {private for base in bases for private in private_names(base)}
            assert shared == INHERITED.get(name, set()), name


def test_what_wandb_is_started_with(tmp_path: Path) -> None:
    logger = WandbLogger(name="a", project="b", id="c", save_dir=tmp_path, offline=True)
    found = lightning_internals.wandb_arguments(logger)
    assert found["name"] == "a"
    assert found["project"] == "b"
    assert found["id"] == "c"
    assert found["dir"] == str(tmp_path)
    assert "anonymous" not in found
    assert lightning_internals.wandb_run(logger) is None
    run: Any = SimpleNamespace(id="other")
    assert lightning_internals.wandb_run(WandbLogger(experiment=run, save_dir=tmp_path)) is run
