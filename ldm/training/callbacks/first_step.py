"""Whether a run has reached its first step: until then there is nothing to keep."""

from typing import Any

import pytorch_lightning as pl

from ldm.training.callbacks.step_callback import StepCallback


class FirstStep(StepCallback):
    """Records whether this process has made an optimizer step, or has finished without needing one.

    Attributes:
        made: whether it has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made = False

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        self.made = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.made = True
