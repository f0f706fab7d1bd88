"""ldm.safety and ldm.signals: a signal gives one checkpoint that resumes exactly, no weight ever meets a NaN."""

import os
import re
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, Dataset

from ldm import checkpoint, signals
from ldm.data.datamodules import ElasticDataModule
from ldm.errors import CheckpointError, NumericError
from ldm.safety import AtomicCheckpointIO, FiniteGuard, Provenance, StopOnSignal

BATCH = 4
MakeOptimizer = Callable[[Iterable[torch.nn.Parameter]], Optimizer]
FUSED: MakeOptimizer = partial(AdamW, lr=0.1, fused=True)


class Points(Dataset):
    def __getitem__(self, address: tuple[int, int]) -> dict[str, Any]:
        number, index = address
        return {"x": np.float32([index / 100, 1.0]), "sample_number": number}


def stack(rows: list[dict[str, Any]]) -> dict[str, Any]:
    x = torch.from_numpy(np.stack([row["x"] for row in rows]))
    return {"x": x, "sample_number": np.array([row["sample_number"] for row in rows])}


class PointData(ElasticDataModule):
    """100 points in elastic order; a validation of three batches."""

    def train_dataloader(self) -> DataLoader:
        return self.training_loader(Points(), 100, stack)

    def val_dataloader(self) -> DataLoader:
        return self.validation_loader(Points(), 3 * self.batch_size // self.accumulation(1), stack)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        self.attach_draws(batch, batch["x"].device)
        return batch


class Automatic(pl.LightningModule):
    """One optimizer, stepped by Lightning. `poison` is the first sample number whose loss is NaN."""

    def __init__(self, optimizer: MakeOptimizer = FUSED, poison: int = -1, on_batch: Callable = lambda _: None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(2, 1)
        self.other = torch.nn.Linear(2, 1)
        self.make_optimizer = optimizer
        self.poison = poison
        self.on_batch = on_batch  # called with the sample numbers of each training batch
        self.validated: list[float] = []

    def loss(self, batch: dict[str, Any], layer: torch.nn.Module) -> Tensor:
        loss = (layer(batch["x"]) + batch["draws"].normal("noise", (1,))).square().mean()
        return loss * float("nan") if self.poison in batch["draws"].numbers else loss

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        self.on_batch(batch["draws"].numbers)
        loss = self.loss(batch, self.layer) + self.loss(batch, self.other)
        self.log("train/loss", loss.detach())
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.on_validation(batch_idx)
        self.log("val/loss", self.loss(batch, self.layer), batch_size=len(batch["x"]))

    def on_validation(self, batch_idx: int) -> None:
        pass

    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.validated.append(float(self.trainer.callback_metrics["val/loss"]))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())

    def checkpoint_facts(self) -> dict[str, Any]:
        return {"kind": "test", "latents": None, "metrics": {}}


class Manual(Automatic):
    """Two optimizers stepped by hand, the second uncounted; only the first one's loss is ever NaN."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        self.on_batch(batch["draws"].numbers)
        first, second = self.optimizers()
        second._on_before_step = second._on_after_step = lambda: None
        loss = self.loss(batch, self.layer)
        finite = self.other(batch["x"]).square().mean()
        self.manual_backward(loss + finite)
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
        return {"loss": loss.detach()}

    def configure_optimizers(self) -> Any:
        return [self.make_optimizer(layer.parameters()) for layer in (self.layer, self.other)]


def a_trainer(folder: Path, max_steps: int, callbacks: Iterable[pl.Callback] = (), **kwargs: Any) -> pl.Trainer:
    options = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "limit_val_batches": 0,
        "plugins": [AtomicCheckpointIO()],
        "check_val_every_n_epoch": None,
        "val_check_interval": 5,
    }
    return pl.Trainer(default_root_dir=folder, max_steps=max_steps, callbacks=list(callbacks), **(options | kwargs))


def weights(module: torch.nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in module.state_dict().values()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# ---------------------------------------------------------------------- checkpoints


def test_lightning_saves_and_resumes_through_our_files(tmp_path: Path) -> None:
    straight = Automatic()
    a_trainer(tmp_path, 12).fit(straight, PointData(BATCH, seed=1))
    first = Automatic()
    trainer = a_trainer(tmp_path, 7, [Provenance({"seed": 1})])
    trainer.fit(first, PointData(BATCH, seed=1))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    record = checkpoint.load(tmp_path / "last.ckpt")["ldm"]
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


def test_the_first_save_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr("ldm.safety.load", lambda path: read.append(path))
    files = AtomicCheckpointIO()
    for step in (1, 2):
        files.save_checkpoint({"global_step": step}, tmp_path / f"{step}.ckpt")
    assert read == [tmp_path / "1.ckpt"]
    files.remove_checkpoint(tmp_path / "1.ckpt")
    assert os.listdir(tmp_path) == ["2.ckpt"]


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("kind", [Automatic, Manual])
@pytest.mark.parametrize("optimizer", [FUSED, partial(AdamW, lr=0.1), partial(SGD, lr=0.1, momentum=0.9)])
def test_a_gradient_that_is_not_finite_reaches_no_weight(
    tmp_path: Path, kind: type[Automatic], optimizer: MakeOptimizer
) -> None:
    clean = kind(optimizer)
    a_trainer(tmp_path, 5).fit(clean, PointData(BATCH, seed=1))
    module = kind(optimizer, poison=5 * BATCH + 2)  # in the sixth step
    with pytest.raises(NumericError, match=r"step 6: .*loss nan.*sample numbers 20 to 23.*finite\.ckpt"):
        a_trainer(tmp_path, 12, [FiniteGuard(tmp_path)]).fit(module, PointData(BATCH, seed=1))
    assert same(weights(module.layer), weights(clean.layer))
    # The batch is skipped at resume, the rest goes on.
    resumed = kind(optimizer, poison=5 * BATCH + 2)
    trainer = a_trainer(tmp_path, 12, [FiniteGuard(tmp_path)])
    trainer.fit(resumed, PointData(BATCH, seed=1), ckpt_path=tmp_path / "finite.ckpt")
    assert trainer.global_step == 12
    assert all(bool(weight.isfinite().all()) for weight in weights(resumed))
    states = [state for opt in trainer.optimizers for state in opt.state.values()]
    assert all(bool(torch.as_tensor(value).isfinite().all()) for state in states for value in state.values())


def test_a_bad_micro_batch_is_found_when_its_step_is_made(tmp_path: Path) -> None:
    data = PointData(BATCH, seed=1, micro_batch_size=2)
    module = Automatic(poison=2 * BATCH)
    trainer = a_trainer(tmp_path, 6, [FiniteGuard(tmp_path)], accumulate_grad_batches=2, gradient_clip_val=1.0)
    with pytest.raises(NumericError, match=r"step 3: .*loss nan, [\d.]+; sample numbers 8 to 9, 10 to 11"):
        trainer.fit(module, data)
    assert checkpoint.load(tmp_path / "finite.ckpt")["global_step"] == 3


def test_the_host_does_not_look_at_every_step_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = FiniteGuard(tmp_path, every_n_steps=4)
    looked: list[int] = []
    stop = guard._stop_if_bad
    monkeypatch.setattr(guard, "_stop_if_bad", lambda *args: (looked.append(args[0].global_step), stop(*args)))
    module = Automatic(poison=4 * BATCH)
    monkeypatch.setattr(Automatic, "device", torch.device("meta"), raising=False)
    with pytest.raises(NumericError, match="step 5: "):
        a_trainer(tmp_path, 12, [guard]).fit(module, PointData(BATCH, seed=1))
    assert looked[:2] == [4, 8]
    assert all(bool(weight.isfinite().all()) for weight in weights(module))


def test_a_save_looks_first(tmp_path: Path) -> None:
    guard = FiniteGuard(tmp_path)
    trainer = a_trainer(tmp_path, 1, [guard])
    trainer.fit(Automatic(), PointData(BATCH, seed=1))
    guard._current.bad.append(torch.tensor(True))
    guard._steps.append(guard._current)
    with pytest.raises(NumericError):
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").exists()
    assert (tmp_path / "finite.ckpt").exists()


# ---------------------------------------------------------------------- signals


def in_a_child(work: Callable[[], None]) -> int:
    """Run `work` in a fork of this process; its exit status, as main.py's would be (negative: died of a signal)."""
    child = os.fork()
    if child == 0:
        end_like_a_process(work)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def end_like_a_process(work: Callable[[], None]) -> NoReturn:
    """Do `work` in a forked child, and leave with the code that the interpreter would."""
    try:
        work()
    except SystemExit as stop:
        os._exit(int(stop.code or 0))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


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
    assert checkpoint.load(tmp_path / "stopped.ckpt")["global_step"] == 7
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
    assert checkpoint.load(tmp_path / "stopped.ckpt")["global_step"] == 10
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


def test_a_requeue_handler_is_left_alone() -> None:
    def installing() -> None:
        requeued = []
        signal.signal(signal.SIGUSR1, lambda *_: requeued.append(1))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        listener = signals.Listener()
        listener.install()
        for number in (signal.SIGUSR1, signal.SIGHUP):
            os.kill(os.getpid(), number)
        assert (requeued, listener.received) == ([1], 0)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert listener.received == signal.SIGUSR2

    assert in_a_child(installing) == 0


def test_the_third_request_ends_at_once_but_a_doubled_signal_is_one(capfd: pytest.CaptureFixture) -> None:
    def stubborn() -> None:
        listener = signals.Listener()
        listener.install()
        for pause in (0, 0, 0, 1.1, 1.1):
            time.sleep(pause)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)

    assert in_a_child(stubborn) == 128 + signal.SIGTERM
    printed = capfd.readouterr().err
    assert re.findall("SIGTERM: stopping.*", printed)[1:] == ["SIGTERM: stopping at once; the last checkpoint stands"]


