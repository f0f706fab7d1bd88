"""From the configuration's `lightning` section to a Trainer, and from a Trainer's end to a run's outcome.

    lightning:
      trainer: {max_steps: 10000, precision: bf16-mixed, val_check_interval: 500, ...}   # Lightning's own arguments
      logger: {target: ...}            # beside metrics.csv, which is always written; null: nothing else
      callbacks: {name: {target: ...}} # added to the defaults, or in place of the one of that name; null: without it
      strategy: ddp                    # a name of Lightning's, or a node

`val_check_interval` counts optimizer steps; accumulation follows from the data's batch sizes. What keeps a run's work
(checkpoints, clean stops, finite weights, the metrics file) needs no line of YAML.
"""

import errno
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.model_helpers import is_overridden

from ldm import checkpoint
from ldm.config import build
from ldm.errors import CheckpointError, ConfigError, LdmError, ResourceError
from ldm.loggers import FencedWandb, MetricsFile
from ldm.run import RunFolder, RunState
from ldm.safety import AtomicCheckpointIO, FiniteGuard, Provenance, StopOnSignal
from ldm.saving import Checkpoints, set_aside_later
from ldm.signals import Stopped

# Two checkpoints are kept, and a third is being written.
_FILES = 3
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def build_model(tree: Mapping[str, Any], trust: Sequence[str] = ()) -> Any:
    """The module of `tree["model"]`, its first weights a function of the seed."""
    torch.manual_seed(tree["seed"])
    return build(tree["model"], trust, key="model")


