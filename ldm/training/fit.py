"""From a Trainer to a run's outcome: what it resumes from, how it ended, and what a library's error means to a user."""

import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.model_helpers import is_overridden

from ldm import errors
from ldm.checkpoints import store, writer
from ldm.checkpoints.store import Verified
from ldm.config.targets import reason
from ldm.data.decoding import PICTURE
from ldm.errors import CheckpointError, ConfigError, LdmError, PeerError, ResourceError
from ldm.run_folder import RunFolder, RunState
from ldm.runtime import distributed, launcher, memory, signals
from ldm.runtime.signals import Stopped
from ldm.training import lightning_internals
from ldm.training.callbacks import ema_snapshots
from ldm.training.callbacks.ancestry import Ancestry
from ldm.training.callbacks.checkpoints import files_of
from ldm.training.init_from import Weights

# Two checkpoints are kept, and a third is being written.
_FILES = 3


def run(
    trainer: pl.Trainer,
    model: Any,
    data: Any,
    folder: RunFolder,
    named: Path | None,
    verified: Verified | None = None,
    is_new: bool = False,
    weights: Weights | None = None,
) -> RunState:
    """Train from `named`, else from the folder's newest checkpoint, else from the start.

    Returns the outcome and writes it to run_state.json, even if it raises.

    Args:
        verified: `named`, where this rank has verified it.
        is_new: the run starts from nothing, and `folder` is its own on rank 0 alone.
        weights: what it starts from where there is no checkpoint.

    Raises:
        LdmError: something the user can fix; the checkpoints are intact.
    """
    if trainer.is_global_zero:
        writer.sweep(folder.checkpoints)
    home = _Home(folder)
    source = None if is_new else _source(folder, named)
    ancestry = Ancestry(folder, weights if source is None else None)
    # Lightning sets the attribute where mypy does not see it.
    trainer.callbacks[:] = [home, *trainer.callbacks, ancestry, _SetAside(folder)]  # type: ignore[attr-defined]
    before = folder.read_state()
    resume_from = _within(folder, named) if named else before.resume_from if before else None
    record(trainer, folder, RunState("running", resume_from=resume_from))
    files_of(trainer).source = verified
    try:
        trainer.fit(model, datamodule=data, ckpt_path=source, weights_only=True)
        if is_overridden("test_step", model):
            trainer.test(model, datamodule=data)
    except Stopped as stopped:
        reason = f"by {stopped.signal.name}"
        return record(trainer, folder, RunState("stopped", trainer.global_step, reason, 128 + stopped.signal))
    except BaseException as error:
        return _failed(trainer, home, error)
    finally:
        launcher.end_children(home.children)
    if trainer.global_step < trainer.max_steps:
        return record(trainer, folder, RunState("stopped", trainer.global_step, "before max_steps, as configured", 0))
    return record(trainer, folder, RunState("finished", trainer.global_step, "", 0))


def _failed(trainer: pl.Trainer, home: "_Home", error: BaseException) -> RunState:
    """Record why the run ends, and raise the error again; the first rank that fails knows the cause.

    A rank that receives a signal before the first step and then loses its peers has been stopped: they received it too
    and exited first. From the first step on ranks stop together, so that a lost peer is a failure; torchrun sends the
    signal to the others when it has lost a rank.
    """
    known, folder = explain(error), home.folder
    if known is None and home.trying and isinstance(error, Exception):
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        known = ConfigError(f"model: a validation batch does not pass through it: {text}. Run it with -d to see where.")
    if isinstance(known, PeerError) and (number := signals.received()) and not home.under_way:
        reason = f"by {signal.Signals(number).name}, before the ranks could agree on a step to save"
        return record_first(trainer, folder, RunState("stopped", trainer.global_step, reason, 128 + number))
    reason = str(known or f"{type(error).__name__}: {error}").splitlines()[0]
    record_first(trainer, folder, RunState("failed", trainer.global_step, reason, known.exit_code if known else 1))
    if home.trying and known is not None and known is not error:
        raise known from error
    raise error


class _Home(pl.Callback):
    """Gives every rank the run folder, so that any can record how the run ended, and watches the ranks started here.

    Attributes:
        folder: the run folder; known on all ranks from `setup` on.
        children: the ranks that this process has started (with Lightning's own launcher).
        under_way: whether all ranks have reached the first step.
        trying: whether the run has ended in the validation batch before the first step.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.children: list[subprocess.Popen[bytes]] = []
        self.under_way = self.trying = False
        self._watch: launcher.Watch | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.folder = RunFolder(Path(trainer.strategy.broadcast(str(self.folder.path))))
        started = lightning_internals.started_ranks(trainer)
        if self._watch is None and started:
            self.children = started
            lightning_internals.dismiss_observers()
            self._watch = launcher.Watch(self.children, lambda reason: self._died(trainer, reason))

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        source = files_of(trainer).source
        if source is None or not trainer.is_global_zero:
            return
        rank_zero_info(f"resuming from {source.path}")
        record(trainer, self.folder, RunState("running", resume_from=_within(self.folder, source.path)))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.under_way = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.trying = trainer.sanity_checking
        self._release()
        if distributed.is_lost_peer(exception):
            files_of(trainer).writer.abandon()

    def _release(self) -> None:
        if self._watch is not None:
            self._watch.close()

    def _died(self, trainer: pl.Trainer, reason: str) -> None:
        state = RunState("failed", trainer.global_step, reason, PeerError.exit_code)
        record_first(trainer, self.folder, state)


class _SetAside(pl.Callback):
    """Sets aside checkpoints, and snapshots of averages, of later steps than the one that the run resumes from.

    Must be the last callback: until all others have agreed to the start, the run may be refused and must lose nothing.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        source = files_of(trainer).source
        if source is None or not trainer.is_global_zero:
            return
        if source.path.parent.resolve() == self.folder.checkpoints.resolve():
            step, averages = trainer.global_step, self.folder.path / ema_snapshots.FOLDER
            later = writer.set_aside_later(self.folder.checkpoints, step)
            for file in (*later, *writer.set_aside_later(averages, step, "step=*")):  # beside those put together
                rank_zero_info(f"of a later step than {step}: kept as {file}")


