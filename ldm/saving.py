"""When a run saves, and which of its checkpoints are kept."""

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.utilities import rank_zero_info, rank_zero_only

from ldm import checkpoint
from ldm.errors import ConfigError

_BEST = f"best{checkpoint.SUFFIX}"


class Checkpoints(Checkpoint):
    """Saves `step=<step>.ckpt` at intervals and at the end, and `best.ckpt` where a metric tells what is best.

    Where a step is followed by a validation, it is saved after that, so that the metrics are in the file and a resumed
    run does not miss them.

    Args:
        every: optimizer steps between two saves; a run always saves at its end.
        keep: how many of the latest are kept.
        monitor: name of a validation metric; None keeps no best.
        higher_is_better: of that metric.
    """

    def __init__(
        self, every: int = 1000, keep: int = 2, monitor: str | None = None, higher_is_better: bool = False
    ) -> None:
        if every < 1 or keep < 1:
            raise ConfigError(f"checkpoints: every and keep must be 1 or more, found every={every}, keep={keep}")
        self.every = every
        self.keep = keep
        self.monitor = monitor
        self.sign = -1.0 if higher_is_better else 1.0
        self._best = math.inf
        self._seen = 0
        self._folder = Path()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._folder = Path(trainer.strategy.broadcast(str(trainer.default_root_dir))) / "checkpoints"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self._seen:
            return  # within an accumulation
        self._seen = trainer.global_step
        if self._due(trainer) and not _validation_follows(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self._due(trainer):
            self._save(trainer)
        if self.monitor is not None:
            self._save_best(trainer, self.monitor)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "monitor": self.monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["monitor"] == self.monitor:
            self._best = state_dict["best"]

    def _due(self, trainer: pl.Trainer) -> bool:
        return trainer.global_step % self.every == 0 and trainer.global_step < trainer.max_steps

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self._folder / f"step={trainer.global_step:08d}{checkpoint.SUFFIX}", weights_only=False)
        _prune(self._folder, self.keep)

    def _save_best(self, trainer: pl.Trainer, monitor: str) -> None:
        if monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise ConfigError(f"checkpoints: there is no metric {monitor!r} to monitor; validation logged {known}")
        score = self.sign * float(trainer.callback_metrics[monitor])
        if score < self._best:
            self._best = score
            trainer.save_checkpoint(self._folder / _BEST, weights_only=False)


def set_aside_later(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints of later steps than `step` to `.superseded`: the run is about to take another way."""
    aside = []
    for file in sorted(folder.glob(f"*{checkpoint.SUFFIX}")):
        if checkpoint.load(file)["global_step"] > step:
            aside.append(file.rename(file.with_name(f"{file.name}.superseded")))
            rank_zero_info(f"{file} is of a later step than {step}: kept as {aside[-1].name}")
    return aside


@rank_zero_only
def _prune(folder: Path, keep: int) -> None:
    for file in sorted(folder.glob(f"step=*{checkpoint.SUFFIX}"))[:-keep]:
        file.unlink(missing_ok=True)


def _validation_follows(trainer: pl.Trainer) -> bool:
    # As Lightning's training loop decides it, where `check_val_every_n_epoch` is None.
    interval = trainer.val_check_batch
    return bool(trainer.enable_validation and interval and (trainer.fit_loop.total_batch_idx + 1) % interval == 0)
