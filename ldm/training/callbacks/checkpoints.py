"""When a run saves, and from what it resumes; how a save is written is in ldm/checkpoints/writer.py."""

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins import CheckpointIO

from ldm.checkpoints import store, writer
from ldm.checkpoints.store import ReadShards, Verified
from ldm.checkpoints.writer import Writer
from ldm.errors import CheckpointError, ConfigError, LdmError, ResourceError
from ldm.ranges import Count
from ldm.runtime import distributed
from ldm.training import lightning_internals
from ldm.training.callbacks.monitors import logged_by_callbacks
from ldm.training.callbacks.step_callback import StepCallback


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's reading and writing of checkpoints, done by ldm.checkpoints.

    Attributes:
        writer: the thread that saves.
        source: the checkpoint that was loaded, or that is to be loaded and is verified already.
    """

    def __init__(self) -> None:
        self.writer = Writer()
        self.source: Verified | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.writer.save(checkpoint, Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return self.load(path)

    def load(self, path: Path | str, read_shards: ReadShards | None = None) -> dict[str, Any]:
        """The state of a checkpoint, or of the newest good one of a folder, onto the CPU (collective).

        Rank 0 reads all of it once to verify it, and each rank then reads what it loads.

        Args:
            path: of rank 0, which alone may know the run folder.
            read_shards: see `store.load`.

        Raises:
            CheckpointError: there is none, it is damaged, or it holds weights alone; on all ranks, even if only one
                finds it so.
        """
        known, path = self.source, Path(path)
        state: dict[str, Any] = {}
        failure = None
        with distributed.patience():  # a rank whose files are its own verifies them again
            self.source = distributed.from_main(lambda: known if known and known.path == path else store.verify(path))
            try:
                state = _whole(store.load(self.source, read_shards), self.source.path)
            except Exception as error:
                failure = error
            raise_together(failure, CheckpointError, "load its part of the checkpoint")
        return state

    def remove_checkpoint(self, path: Any) -> None:
        store.remove(Path(path))

    def teardown(self) -> None:
        self.writer.close()


def _whole(state: dict[str, Any], file: Path) -> dict[str, Any]:
    """The state, if a run can go on from it: with its optimizers, or before its first step."""
    if store.is_untrained(state):
        return {"callbacks": {}, **state}  # without that key Lightning would not let callbacks see it
    if "loops" not in state:
        raise CheckpointError(
            f"{file}: holds weights alone: sample from it, start a new run with init_from, or resume from one of the "
            f"run's checkpoints/."
        )
    return state


def files_of(trainer: pl.Trainer) -> AtomicCheckpointIO:
    """The trainer's reader and writer of checkpoints."""
    files = trainer.strategy.checkpoint_io
    assert isinstance(files, AtomicCheckpointIO), "ldm.training.trainer.make_trainer puts it there"
    return files


def save_at_end(trainer: pl.Trainer, path: Path) -> None:
    """The save that a run ends with: returns on all ranks when it is on the disk.

    Raises:
        LdmError: it is not; on all ranks.
    """
    files = files_of(trainer).writer
    files.wait()  # for a save that has more tries
    files.tries = 1
    trainer.save_checkpoint(path, weights_only=False)
    files.wait()
    raise_together(files.failure)


def raise_together(
    failure: Exception | None, kind: type[LdmError] = ResourceError, what: str = "save its part of a checkpoint"
) -> None:
    """Raise `failure`; if another rank has one, an error of `kind` saying that it could not do `what`."""
    own = 0 if failure is None else failure.exit_code if isinstance(failure, LdmError) else 1
    code = distributed.max_over_ranks(own)
    if failure is not None:
        raise failure
    if code:
        raise kind(f"another rank could not {what}; its message says why.")