def validate(trainer: pl.Trainer, model: Any, data: Any, folder: RunFolder, named: Path | None) -> None:
    """Validate `named`, else the folder's newest checkpoint; Lightning prints and the loggers keep the metrics."""
    source = _source(folder, named)
    if source is None:
        raise ConfigError("Without training there is nothing to validate: name a run or a checkpoint with --resume.")
    trainer.validate(model, datamodule=data, ckpt_path=source, weights_only=True)


def _source(folder: RunFolder, named: Path | None) -> Path | None:
    """What to resume from, which rank 0 verifies when it is loaded; the same on all ranks, which are not yet joined."""
    return named or (folder.checkpoints if store.has_any(folder.checkpoints) else None)


def record(trainer: pl.Trainer, folder: RunFolder, state: RunState) -> RunState:
    """Write run_state.json on the main rank; for a run that has ended, with the checkpoint to resume from."""
    if not trainer.is_global_zero:
        return state
    if state.status != "running":
        state = _resumable(folder, state)
    folder.write_state(state)
    return state


def record_first(trainer: pl.Trainer, folder: RunFolder, state: RunState) -> RunState:
    """As `record`, for an end that not all ranks may reach: the first one writes it, even if the main rank is gone."""
    before = folder.read_state()
    if trainer.is_global_zero if before is None else before.status == "running":
        state = _resumable(folder, state)
        with suppress(FileNotFoundError):  # the main rank has removed a run without a step
            folder.write_state(state)
    return state


def _resumable(folder: RunFolder, state: RunState) -> RunState:
    with suppress(CheckpointError):  # all are damaged: nothing to resume from
        return replace(state, resume_from=_within(folder, store.newest(folder.checkpoints)))
    return state


def _within(folder: RunFolder, file: Path | None) -> str | None:
    if file is None:
        return None
    return str(file.relative_to(folder.path)) if file.is_relative_to(folder.path) else str(file)


def space_needed(model: Any) -> int:
    """Bytes of the checkpoints in a run folder at any one time: weights and Adam's two moments, in float32."""
    weights = sum(tensor.numel() for tensor in model.state_dict().values() if isinstance(tensor, torch.Tensor))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return _FILES * 4 * (weights + 2 * trained)


@contextmanager
def explained() -> Iterator[None]:
    """Within the block, errors of libraries that a user can fix become LdmErrors."""
    try:
        yield
    except Exception as error:
        known = explain(error)
        if known is None or known is error:
            raise
        raise known from error


def explain(error: BaseException) -> LdmError | None:
    """The error as one that the user can fix; None: it is a bug."""
    text = str(error).strip()
    first_line = text.splitlines()[0] if text else type(error).__name__
    match error:
        case LdmError():
            # A loader worker's error comes with its traceback before the message.
            return (
                type(error)(text.rpartition(f"{type(error).__name__}: ")[2]) if "Original Traceback" in text else error
            )
        case MisconfigurationException():
            return ConfigError(f"lightning.trainer: {text}")
        case RuntimeError() if distributed.is_lost_peer(error):
            waits = distributed.timeout()
            return PeerError(
                f"rank {distributed.rank()} of {distributed.world_size()} on {socket.gethostname()}: another rank died"
                f"{'' if waits is None else f', or did not answer within {waits:g} s'} ({first_line}).\n"
                "Its own output may say why. The last checkpoint is intact: continue with --resume. If ranks are "
                "merely slow, raise lightning.strategy.params.timeout (seconds)."
            )
        case RuntimeError() | MemoryError() if memory.exhausted(error):
            return _out_of_memory(error)
        case ImportError():
            return ConfigError(f"lightning: {reason(error)}")
        case OSError():
            return errors.of_place(error)
        case RuntimeError() if "DataLoader worker" in text and "Original Traceback" not in text:
            return ResourceError(
                f"a data loader's worker died, probably for lack of memory: {first_line}\n"
                "Resume with fewer data.params.num_workers."
            )
        case RuntimeError() if lightning_internals.is_missing_metric(error):
            return ConfigError(f"lightning.callbacks: {first_line}")
        case RuntimeError() if text.startswith("Error(s) in loading state_dict"):
            return CheckpointError(f"the checkpoint is of another model than the configuration describes: {text}")
    return None


def _out_of_memory(error: BaseException) -> ResourceError:
    """Name what ran out of memory: a picture, if the error's notes, or a worker's traceback, name one."""
    text = str(error).strip()
    lines = [*text.splitlines(), *getattr(error, "__notes__", [])]
    pictures = [line.strip() for line in lines if line.startswith(PICTURE)]
    worker = "Original Traceback" in text
    what = f"{type(error).__name__} in a data loader's worker" if worker else lines[0] if text else type(error).__name__
    if pictures:
        advice = (
            "Shrink or remove it, or set max_pixels of its data set below its size: it then counts as broken, and "
            "another takes its place."
        )
    elif worker:
        advice = "Resume with fewer data.params.num_workers."
    else:
        advice = "Lower data.params.micro_batch_size, or the model's size."
    return ResourceError("\n".join([f"out of memory: {what}", *pictures, advice]))
