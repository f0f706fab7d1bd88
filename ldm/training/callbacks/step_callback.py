"""The base of callbacks that act once per optimizer step."""

from typing import Any

import pytorch_lightning as pl


class StepCallback(pl.Callback):
    """A callback with a hook for the end of an optimizer step; Lightning's own come after every micro-batch.

    A step has ended when `trainer.global_step` has advanced, with automatic and with manual optimization. A resumed run
    counts from the step in its checkpoint, so the micro-batches of its first step do not end the one before.

    Subclasses that override `on_train_start` or `on_train_batch_end` call the one here.
    """

    def __init__(self) -> None:
        self._last_step = 0

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        """Called after step number `trainer.global_step`; `batch` is its last micro-batch on this rank."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self.on_step_end(trainer, pl_module, batch)
