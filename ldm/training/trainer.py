"""From the configuration's `lightning` section to a Trainer.

    lightning:
      trainer: {max_steps: 10000, precision: auto, val_check_interval: 500, ...}   # Lightning's own arguments
      logger, callbacks: ...           # ldm/training/defaults.py
      strategy: {target: ldm.training.strategies.FSDP2}   # left out: several ranks use DDP of that module

`val_check_interval` counts optimizer steps; accumulation follows from the data's batch sizes. Where torchrun or srun
has started the processes, their number replaces `devices` and `num_nodes`.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import MPSAccelerator
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.autoencoder.module import AutoencoderKL
from ldm.config.load import build
from ldm.config.targets import reason
from ldm.diffusion.module import LatentDiffusion
from ldm.errors import ConfigError
from ldm.runtime import distributed, threads
from ldm.runtime.step_metrics import is_logged
from ldm.training import lightning_internals
from ldm.training.callbacks.checkpoints import AtomicCheckpointIO
from ldm.training.defaults import LOG_EVERY, validation_interval
from ldm.training.rehearsal import Rehearsal
from ldm.training.strategies import DDP, FSDP2

log = logging.getLogger(__name__)

# Stage 1 takes gradients before a scaler could see them, so fp16 is not for it.
_PRECISIONS: dict[type, tuple[str, ...]] = {
    AutoencoderKL: ("32-true", "32", "bf16-mixed", "bf16"),
    LatentDiffusion: ("32-true", "32", "bf16-mixed", "bf16", "16-mixed", "16"),
}


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
        model: module, checked for what it can be trained with; its weights are not touched.
        folder: the run folder.

    Raises:
        ConfigError: Lightning refuses an argument.
    """
    lightning_internals.ignore_expected_warnings()
    section = tree["lightning"]
    arguments = _arguments(section["trainer"], trust)
    strategy = build(section.get("strategy") or "auto", trust, key="lightning.strategy")
    _check_model(model, arguments, strategy)
    steps = _Steps()
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    arguments |= {
        "logger": list(loggers),
        "callbacks": [steps, *callbacks, *([Rehearsal()] if saves else [])],
        "enable_checkpointing": saves,
        "default_root_dir": folder,
    }
    trainer = _trainer(strategy, arguments)
    threads.share(trainer.num_devices)
    steps.accumulation = data.accumulation(trainer.world_size)
    lightning_internals.set_validation_interval(trainer, arguments["val_check_interval"] * steps.accumulation)
    return trainer


def _arguments(written: Mapping[str, Any], trust: Sequence[str]) -> dict[str, Any]:
    """Lightning's arguments: the section `lightning.trainer`, our defaults, and what is the same in every run."""
    # One validation batch before the first step: what fails there should not fail hours later.
    default = {"enable_model_summary": False, "log_every_n_steps": LOG_EVERY, "num_sanity_val_steps": 1}
    arguments: dict[str, Any] = default | dict(written)
    arguments["accelerator"] = _accelerator(arguments.get("accelerator") or "auto")
    if (counts := distributed.launched()) is not None:
        arguments |= dict(zip(("num_nodes", "devices"), counts, strict=True))
    interval = validation_interval(arguments)
    plugins = build(arguments.get("plugins") or [], trust, key="lightning.trainer.plugins")
    return arguments | {
        "val_check_interval": interval,
        "plugins": [AtomicCheckpointIO(), *(plugins if isinstance(plugins, list) else [plugins])],
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "use_distributed_sampler": False,
    }


@cache  # so that the warning appears once
def _accelerator(wanted: Any) -> Any:
    """`auto` picks a kind of GPU that ldm has been tested on, else the CPU; Apple's must be requested by name."""
    if wanted != "auto" or not MPSAccelerator.is_available():
        return wanted
    log.warning(
        "lightning.trainer.accelerator: auto takes the CPU of this Mac; ldm has not been tested on Apple's GPU, which "
        "lightning.trainer.accelerator=mps lightning.trainer.precision=32-true selects anyway"
    )
    return "cpu"


def _trainer(strategy: Any, arguments: dict[str, Any]) -> pl.Trainer:
    try:
        with lightning_internals.muted():
            trainer = pl.Trainer(**arguments, strategy=DDP() if strategy == "ddp" else strategy)
            if strategy == "auto" and isinstance(trainer.strategy, DDPStrategy):
                # Lightning knows how many devices there are, but would wait half an hour for one that is lost.
                trainer = pl.Trainer(**arguments, strategy=DDP())
            return trainer
    except (MisconfigurationException, ImportError, TypeError, ValueError) as error:
        text = reason(error) if isinstance(error, ImportError) else str(error)
        raise ConfigError(f"lightning.trainer: {text}") from error


def _check_model(model: Any, arguments: Mapping[str, Any], strategy: Any) -> None:
    """Refuse settings that the model cannot be trained with."""
    _check_precision(model, arguments.get("precision"))
    if arguments.get("gradient_clip_val") and isinstance(model, AutoencoderKL | LatentDiffusion):
        raise ConfigError(
            "lightning.trainer.gradient_clip_val: this model clips by itself, also with fused optimizers and sharded "
            "gradients; write model.params.gradient_clip."
        )
    if not isinstance(strategy, FSDP2):
        return
    if isinstance(model, AutoencoderKL):
        raise ConfigError(
            "lightning.strategy: FSDP2 is for stage 2. An autoencoder is small, and its two optimizers share one "
            "backward pass: train it with {target: ldm.training.strategies.DDP}, or leave lightning.strategy out."
        )
    precision = arguments.get("precision")
    if precision not in (None, 32, "32", "32-true", "bf16-mixed"):
        raise ConfigError(
            f"lightning.trainer.precision: FSDP2 computes in 32-true or bf16-mixed (parameters are stored in "
            f"float32 and converted for computing), found {precision}."
        )


def _check_precision(model: Any, precision: Any) -> None:
    for kind, supported in _PRECISIONS.items():
        if isinstance(model, kind) and precision is not None and str(precision) not in supported:
            raise ConfigError(
                f"lightning.trainer.precision: {kind.__name__} trains in {', '.join(supported)}, found {precision}. "
                "The weights stay in float32 in any of them; bf16-mixed computes in bfloat16."
            )


class _Steps(pl.Callback):
    """Makes Lightning log, validate and resume by optimizer steps, with manual optimization as well."""

    def __init__(self) -> None:
        self.accumulation = 1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Each rank resolves `auto` by its own processor.
        chosen = distributed.gather(trainer.precision)
        if len(set(chosen)) > 1:
            ranks = ", ".join(f"{precision} on rank {rank}" for rank, precision in enumerate(chosen))
            raise ConfigError(
                f"lightning.trainer.precision: auto is {ranks}, whose processors differ; write one for all of them."
            )

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if "loops" in checkpoint:  # a converted model has not begun to count
            lightning_internals.place_batch_count(checkpoint, checkpoint["global_step"] * self.accumulation)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        lightning_internals.set_accumulation(trainer, self.accumulation)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if is_logged(trainer):
            lightning_internals.number_row(pl_module, trainer.global_step + 1)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            lightning_internals.number_row(pl_module, trainer.global_step)
