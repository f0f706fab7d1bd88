"""Metrics that callbacks wait for: a name that nothing logs is refused before the first step, not hours later."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import pytorch_lightning as pl

from ldm.config.tree import current_plain
from ldm.errors import ConfigError
from ldm.runtime import distributed
from ldm.runtime.step_metrics import was_logged
from ldm.training.callbacks.step_callback import StepCallback

_TRAINING = "train/"  # the prefix of the names that training logs, which validation cannot know


@runtime_checkable
class LogsMetrics(Protocol):
    """A callback that logs validation metrics of its own, not necessarily in every validation."""

    @property
    def logged_metrics(self) -> Sequence[str]:
        """Their names."""


class Monitors(StepCallback):
    """Checks that the metric of each `monitor` is logged, as early as possible.

    In a new run: at the validation batch before the first step. In a resumed run: by the metrics in its checkpoint,
    unless the model has changed since, and at its first validation. A training metric (`train/...`): at the first
    logged step. Must come before the callbacks that it checks.

    Args:
        monitors: name of a callback under `lightning.callbacks` -> its `monitor`.
        model: the configuration's `model`, every reference filled in.

    Raises:
        ConfigError: there is no such metric, or no validation.
    """

    def __init__(self, monitors: Mapping[str, str], model: Any) -> None:
        super().__init__()
        self._validated = {name: monitor for name, monitor in monitors.items() if not monitor.startswith(_TRAINING)}
        self._trained = {name: monitor for name, monitor in monitors.items() if monitor.startswith(_TRAINING)}
        self._model = model

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        record = checkpoint.get("ldm") or {}
        # Validation of another model may log something else.
        if trainer.state.fn == "fit" and record.get("metrics") and _same(record.get("config") or {}, self._model):
            known = [*record["metrics"], *logged_by_callbacks(trainer)]
            _check(self._validated, known, "the validation before this checkpoint")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not self._validated:
            return
        own = int(min(sum(trainer.num_val_batches), 2**31)) if trainer.enable_validation else 0
        if not distributed.max_over_ranks(own):
            name, monitor = next(iter(self._validated.items()))
            raise ConfigError(
                f"lightning.callbacks.{name}.params.monitor: {monitor!r} is a metric of validation, of which this run "
                "has none. Hold pictures out (data.params.num_validation), or leave the monitor out."
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            _check(self._validated, [*trainer.callback_metrics, *logged_by_callbacks(trainer)], "validation")

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        if self._trained and was_logged(trainer):
            known = [name for name in trainer.callback_metrics if name.startswith(_TRAINING)]
            _check(self._trained, known, "training")
            self._trained = {}  # once is enough


def monitored(callbacks: Mapping[str, Any]) -> dict[str, str]:
    """Of the configuration's `lightning.callbacks`, those that wait for a metric: name -> `monitor`."""
    params = {name: node.get("params") or {} for name, node in callbacks.items() if node is not None}
    # EarlyStopping: `strict: false` means a metric that may be absent.
    return {
        name: of["monitor"]
        for name, of in params.items()
        if isinstance(of.get("monitor"), str) and of.get("strict") is not False
    }


def logged_by_callbacks(trainer: pl.Trainer) -> list[str]:
    """The metrics that the run's callbacks log."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's own
    return [name for callback in callbacks if isinstance(callback, LogsMetrics) for name in callback.logged_metrics]


def _check(monitors: Mapping[str, str], known: Iterable[str], where: str) -> None:
    names = sorted({*known} - {"step"})  # the number of a row
    for name, monitor in monitors.items():
        if monitor not in names:
            raise ConfigError(
                f"lightning.callbacks.{name}.params.monitor: there is no metric {monitor!r}; {where} logged "
                f"{', '.join(names) or 'nothing'}"
            )


def _same(config: Mapping[str, Any], model: Any) -> bool:
    """Whether a checkpoint's configuration describes `model`, under whatever names."""
    return bool(current_plain(config.get("model")) == current_plain(model))
