"""The one place that uses private parts of Lightning, or behavior that it does not document.

A function for each. tests/training/test_lightning_internals.py has a test for each function, which fails if a new
version of Lightning changes what it relies on; tests/test_layering.py keeps private parts out of all other files.
"""

import logging
import subprocess
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector

# ------------------------------------------------------------------ what it prints


def ignore_expected_warnings() -> None:
    """Silence Lightning's warnings about what is intended here. Warnings differ only in their texts."""
    texts = (
        "Found .* module.* in eval mode",  # the average always is
        ".*isinstance.treespec",  # Lightning's own use of torch
        ".*does not have many workers",  # measured: more would not help
    )
    for text in texts:
        warnings.filterwarnings("ignore", text, module="pytorch_lightning")


@contextmanager
def muted() -> Iterator[None]:
    """Keep Lightning from listing devices and advertising within the block; it has no setting for that."""
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")

    # Not the logger's level, which blocks that overlap in two threads would restore to each other's.
    def warns(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING

    logger.addFilter(warns)
    try:
        yield
    finally:
        logger.removeFilter(warns)


def is_missing_metric(error: BaseException) -> bool:
    """Whether EarlyStopping has found no metric of its `monitor`: only the text says so."""
    return isinstance(error, RuntimeError) and str(error).startswith("Early stopping conditioned on metric")


# ------------------------------------------------------------------ how it counts


def set_validation_interval(trainer: pl.Trainer, batches: int) -> None:
    """Validate every `batches` micro-batches.

    The trainer's argument comes too early: it takes the world size, which the trainer's strategy decides, to know how
    many micro-batches a step has.
    """
    trainer.val_check_interval = batches


def set_accumulation(trainer: pl.Trainer, micro_batches: int) -> None:
    """Make a step of `micro_batches`, from the start of training on.

    Lightning refuses the trainer's argument if optimization is manual, although its loggers count by it even then.
    """
    trainer.accumulate_grad_batches = micro_batches


def place_batch_count(checkpoint: dict[str, Any], micro_batches: int) -> None:
    """Before a checkpoint is loaded: let the run go on after its first `micro_batches` micro-batches.

    Lightning saves their number, and a step may have another number of them now. By this number it tells which
    micro-batch is the last of its step, and when to validate.
    """
    counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for count in (counts["total"], counts["current"]):
        late = micro_batches - count["ready"]
        count.update({name: value + late for name, value in count.items()})


def number_row(module: pl.LightningModule, step: int) -> None:
    """Give `step` as the number of the row of metrics now being logged: Lightning takes a metric called "step" for it.

    By itself Lightning numbers rows by the batches that it believes to have stepped, from 0.
    """
    module.log("step", float(step))


def loss_divisor(trainer: pl.Trainer, module: pl.LightningModule) -> int:
    """What the loss that callbacks get has been divided by: the number of micro-batches, in automatic optimization."""
    return trainer.accumulate_grad_batches if module.automatic_optimization else 1


# ------------------------------------------------------------------ validation


def validation_follows(trainer: pl.Trainer) -> bool:
    """Whether the training loop validates after the batch that has just ended.

    As the loop decides it if `check_val_every_n_epoch` is None.
    """
    interval = trainer.val_check_batch
    return bool(trainer.enable_validation and interval and (trainer.fit_loop.total_batch_idx + 1) % interval == 0)


def restart_validation(checkpoint: dict[str, Any]) -> None:
    """Make the state of a validation that was cut short that of one whose first batch is not yet done.

    A resumed run then validates anew, in full; Lightning cannot go on in the middle.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    before = progress["total"]["ready"] - progress["current"]["ready"]
    progress["total"].update(ready=before + 1, started=before + 1, processed=before, completed=before)
    progress["current"].update(ready=1, started=1, processed=0, completed=0)
    progress["is_last_batch"] = False


# ------------------------------------------------------------------ signals and processes


class _NoSignals(_SignalConnector):
    def register_signal_handlers(self) -> None:
        pass


def leave_signals_alone(trainer: pl.Trainer) -> None:
    """Keep Lightning from installing signal handlers; call it in `setup`.

    Its handler of SIGTERM broadcasts in the middle of whatever the main thread is doing.
    """
    trainer._signal_connector = _NoSignals(trainer)


def skip_sigterm_broadcast(trainer: pl.Trainer) -> None:
    """Keep the ranks from asking one another before every batch whether one has received SIGTERM.

    Each time they would wait for the device. With `leave_signals_alone` the answer is always no.
    """
    vars(trainer.fit_loop.epoch_loop)["_broadcast_sigterm_tensor"] = lambda: None


def started_ranks(trainer: pl.Trainer) -> list[subprocess.Popen[bytes]]:
    """The ranks that this process has started by Lightning's own launcher; the list is the launcher's."""
    launcher = trainer.strategy.launcher
    return launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []


def dismiss_observers() -> None:
    """Stop Lightning's watch over the ranks that this process has started.

    Up to five seconds after one has exited it would kill this process, even while it is recording how the run ended.
    """
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._child_processes = []


def shard_over_all_ranks(strategy: ModelParallelStrategy) -> None:
    """Shard over every rank: by itself the strategy would over nodes alone. Call it before `setup_environment`.

    The number of ranks is known only after the strategy is constructed.
    """
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes


# ------------------------------------------------------------------ checkpoints and loggers


def assemble_checkpoint(trainer: pl.Trainer) -> dict[str, Any]:
    """What `trainer.save_checkpoint` would write, without writing it."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def wandb_arguments(logger: WandbLogger) -> dict[str, Any]:
    """What the logger would call `wandb.init` with, but for `anonymous`, which makes wandb warn."""
    return {name: value for name, value in logger._wandb_init.items() if name != "anonymous"}


def wandb_run(logger: WandbLogger) -> Any:
    """The logger's run of wandb, None if there is none yet; its public property `experiment` would start one."""
    return logger._experiment