def make_trainer(
    tree: Mapping[str, Any],
    data: Any,
    model: Any,
    callbacks: Sequence[pl.Callback] = (),
    loggers: Sequence[Logger] = (),
    trust: Sequence[str] = (),
    folder: Path | None = None,
) -> pl.Trainer:
    """A Trainer whose steps, intervals and accumulation mean the same on any number of devices.

    Args:
        tree: the configuration with every reference filled in.
        data: data module, for the accumulation.
        model: module, which says whether it accumulates by itself; its weights are not touched.
        folder: the run folder.

    Raises:
        ConfigError: Lightning refuses an argument.
    """
    section = tree["lightning"]
    arguments: dict[str, Any] = {"enable_model_summary": False, "log_every_n_steps": 50} | section["trainer"]
    _check_arguments(arguments, model)
    max_steps = arguments["max_steps"]
    interval = min(arguments.pop("val_check_interval", None) or max(1, max_steps // 10), max_steps)
    plugins = build(arguments.pop("plugins", None) or [], trust, key="lightning.trainer.plugins")
    strategy = build(section.get("strategy") or "auto", trust, key="lightning.strategy")
    steps = _Steps()
    try:
        with _muted():
            trainer = pl.Trainer(
                **arguments,
                strategy=strategy,
                logger=list(loggers),
                callbacks=[steps, *callbacks],
                plugins=[AtomicCheckpointIO(), *(plugins if isinstance(plugins, list) else [plugins])],
                enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
                default_root_dir=folder,
                max_epochs=-1,
                check_val_every_n_epoch=None,
                use_distributed_sampler=False,
                num_sanity_val_steps=0,
            )
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ConfigError(f"lightning.trainer: {error}") from error
    # Known only now: the world size is the strategy's. Lightning counts the interval in batches.
    steps.accumulation = data.accumulation(trainer.world_size)
    trainer.val_check_interval = interval * steps.accumulation
    return trainer


class _Steps(pl.Callback):
    """Tells the trainer how many batches make a step.

    Not by its argument, since Lightning refuses that of a module with manual optimisation, though its loggers count
    steps by it.
    """

    accumulation = 1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.accumulate_grad_batches = self.accumulation


def _check_arguments(arguments: Mapping[str, Any], model: Any) -> None:
    interval = arguments.get("val_check_interval")
    if interval is not None and (type(interval) is not int or interval < 1):
        raise ConfigError(
            f"lightning.trainer.val_check_interval: expected a number of optimizer steps, found {interval!r}."
        )
    if arguments.get("gradient_clip_val") and not model.automatic_optimization:
        raise ConfigError(
            "lightning.trainer.gradient_clip_val: this model has two optimizers and clips by itself; "
            "write model.params.gradient_clip."
        )


@contextmanager
def _muted() -> Iterator[None]:
    """Within the block Lightning does not advertise."""
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def make_loggers(tree: Mapping[str, Any], folder: RunFolder, project: str, trust: Sequence[str] = ()) -> list[Logger]:
    """metrics.csv, and the configuration's; without a word about them wandb (unless WANDB_MODE is disabled)."""
    section = tree["lightning"]
    mode = os.environ.get("WANDB_MODE")
    if "logger" in section:
        chosen = build(section["logger"] or [], trust, key="lightning.logger")
        further = (
            list(chosen.values()) if isinstance(chosen, dict) else chosen if isinstance(chosen, list) else [chosen]
        )
    elif mode == "disabled":
        further = []
    else:
        name = folder.path.name
        further = [FencedWandb(folder.path, project, name, id=_wandb_id(name), offline=mode == "offline")]
    for logger in further:
        logger.log_hyperparams(dict(tree))
    return [MetricsFile(folder.metrics_file), *further]


def _wandb_id(name: str) -> str:
    return re.sub(r"[^\w-]", "-", name)


def make_callbacks(tree: Mapping[str, Any], folder: RunFolder, trust: Sequence[str] = ()) -> list[pl.Callback]:
    """The defaults, changed by name by the configuration."""
    nodes = tree["lightning"].get("callbacks") or {}
    default: dict[str, pl.Callback | None] = {
        "provenance": Provenance(tree),
        "finite": FiniteGuard(folder.checkpoints),
        "stop": StopOnSignal(folder.checkpoints),
        "checkpoints": Checkpoints(),
    }
    chosen = default | {name: build(node, trust, key=f"lightning.callbacks.{name}") for name, node in nodes.items()}
    return [callback for callback in chosen.values() if callback is not None]


def run(
    trainer: pl.Trainer, model: Any, data: Any, folder: RunFolder, named: Path | None, *, test: bool = True
) -> RunState:
    """Train from `named`, else from the folder's newest checkpoint, else from the start.

    Leaves the outcome, which it returns, in run_state.json, also where it raises.

    Raises:
        LdmError: something the user can mend; the checkpoints stand.
    """
    file = named or checkpoint.newest(folder.checkpoints)
    if trainer.is_global_zero:
        checkpoint.sweep(folder.checkpoints)
        if named is not None and named.parent.resolve() == folder.checkpoints.resolve():
            set_aside_later(folder.checkpoints, checkpoint.load(named)["global_step"])
    record(trainer, folder, RunState("running", resume_from=_within(folder, file)))
    try:
        trainer.fit(model, datamodule=data, ckpt_path=file, weights_only=True)
        if test and is_overridden("test_step", model):
            trainer.test(model, datamodule=data)
    except Stopped as stopped:
        reason = f"by {stopped.signal.name}"
        return record(trainer, folder, RunState("stopped", trainer.global_step, reason, 128 + stopped.signal))
    except BaseException as error:
        known = explain(error)
        reason = str(known or f"{type(error).__name__}: {error}").splitlines()[0]
        code = known.exit_code if known else 1
        record(trainer, folder, RunState("failed", trainer.global_step, reason, code))
        raise
    if trainer.global_step < trainer.max_steps:
        return record(trainer, folder, RunState("stopped", trainer.global_step, "before max_steps, as configured", 0))
    return record(trainer, folder, RunState("finished", trainer.global_step, "", 0))


def validate(trainer: pl.Trainer, model: Any, data: Any, folder: RunFolder, named: Path | None) -> None:
    """Validate `named`, else the folder's newest checkpoint; Lightning prints and the loggers keep the metrics."""
    file = named or checkpoint.newest(folder.checkpoints)
    if file is None:
        raise ConfigError("Without training there is nothing to validate: name a run or a checkpoint with --resume.")
    trainer.validate(model, datamodule=data, ckpt_path=file, weights_only=True)


def record(trainer: pl.Trainer, folder: RunFolder, state: RunState) -> RunState:
    """Write run_state.json on the main rank; of a run that has ended, with the checkpoint to resume from."""
    if not trainer.is_global_zero:
        return state
    if state.status != "running":
        with suppress(CheckpointError):  # all damaged: nothing to resume from
            state = replace(state, resume_from=_within(folder, checkpoint.newest(folder.checkpoints)))
    folder.write_state(state)
    return state


def _within(folder: RunFolder, file: Path | None) -> str | None:
    if file is None:
        return None
    return str(file.relative_to(folder.path)) if file.is_relative_to(folder.path) else str(file)


def space_needed(model: Any) -> int:
    """Bytes of the checkpoints that lie in a run folder at one time: weights and Adam's two moments, in float32."""
    weights = sum(tensor.numel() for tensor in model.state_dict().values() if isinstance(tensor, torch.Tensor))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return _FILES * 4 * (weights + 2 * trained)


@contextmanager
def explained() -> Iterator[None]:
    """Within the block, errors of libraries that a user can mend become LdmErrors."""
    try:
        yield
    except Exception as error:
        known = explain(error)
        if known is None or known is error:
            raise
        raise known from error


def explain(error: BaseException) -> LdmError | None:
    """The error as one that the user can mend; None where it is a bug."""
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
        case torch.OutOfMemoryError() | MemoryError():
            return ResourceError(
                f"out of memory: {first_line}\nLower data.params.micro_batch_size, or the model's size."
            )
        case OSError() if error.errno in _NO_ROOM:
            return ResourceError(f"{error.filename or 'a file'}: {error.strerror}. Make room, or permit writing there.")
        case RuntimeError() if "DataLoader worker" in text:
            return ResourceError(
                f"a data loader's worker died, likely for want of memory: {first_line}\n"
                "Resume with fewer data.params.num_workers."
            )
        case RuntimeError() if text.startswith("Error(s) in loading state_dict"):
            return CheckpointError(f"the checkpoint is of another model than the configuration describes: {text}")
    return None
