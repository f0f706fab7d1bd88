"""Speed and progress of a run: images per second, key metrics, time elapsed and left."""

import time
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from torch import Tensor

from ldm.ranges import Count, NotNegative
from ldm.runtime.durations import so_far
from ldm.training import lightning_internals
from ldm.training.callbacks.step_callback import StepCallback


class Throughput(StepCallback):
    """Logs `images_per_second` over all ranks and `data_wait`, the share of the time spent waiting for a batch.

    Measured with the host's clock over many steps, without waiting for the device. Validation and saves do not count.
    Must come after the callbacks that draw images, so that their time does not count as waiting.

    Args:
        every_n_steps: optimizer steps averaged over; best the trainer's `log_every_n_steps`.
    """

    def __init__(self, every_n_steps: Count = 50) -> None:
        super().__init__()
        self._every_n_steps = every_n_steps
        self._images = 0
        self._waited = self._worked = 0.0
        self._mark: float | None = None  # when the last batch ended, unless something else came in between

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if self._mark is not None:
            self._waited += now - self._mark
        self._mark = now

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if self._mark is not None:
            self._worked += now - self._mark
            self._images += len(batch["draws"]) * trainer.world_size
        self._mark = now
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        if trainer.global_step % self._every_n_steps == 0:
            total = max(self._waited + self._worked, 1e-9)
            speed = {"images_per_second": self._images / total, "data_wait": self._waited / total}
            pl_module.log_dict(speed, on_step=True, on_epoch=False, batch_size=1)
            self._images, self._waited, self._worked = 0, 0.0, 0.0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._mark = None


class Progress(ProgressBar):
    """Steps done, key figures, images a second, time elapsed and left: a bar in a terminal, else an occasional line.

    The figures are the entry `figures` of what the module's `training_step` returns (a mapping of names to scalar
    tensors), then the loss. They are read from the device when they are shown, not at every step.

    Args:
        refresh_seconds: between two updates in a terminal.
        log_seconds: between two lines elsewhere.
    """

    def __init__(self, refresh_seconds: NotNegative = 1.0, log_seconds: NotNegative = 30.0) -> None:
        super().__init__()
        self._console = Console()
        self._pause = refresh_seconds if self._console.is_terminal else log_seconds
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._shown_at = self._images = 0.0
        self._began_at, self._began = 0.0, 0  # when, and at which step
        self._validating_since = 0.0
        self._enabled = True

    def disable(self) -> None:
        """Lightning calls this on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._shown_at, self._images = time.monotonic(), 0
        self._began_at, self._began = self._shown_at, trainer.global_step
        if self._enabled and self._console.is_terminal:
            words = TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.completed:.0f}/{task.total:.0f}")
            self._bar = Bar(*words, TextColumn("{task.fields[figures]}"), console=self._console)
            self._task = self._bar.add_task("training", figures="", total=trainer.max_steps)
            self._bar.update(self._task, completed=trainer.global_step)
            self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += len(batch["draws"]) * trainer.world_size
        now = time.monotonic()
        elapsed = now - self._shown_at
        last = trainer.global_step == trainer.max_steps
        if not self._enabled or (elapsed < self._pause and not last):
            return
        figures = {name: float(value) for name, value in _figures(outputs).items()}
        if "loss" in figures:
            figures["loss"] *= lightning_internals.loss_divisor(trainer, pl_module)
        words = [f"{name} {value:.4g}" for name, value in figures.items()]
        words.append(f"{self._images / max(elapsed, 1e-9):.3g} images/s")
        words.append(self._times(trainer))
        self._shown_at, self._images = now, 0
        self._show(trainer, "training", "  ".join(words))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validating_since = self._shown_at = time.monotonic()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not self._enabled or trainer.sanity_checking:
            return
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, description="validating")
        elif now - self._shown_at >= self._pause:
            self._shown_at = now
            done, total = batch_idx + 1, sum(trainer.num_val_batches)
            times = so_far(now - self._validating_since, done, total)
            self._say(f"step {trainer.global_step}: validating {done}/{total}  {times}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the metrics of validation in one line, in the order in which the module logs them."""
        if not self._enabled or trainer.sanity_checking:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        words = [f"{name} {value:.4g}" for name, value in metrics.items()]
        if trainer.state.fn == "fit":
            words.append(self._times(trainer))
        self._say(f"step {trainer.global_step}: " + "  ".join(words))
        self._shown_at, self._images = time.monotonic(), 0

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _times(self, trainer: pl.Trainer) -> str:
        """Estimated from the steps of this process and everything between them."""
        done, total = trainer.global_step - self._began, trainer.max_steps - self._began
        return so_far(time.monotonic() - self._began_at, done, total)

    def _show(self, trainer: pl.Trainer, what: str, figures: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=what, completed=trainer.global_step, figures=figures)
        else:
            self._say(f"step {trainer.global_step}/{trainer.max_steps}: {figures}")

    def _say(self, line: str) -> None:
        # Without line breaks: a log file has no width.
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _figures(outputs: Any) -> dict[str, Tensor]:
    """What `training_step` wants shown, by name: its `figures`, then its loss."""
    if isinstance(outputs, Tensor):
        return {"loss": outputs}
    if not isinstance(outputs, Mapping):
        return {}
    loss = {"loss": outputs["loss"]} if isinstance(outputs.get("loss"), Tensor) else {}
    return {**outputs.get("figures", {}), **loss}
