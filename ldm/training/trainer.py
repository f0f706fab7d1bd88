"""From the configuration's `lightning` section to a Trainer.

    lightning:
      trainer: {max_steps: 10000, precision: auto, val_check_interval: 500, ...}   # Lightning's own arguments
      logger: {name: {target: ...}}    # beside wandb and metrics.csv; `wandb: null`: without wandb. A node or a list
                                       # of nodes: these alone. metrics.csv is always written; null: nothing else
      callbacks: {name: {target: ...}} # added to the defaults, or in place of the one of that name; null: without it
      strategy: {target: ldm.training.strategies.FSDP2}   # without a word, several ranks have DDP of that module

`val_check_interval` counts optimizer steps; accumulation follows from the data's batch sizes. Where torchrun or srun
has started the processes, their number is not asked of `devices` and `num_nodes`. What keeps a run's work
(checkpoints, clean stops, finite weights, the metrics file) needs no line of YAML.
"""

import inspect
import logging
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha256
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
from ldm.config.signatures import live_signature
from ldm.config.targets import is_node, reason, resolve
from ldm.diffusion.conditioners.base import Unconditional
from ldm.diffusion.module import LatentDiffusion, parts
from ldm.errors import ConfigError
from ldm.run_folder import RunFolder
from ldm.runtime import distributed, threads
from ldm.runtime.step_metrics import is_logged
from ldm.training import lightning_internals
from ldm.training.callbacks.checkpoints import AtomicCheckpointIO, Checkpoints
from ldm.training.callbacks.monitors import Monitors, monitored
from ldm.training.callbacks.previews import ImageLogger, SampleLogger
from ldm.training.callbacks.progress import Progress, Throughput
from ldm.training.callbacks.provenance import Provenance
from ldm.training.callbacks.skip_nonfinite import SkipNonFinite
from ldm.training.callbacks.stop import StopOnSignal
from ldm.training.loggers import FencedWandb, MetricsFile, ended_if_failed
from ldm.training.rehearsal import Rehearsal
from ldm.training.strategies import DDP, FSDP2

log = logging.getLogger(__name__)

LOG_EVERY = 50
"""Optimizer steps between two rows of metrics, where the configuration does not say."""

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
        model: module, which says whether it accumulates by itself; its weights are not touched.
        folder: the run folder.

    Raises:
        ConfigError: Lightning refuses an argument.
    """
    lightning_internals.ignore_expected_warnings()
    section = tree["lightning"]
    arguments: dict[str, Any] = {"enable_model_summary": False, "log_every_n_steps": LOG_EVERY} | section["trainer"]
    arguments["accelerator"] = _accelerator(arguments.get("accelerator") or "auto")
    if (counts := distributed.launched()) is not None:
        arguments |= dict(zip(("num_nodes", "devices"), counts, strict=True))
    interval = _interval(arguments)
    plugins = build(arguments.pop("plugins", None) or [], trust, key="lightning.trainer.plugins")
    strategy = build(section.get("strategy") or "auto", trust, key="lightning.strategy")
    _check_model(model, arguments, strategy)
    steps = _Steps()
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    arguments |= {
        "val_check_interval": interval,
        "logger": list(loggers),
        "callbacks": [steps, *callbacks, *([Rehearsal()] if saves else [])],
        "plugins": [AtomicCheckpointIO(), *(plugins if isinstance(plugins, list) else [plugins])],
        "enable_checkpointing": saves,
        "default_root_dir": folder,
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "use_distributed_sampler": False,
        # One validation batch before the first step: what fails there should not fail hours later.
        "num_sanity_val_steps": arguments.get("num_sanity_val_steps", 1),
    }
    try:
        with lightning_internals.muted():
            trainer = _trainer(strategy, arguments)
    except (MisconfigurationException, ImportError, TypeError, ValueError) as error:
        text = reason(error) if isinstance(error, ImportError) else str(error)
        raise ConfigError(f"lightning.trainer: {text}") from error
    threads.share(trainer.num_devices)
    steps.accumulation = data.accumulation(trainer.world_size)
    lightning_internals.set_validation_interval(trainer, interval * steps.accumulation)
    return trainer


@cache  # and so said once
def _accelerator(wanted: Any) -> Any:
    """`auto` is a GPU that ldm has been tried on, else the CPU: Apple's has to be asked for by name."""
    if wanted != "auto" or not MPSAccelerator.is_available():
        return wanted
    log.warning(
        "lightning.trainer.accelerator: auto takes the CPU of this Mac; ldm has not been tried on Apple's GPU, which "
        "lightning.trainer.accelerator=mps lightning.trainer.precision=32-true uses all the same"
    )
    return "cpu"


def _trainer(strategy: Any, arguments: dict[str, Any]) -> pl.Trainer:
    trainer = pl.Trainer(**arguments, strategy=DDP() if strategy == "ddp" else strategy)
    if strategy == "auto" and isinstance(trainer.strategy, DDPStrategy):
        # Lightning knows how many devices there are, but would wait half an hour for one that is lost.
        trainer = pl.Trainer(**arguments, strategy=DDP())
    return trainer


def _check_model(model: Any, arguments: Mapping[str, Any], strategy: Any) -> None:
    """Refuse what the model cannot be trained under."""
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
            f"lightning.trainer.precision: FSDP2 computes in 32-true or bf16-mixed (bf16 parameters in compute, "
            f"float32 where they are kept), found {precision}."
        )


