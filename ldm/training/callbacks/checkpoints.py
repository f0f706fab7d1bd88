"""When a run saves, how a save is written without holding up training, and which checkpoints are kept."""

import logging
import math
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins import CheckpointIO
from pytorch_lightning.utilities import rank_zero_info

from ldm.checkpoints import sealed_file, store
from ldm.checkpoints.snapshot import HostMemory
from ldm.errors import ConfigError, LdmError, PeerError, ResourceError
from ldm.ranges import Count
from ldm.runtime import distributed
from ldm.training import lightning_internals
from ldm.training.callbacks.step import StepCallback

TRIES = 3
"""How many saves in a row may fail for lack of space before the run ends."""

_BEST = f"best{store.SUFFIX}"
_OURS = re.compile(rf"(step=\d+|stopped|finite){re.escape(store.SUFFIX)}")

log = logging.getLogger(__name__)


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's reading and writing of checkpoints, done by ldm.checkpoints.store, in a thread.

    If asynchronous, a save copies the state to the host and returns; a second one waits for the first. The first save
    of a run is read back as soon as it is written, so that a checkpoint that cannot be loaded is noticed at once, not
    at resume.

    With several ranks a failed save raises nothing here, since the others would wait forever: see `failure`.

    Attributes:
        asynchronous: a save returns before it is on disk, and needs a second copy of the state.
        tries: how many saves in a row may fail for lack of space or of another rank's shard before that is a failure.
        published: called in the thread after each save.
        failure: why saving has failed for good; None otherwise.
    """

    def __init__(self) -> None:
        self.asynchronous = False
        self.tries = TRIES
        self.published: Callable[[], None] = _nothing
        self.failure: Exception | None = None
        self._failed = 0  # saves in a row
        self._proven = False
        self._memory = HostMemory()
        self._under_way: Future[None] | None = None
        self._needs_peers = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.wait()
        self._needs_peers = "shard" in checkpoint
        state = self._memory.copy(checkpoint) if self.asynchronous else checkpoint
        # A thread for each save, which ends with it: what it computes leaves OpenMP threads behind for as long as it
        # lives, and with more of them than cores none waits actively any more; training then takes twice as long.
        thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way = thread.submit(self._write, state, Path(path))
        thread.shutdown(wait=False)
        if not self.asynchronous:
            self.wait()
            if self.failure is not None and distributed.world_size() == 1:
                raise self.failure

    def wait(self) -> BaseException | None:
        """Until nothing is being written; returns the error of the last save, if it failed."""
        return None if self._under_way is None else self._under_way.exception()

    def abandon(self, seconds: float = 5.0) -> None:
        """The other ranks are lost: wait at most `seconds` for a save that needs their shards; it is not published."""
        if self._needs_peers and self._under_way is not None:
            wait([self._under_way], seconds)
            self._under_way = None

    def teardown(self) -> None:
        self.wait()
        self._memory.release()

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return store.load(Path(path), "cpu" if map_location is None else map_location)

    def remove_checkpoint(self, path: Any) -> None:
        store.remove(Path(path))

    def _write(self, state: dict[str, Any], path: Path) -> None:
        """The thread's work."""
        try:
            store.save(path, state)
            if distributed.is_main():
                if not self._proven:
                    store.load(path, assemble=False)
                    self._proven = True
                self.published()
        except Exception as error:
            self._failed += 1
            if self._failed >= self.tries or not isinstance(error, ResourceError | PeerError):
                self.failure = error
            else:
                log.warning(
                    "NOT SAVED (%d of %d in a row): %s\nTraining goes on, and tries again at the next interval.",
                    *(self._failed, self.tries, error),
                )
            raise
        self._failed = 0


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
    files = files_of(trainer)
    files.tries = 1
    trainer.save_checkpoint(path, weights_only=False)
    files.wait()
    raise_together(files.failure)


