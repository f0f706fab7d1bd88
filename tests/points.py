"""A regression of points, the smallest run there is, and forked children that train it: where many tests start from."""

import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, Dataset

from ldm.data.datamodule import ElasticDataModule
from ldm.training.callbacks.checkpoints import AtomicCheckpointIO

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
    """One optimizer, stepped by Lightning. `poison` holds the sample numbers whose loss is NaN."""

    def __init__(
        self,
        optimizer: MakeOptimizer = FUSED,
        poison: Collection[int] = (),
        on_batch: Callable[[np.ndarray], Any] = lambda _: None,
    ) -> None:
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
        return loss * float("nan") if set(self.poison) & set(batch["draws"].numbers.tolist()) else loss

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


class Ranks:
    """Forked processes in a group of their own that work together, as torchrun would start them.

    Attributes:
        children: their ids.
        codes: their exit statuses, of those that have ended; negative: died of a signal.
    """

    def __init__(self, work: Callable[[int], None], number: int = 2) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "GROUP_RANK": "0"}
        launcher |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.children: list[int] = []
        self.codes: dict[int, int] = {}
        for rank in range(number):
            child = os.fork()
            if child == 0:
                os.setpgid(0, self.children[0] if self.children else 0)
                os.environ.update(launcher | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
                end_like_a_process(partial(work, rank))
            self.children.append(child)

    def send(self, number: int, rank: int | None = None) -> None:
        """To one rank, or to the group."""
        if rank is None:
            os.killpg(self.children[0], number)
        else:
            os.kill(self.children[rank], number)

    def ended(self, *which: int) -> bool:
        """Whether these ranks, or all, have left."""
        for rank in set(range(len(self.children))) - set(self.codes):
            found, status = os.waitpid(self.children[rank], os.WNOHANG)
            if found:
                self.codes[rank] = os.waitstatus_to_exitcode(status)
        return all(rank in self.codes for rank in which or range(len(self.children)))


@contextmanager
def ranks_at(work: Callable[[int], None], number: int = 2) -> Iterator[Ranks]:
    """Ranks, none of which outlives the block."""
    started = Ranks(work, number)
    try:
        yield started
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.children[0], signal.SIGKILL)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (done := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return done
