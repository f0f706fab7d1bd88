"""Whether a run has reached its first step: before it there is nothing to keep."""

from typing import Any

import pytorch_lightning as pl


class FirstStep(pl.Callback):
    """Records whether this process has made an optimizer step, or has finished without needing one.

    Attributes:
        made: whether it has.
    """

    def __init__(self) -> None:
        self.made = False
        self._began = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.made = self.made or trainer.global_step > self._began

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.made = True
