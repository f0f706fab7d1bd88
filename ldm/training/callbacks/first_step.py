"""Whether a run has reached its first step: until then there is nothing to keep."""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl

from ldm.training.callbacks.step_callback import StepCallback


class FirstStep(StepCallback):
    """Records whether this process has made an optimizer step, or has finished without needing one.

    Args:
        keep: called on the main rank after the first step.

    Attributes:
        made: whether it has.
    """

    def __init__(self, keep: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.made = False
        self._keep = keep

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        if not self.made and trainer.is_global_zero:
            self._keep()
        self.made = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.made = True
