"""A clean stop: on a signal one checkpoint is saved, from which the run resumes exactly."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info

from ldm.checkpoints.store import SUFFIX
from ldm.runtime import signals
from ldm.runtime.distributed import max_over_ranks
from ldm.runtime.signals import Stopped
from ldm.training import lightning_internals
from ldm.training.callbacks.checkpoints import files_of, raise_together, save_at_end
from ldm.training.callbacks.step_callback import StepCallback

_CANNOT_SAVE = 1 << 10  # beyond any signal's number


class StopOnSignal(StepCallback):
    """Turns a signal into one checkpoint and a clean end, `Stopped`, on all ranks after the same step.

    The ranks synchronize after each optimizer step, never within an accumulation, after each validation batch, and
    before the first step, when there is nothing to save yet; also where a callback calls
    `stop_in_validation`. A rank whose checkpoints cannot be saved reports it in the
    same exchange, and all end together.

    Args:
        folder: where `stopped.ckpt` goes.
    """

    def __init__(self, folder: Path | str) -> None:
        super().__init__()
        self._path = Path(folder) / f"stopped{SUFFIX}"
        self._listens = False
        # Validation batches that all ranks have: only after these may they wait for each other.
        self._shared_batches = 0
        self._seen_batches = 0
        self._validation_cut = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._listens = signals.listen()
        lightning_internals.leave_signals_alone(trainer)
        lightning_internals.skip_sigterm_broadcast(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._listens:
            signals.listen_no_more()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._stop_if_asked(trainer, saving=False)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        self._stop_if_asked(trainer, saving=True)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            own = int(min(sum(trainer.num_val_batches), 2**31))
            self._shared_batches = -max_over_ranks(-own)
            self._seen_batches = 0

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.sanity_checking:
            return
        self._seen_batches += 1
        if self._seen_batches <= self._shared_batches:
            self.stop_in_validation(trainer)

    def stop_in_validation(self, trainer: pl.Trainer) -> None:
        """Stop if a signal has asked for it; all ranks call it at the same place of a validation.

        The run that resumes begins this validation anew.
        """
        if trainer.sanity_checking:
            return
        self._validation_cut = True
        self._stop_if_asked(trainer, saving=trainer.state.fn == "fit")
        self._validation_cut = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._validation_cut:
            lightning_internals.restart_validation(checkpoint)

    def _stop_if_asked(self, trainer: pl.Trainer, saving: bool) -> None:
        failure = files_of(trainer).writer.failure
        asked = max_over_ranks(signals.received() if failure is None else _CANNOT_SAVE)
        if asked == _CANNOT_SAVE:
            raise_together(failure)
        if not asked:
            return
        stopped = Stopped(asked)
        if saving:
            save_at_end(trainer, self._path)
        kept = f"saved {self._path}" if saving else "nothing new to save"
        rank_zero_info(f"stopped by {stopped.signal.name} after step {trainer.global_step}: {kept}")
        raise stopped