def _check_precision(model: Any, precision: Any) -> None:
    for kind, supported in _PRECISIONS.items():
        if isinstance(model, kind) and precision is not None and str(precision) not in supported:
            raise ConfigError(
                f"lightning.trainer.precision: {kind.__name__} trains in {', '.join(supported)}, found {precision}. "
                "The weights stay in float32 in any of them; bf16-mixed computes in bfloat16."
            )


class _Steps(pl.Callback):
    """Makes Lightning count optimizer steps, where it logs and where it goes on, also in manual optimisation."""

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
        lightning_internals.place_batch_count(checkpoint, checkpoint["global_step"] * self.accumulation)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        lightning_internals.set_accumulation(trainer, self.accumulation)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if is_logged(trainer):
            lightning_internals.number_row(pl_module, trainer.global_step + 1)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            lightning_internals.number_row(pl_module, trainer.global_step)


def make_loggers(tree: Mapping[str, Any], folder: RunFolder, project: str, trust: Sequence[str] = ()) -> list[Logger]:
    """metrics.csv, and wandb (unless WANDB_MODE is disabled), changed by name by the configuration or replaced by its.

    A logger that takes a `save_dir` and is given none keeps its files in the run folder.
    """
    name, mode = folder.path.name, os.environ.get("WANDB_MODE")
    own: dict[str, Any] = {"save_dir": str(folder.path), "project": project, "name": name, "id": _wandb_id(name)}
    own["offline"] = mode == "offline"
    default = {} if mode == "disabled" else {"wandb": {"target": f"{FencedWandb.__module__}.{FencedWandb.__name__}"}}
    further = [_logger(node, own, trust, key) for key, node in _logger_nodes(tree["lightning"], default).items()]
    with ended_if_failed(further):
        for logger in further:
            logger.log_hyperparams(dict(tree))
    return [MetricsFile(folder.metrics_file), *further]


def _logger_nodes(section: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """{dotted key: node}: a node or a list of nodes stands in the defaults' place, named ones are merged over them."""
    chosen = section.get("logger", {})
    if is_node(chosen):
        return {"lightning.logger": chosen}
    if isinstance(chosen, list):
        return {f"lightning.logger.{place}": node for place, node in enumerate(chosen)}
    named = {} if chosen is None else {**default, **chosen}
    return {f"lightning.logger.{name}": node for name, node in named.items() if node is not None}


def _logger(node: Mapping[str, Any], own: Mapping[str, Any], trust: Sequence[str], key: str) -> Any:
    """What a node leaves out is filled in from the run's own: all of it for our wandb, the folder for any logger."""
    make = resolve(node["target"], trust)
    names = own if inspect.isclass(make) and issubclass(make, FencedWandb) else ["save_dir"]
    filled = {name: own[name] for name in names if name in live_signature(make).parameters}
    return build({**node, "params": {**filled, **(node.get("params") or {})}}, trust, key=key)


def _wandb_id(name: str) -> str:
    text = re.sub(r"[^\w-]", "-", name)
    # It becomes part of a file's name; wandb takes no more than 128 characters.
    return text if len(os.fsencode(text)) <= 128 else f"{text[:48]}-{sha256(name.encode()).hexdigest()[:16]}"


def make_callbacks(
    tree: Mapping[str, Any], folder: RunFolder, model: Any, facts: Mapping[str, Any], trust: Sequence[str] = ()
) -> list[pl.Callback]:
    """The defaults, changed by name by the configuration.

    Args:
        model: module, which decides what pictures there are.
        facts: what the data said of itself.
    """
    section = tree["lightning"]
    trainer = section["trainer"]
    callbacks: dict[str, pl.Callback | None] = {
        "provenance": Provenance(tree, facts),
        "finite": SkipNonFinite(folder.checkpoints),
        "stop": StopOnSignal(folder.checkpoints),
        "images": _pictures(model, _interval(trainer), facts, trust),
        "throughput": Throughput(trainer.get("log_every_n_steps", LOG_EVERY)),
        "progress": Progress() if trainer.get("enable_progress_bar", True) else None,
        "checkpoints": Checkpoints(),
    }
    for name, node in (section.get("callbacks") or {}).items():
        callbacks[name] = build(node, trust, key=f"lightning.callbacks.{name}")
    monitors = monitored(section.get("callbacks") or {})
    first = [Monitors(monitors, tree["model"])] if monitors else []
    return [*first, *(callback for callback in callbacks.values() if callback is not None)]


def _pictures(model: Any, interval: int, facts: Mapping[str, Any], trust: Sequence[str]) -> pl.Callback | None:
    """Reconstructions of the autoencoder, or samples of the diffusion model, as often as it is validated."""
    if isinstance(model, AutoencoderKL):
        return ImageLogger(interval)
    if not isinstance(model, LatentDiffusion):
        return None
    # The data may have classes that the model does not ask for.
    count = None if isinstance(parts(model.denoiser)[1], Unconditional) else facts.get("num_classes")
    # Up to 32 pictures of 50 network calls.
    return SampleLogger(interval, None if count is None else range(min(count, 4)), trust=trust)


def _interval(arguments: Mapping[str, Any]) -> int:
    """Optimizer steps between two validations; ten in a run if nothing is said."""
    max_steps: int = arguments["max_steps"]
    interval = arguments.get("val_check_interval") or max(1, max_steps // 10)
    if type(interval) is not int or interval < 1:
        raise ConfigError(
            f"lightning.trainer.val_check_interval: expected a number of optimizer steps, found {interval!r}."
        )
    return min(interval, max_steps)
