"""The loggers and callbacks that a run has by default, changed by name by the configuration.

    lightning:
      logger: {name: {target: ...}}    # in addition to wandb; `wandb: null` removes that. A node or a list of nodes
                                       # replaces it, null leaves none. metrics.csv is always written
      callbacks: {name: {target: ...}} # added to the defaults, or replaces the one of that name; null removes it

What keeps a run's work (checkpoints, clean stops, finite weights, the metrics file) needs no line of YAML.
"""

import inspect
import os
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger

from ldm.autoencoder.module import AutoencoderKL
from ldm.config.load import build
from ldm.config.signatures import live_signature
from ldm.config.targets import is_node, resolve
from ldm.diffusion.module import LatentDiffusion, parts
from ldm.errors import ConfigError
from ldm.run_folder import RunFolder
from ldm.sampling.shown import SHOWABLE
from ldm.training.callbacks.checkpoints import Checkpoints
from ldm.training.callbacks.health import Health
from ldm.training.callbacks.model_files import ModelFiles, readers
from ldm.training.callbacks.monitors import Monitors, monitored
from ldm.training.callbacks.previews import ImageLogger, SampleLogger
from ldm.training.callbacks.progress import Progress, Throughput
from ldm.training.callbacks.provenance import Provenance
from ldm.training.callbacks.skip_nonfinite import SkipNonFinite
from ldm.training.callbacks.stop import StopOnSignal
from ldm.training.loggers import FencedWandb, MetricsFile, ended_if_failed

LOG_EVERY = 50
"""Optimizer steps between two rows of metrics, unless the configuration says otherwise."""


def make_loggers(tree: Mapping[str, Any], folder: RunFolder, project: str, trust: Sequence[str] = ()) -> list[Logger]:
    """metrics.csv and the configuration's loggers, wandb among them unless WANDB_MODE is `disabled`.

    A logger that takes a `save_dir` and is given none writes to the run folder.
    """
    name, mode = folder.path.name, os.environ.get("WANDB_MODE")
    own: dict[str, Any] = {"save_dir": str(folder.path), "project": project, "name": name, "id": wandb_id(name)}
    own["offline"] = mode == "offline"
    default = {} if mode == "disabled" else {"wandb": {"target": f"{FencedWandb.__module__}.{FencedWandb.__name__}"}}
    further = [_logger(node, own, trust, key) for key, node in _logger_nodes(tree["lightning"], default).items()]
    with ended_if_failed(further):
        for logger in further:
            logger.log_hyperparams(dict(tree))
    return [MetricsFile(folder.metrics_file), *further]


def _logger_nodes(section: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """{dotted key: node}: a node or a list of nodes replaces the defaults, named ones are merged over them."""
    chosen = section.get("logger", {})
    if is_node(chosen):
        return {"lightning.logger": chosen}
    if isinstance(chosen, list):
        return {f"lightning.logger.{place}": node for place, node in enumerate(chosen)}
    named = {} if chosen is None else {**default, **chosen}
    return {f"lightning.logger.{name}": node for name, node in named.items() if node is not None}


def _logger(node: Mapping[str, Any], own: Mapping[str, Any], trust: Sequence[str], key: str) -> Any:
    """The logger of a node, with defaults from the run: every parameter of FencedWandb, the folder of any other."""
    make = resolve(node["target"], trust)
    names = own if inspect.isclass(make) and issubclass(make, FencedWandb) else ["save_dir"]
    filled = {name: own[name] for name in names if name in live_signature(make).parameters}
    return build({**node, "params": {**filled, **(node.get("params") or {})}}, trust, key=key)


def wandb_id(name: str) -> str:
    """The id of a run folder's run in wandb, by which it is found again."""
    text = re.sub(r"[^\w-]", "-", name)
    # It becomes part of a file's name; wandb takes no more than 128 characters.
    return text if len(os.fsencode(text)) <= 128 else f"{text[:48]}-{sha256(name.encode()).hexdigest()[:16]}"


def make_callbacks(
    tree: Mapping[str, Any], folder: RunFolder, model: Any, facts: Mapping[str, Any], trust: Sequence[str] = ()
) -> list[pl.Callback]:
    """The defaults, changed by name by the configuration.

    Args:
        model: module, which decides what images are logged.
        facts: of the data module (`data.facts()`).
    """
    section = tree["lightning"]
    trainer = section["trainer"]
    callbacks: dict[str, pl.Callback | None] = {
        "provenance": Provenance(tree, facts),
        "files": ModelFiles(folder) if readers(model) else None,
        "finite": SkipNonFinite(folder.checkpoints),
        "stop": StopOnSignal(folder.checkpoints),
        "images": _pictures(model, validation_interval(trainer), facts, trust),
        "throughput": Throughput(trainer.get("log_every_n_steps", LOG_EVERY)),
        "progress": Progress() if trainer.get("enable_progress_bar", True) else None,
        "health": Health(),
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
    # The data may have classes that the model does not read.
    keys = parts(model.denoiser)[1].keys
    count = facts.get("num_classes") if "class_label" in keys else None
    # Up to 32 images of 50 network calls each.
    if {*keys} & {*SHOWABLE, "masked_latent"}:
        return SampleLogger(interval, held_out=8, seeds=range(4), trust=trust)
    if "caption" in keys:
        return SampleLogger(interval, held_out=4, trust=trust)
    return SampleLogger(interval, None if count is None else range(min(count, 4)), trust=trust)


def validation_interval(arguments: Mapping[str, Any]) -> int:
    """Optimizer steps between two validations; by default a tenth of the run."""
    max_steps: int = arguments["max_steps"]
    interval = arguments.get("val_check_interval") or max(1, max_steps // 10)
    if type(interval) is not int or interval < 1:
        raise ConfigError(
            f"lightning.trainer.val_check_interval: expected a number of optimizer steps, found {interval!r}."
        )
    return min(interval, max_steps)