def raise_together(failure: Exception | None) -> None:
    """Raise `failure`, or a matching error if another rank has one."""
    own = 0 if failure is None else failure.exit_code if isinstance(failure, LdmError) else 1
    code = distributed.max_over_ranks(own)
    if failure is not None:
        raise failure
    if code:
        raise ResourceError("another rank could not save its part of a checkpoint; its message says why.")


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
        self._folder = Path()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._folder = Path(trainer.strategy.broadcast(str(trainer.default_root_dir))) / "checkpoints"
        files = files_of(trainer)
        files.asynchronous = self.asynchronous
        files.published = self._tidy

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        if self._due(trainer.global_step) and not lightning_internals.validation_follows(trainer):
            self._save(trainer)

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
        save_at_end(trainer, self._path(trainer.global_step))

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self._scores, "monitor": self.monitor, "sign": self.sign}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Scores of another metric, or of the same where the other end is now the better, say nothing.
        if state_dict["monitor"] == self.monitor and state_dict.get("sign", self.sign) == self.sign:
            self._scores = dict(state_dict.get("scores", {}))

    def _due(self, step: int) -> bool:
        return step % self.every == 0 or (self.keep_every is not None and step % self.keep_every == 0)

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.global_step < trainer.max_steps:  # the end is saved by itself
            trainer.save_checkpoint(self._path(trainer.global_step), weights_only=False)

    def _path(self, step: int) -> Path:
        return self._folder / f"step={step:08d}{store.SUFFIX}"

    def _among_best(self, trainer: pl.Trainer, monitor: str) -> bool:
        _check_logged(trainer, monitor)
        score = self.sign * float(trainer.callback_metrics[monitor])
        better = sum(other <= score for other in self._scores.values())
        if not math.isfinite(score) or better >= self.keep_best:
            return False
        self._scores = self._scores | {trainer.global_step: score}
        return True

    def _tidy(self) -> None:
        """After a save, in its thread: link the best, remove what is not kept."""
        files = {file: sealed_file.step(file) for file in self._folder.glob(f"*{store.SUFFIX}") if _is_ours(file)}
        scored = [file for file, step in files.items() if file == self._path(step) and step in self._scores]
        best = sorted(scored, key=lambda file: (self._scores[files[file]], files[file]))[: self.keep_best]
        if best:
            _link(self._folder / _BEST, best[0].name)
        kept = {*sorted(files, key=lambda file: (files[file], file.name))[-self.keep :], *best}
        for file, step in files.items():
            if file not in kept and not (self.keep_every and file == self._path(step) and step % self.keep_every == 0):
                store.remove(file)


def _check_logged(trainer: pl.Trainer, monitor: str) -> None:
    if monitor not in trainer.callback_metrics:
        known = ", ".join(sorted(trainer.callback_metrics))
        raise ConfigError(
            f"lightning.callbacks.checkpoints.params.monitor: there is no metric {monitor!r}; validation logged {known}"
        )


def set_aside_later(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints of steps after `step` to `.superseded`, since the run is about to diverge from them."""
    aside = []
    for file in sorted(folder.glob(f"*{store.SUFFIX}")):
        if sealed_file.step(file) <= step:
            continue
        if file.is_symlink():
            file.unlink()
            continue
        aside.append(file.rename(file.with_name(f"{file.name}.superseded")))
        rank_zero_info(f"{file} is of a later step than {step}: kept as {aside[-1].name}")
    return aside


def _is_ours(file: Path) -> bool:
    return _OURS.fullmatch(file.name) is not None and not file.is_symlink()


def _link(link: Path, target: str) -> None:
    """Make `link` a symbolic link to its neighbour `target`; it points at the old one or the new one."""
    temporary = link.with_name(f".{link.name}.new")
    with suppress(FileNotFoundError):
        temporary.unlink()
    temporary.symlink_to(target)
    temporary.replace(link)


def _nothing() -> None:
    pass