class Checkpoints(StepCallback, Checkpoint):
    """Saves `step=<step>.ckpt` at intervals and at the end; `best.ckpt` is a link to the best by a metric.

    If a step is followed by a validation, it is saved after it, so that the metrics are in the file and a resumed run
    has them. Checkpoints that are no longer kept are removed once the next save is on disk.

    Args:
        every: optimizer steps between two saves; a run always saves at its end.
        keep: how many of the latest are kept, by the step inside of them.
        keep_every: steps that are multiples of this one are saved, and never removed; None: there are none.
        monitor: name of a validation metric; None keeps no best.
        higher_is_better: of that metric.
        keep_best: how many of the best are kept.
        asynchronous: training goes on while a save is written, at the cost of a second copy of the state on the host.
    """

    def __init__(
        self,
        every: Count = 1000,
        keep: Count = 2,
        keep_every: Count | None = None,
        monitor: str | None = None,
        higher_is_better: bool = False,
        keep_best: Count = 1,
        asynchronous: bool = True,
    ) -> None:
        super().__init__()
        for name, value in {"every": every, "keep": keep, "keep_every": keep_every, "keep_best": keep_best}.items():
            if value is not None and value < 1:
                raise ConfigError(f"checkpoints: {name} must be 1 or more, found {name}={value}")
        self.every = every
        self.keep = keep
        self.keep_every = keep_every
        self.monitor = monitor
        self.sign = -1.0 if higher_is_better else 1.0
        self.keep_best = keep_best
        self.asynchronous = asynchronous
        self._scores: dict[int, float] = {}  # of the steps that were among the best; lower is better
        self._before: Any = None  # the monitored metric before a validation, which may not measure it
        self._folder = Path()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._folder = Path(trainer.strategy.broadcast(str(trainer.default_root_dir))) / "checkpoints"
        files = files_of(trainer).writer
        files.asynchronous = self.asynchronous
        files.published = self._tidy

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        if self._due(trainer.global_step) and not lightning_internals.validation_follows(trainer):
            self._save(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._before = trainer.callback_metrics.get(self.monitor or "")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        if trainer.sanity_checking:
            if self.monitor is not None:
                _check_logged(trainer, self.monitor)
            return
        best = self.monitor is not None and self._among_best(trainer, self.monitor)
        if best or self._due(trainer.global_step):
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        save_at_end(trainer, writer.file_of(self._folder, trainer.global_step))

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self._scores, "monitor": self.monitor, "sign": self.sign}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Scores of another metric, or of the other direction, do not compare.
        if state_dict["monitor"] == self.monitor and state_dict.get("sign", self.sign) == self.sign:
            self._scores = dict(state_dict.get("scores", {}))

    def _due(self, step: int) -> bool:
        return step % self.every == 0 or (self.keep_every is not None and step % self.keep_every == 0)

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.global_step < trainer.max_steps:  # the end is saved by itself
            trainer.save_checkpoint(writer.file_of(self._folder, trainer.global_step), weights_only=False)

    def _among_best(self, trainer: pl.Trainer, monitor: str) -> bool:
        logged = trainer.callback_metrics.get(monitor)
        if logged is None and monitor not in logged_by_callbacks(trainer):
            _check_logged(trainer, monitor)
        if logged is None or logged is self._before:
            return False  # not measured in this validation: ldm/training/callbacks/frechet.py does now and then
        score = self.sign * float(logged)
        better = sum(other <= score for other in self._scores.values())
        if not math.isfinite(score) or better >= self.keep_best:
            return False
        self._scores = self._scores | {trainer.global_step: score}
        return True

    def _tidy(self) -> None:
        """After a save, in its thread."""
        writer.tidy(self._folder, self.keep, self.keep_every, self._scores, self.keep_best)


def _check_logged(trainer: pl.Trainer, monitor: str) -> None:
    if monitor not in trainer.callback_metrics:
        known = ", ".join(sorted(trainer.callback_metrics))
        raise ConfigError(
            f"lightning.callbacks.checkpoints.params.monitor: there is no metric {monitor!r}; validation logged {known}"
        )