def two_ranks(folder: Path, workers: int) -> list[int]:
    """Two processes in a group of their own that train together, as torchrun would start them; their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def train(rank: int) -> None:
        os.environ.update(launcher | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        module = Automatic(on_batch=lambda numbers: numbers[0] > BATCH and (folder / f"started.{rank}").touch())
        options = {"devices": 2, "strategy": "ddp", "num_sanity_val_steps": 0}
        trainer = a_trainer(folder, 1_000_000, [StopOnSignal(folder)], **options)
        trainer.fit(module, PointData(BATCH, seed=1, num_workers=workers))

    children: list[int] = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os.setpgid(0, children[0] if children else 0)
            end_like_a_process(partial(train, rank))
        children.append(child)
    return children


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (done := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return done


@pytest.mark.parametrize("target", ["first", "second", "group"])
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 2), (signal.SIGUSR1, 0), (signal.SIGINT, 2)])
def test_two_ranks_stop_after_the_same_step(tmp_path: Path, number: int, workers: int, target: str) -> None:
    children = two_ranks(tmp_path, workers)
    codes: dict[int, int] = {}

    def ended() -> bool:
        for child in set(children) - set(codes):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                codes[child] = os.waitstatus_to_exitcode(status)
        return len(codes) == 2

    try:
        assert wait_until(lambda: all((tmp_path / f"started.{rank}").exists() for rank in range(2)), 120)
        if target == "group":
            os.killpg(children[0], number)
        else:
            os.kill(children[target == "second"], number)
        assert wait_until(ended, 60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(children[0], signal.SIGKILL)
    assert list(codes.values()) == [128 + number] * 2
    assert checkpoint.load(tmp_path / "stopped.ckpt")["global_step"] > 1
