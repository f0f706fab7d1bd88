"""Snapshots of running averages: saved in training, combined to any width afterwards (scripts/reconstruct_ema.py)."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from ldm.checkpoints import sharded_state, store, writer
from ldm.diffusion.module import LatentDiffusion
from ldm.errors import CheckpointError, ConfigError, ResourceError
from ldm.optim.ema import PowerFunction, mixture, power_exponent
from ldm.ranges import Count
from ldm.runtime.float64 import double
from ldm.training.callbacks.step_callback import StepCallback

log = logging.getLogger(__name__)

FOLDER = "averages"
"""In the run folder."""


class EMASnapshots(StepCallback):
    """Writes all averages of a diffusion model to `averages/step=<step>.ckpt` at intervals, in half precision.

    They must be power functions, preferably two (stds 0.05 and 0.1), since other widths need more than one.

    Args:
        every: optimizer steps between two snapshots; 50 in a run are enough for an accurate reconstruction (EDM2,
            appendix C.3).
    """

    def __init__(self, every: Count) -> None:
        super().__init__()
        if every < 1:
            raise ConfigError(f"averages: every must be 1 or more, found {every}")
        self._every = every
        self._folder = Path()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._folder = Path(trainer.strategy.broadcast(str(trainer.default_root_dir))) / FOLDER
        _exponents(pl_module)  # fails now, not after the first thousand steps

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        step = trainer.global_step
        if step % self._every:
            return
        assert isinstance(pl_module, LatentDiffusion)
        ema = pl_module.ema
        averages = sharded_state.gathered([dict(average.state_dict()) for average in (ema.average, *ema.extra)])
        learned = {name for name, _ in ema.average.named_parameters()}
        if trainer.is_global_zero:
            state = {
                "averages": [_halved(average, learned) for average in averages],
                "exponents": _exponents(pl_module),
                "images_seen": ema.images_seen,
                "ldm": {"kind": "averages", "step": step},
            }
            file = writer.file_of(self._folder, step)
            try:
                store.save(file, state)
            except (OSError, ResourceError) as error:  # a width can be reconstructed of fewer snapshots
                log.warning("%s: cannot be written (%s); training goes on without it", file, error)


def _exponents(module: pl.LightningModule) -> list[float]:
    if not isinstance(module, LatentDiffusion):
        raise ConfigError(f"averages: expected a LatentDiffusion, found a {type(module).__name__}")
    exponents = []
    for profile in module.ema.profiles:
        if not isinstance(profile, PowerFunction):
            raise ConfigError(
                f"model.params.ema.params: snapshots of averages need ldm.optim.ema.PowerFunction as every profile, "
                f"found {type(profile).__name__}"
            )
        exponents.append(profile.exponent)
    return exponents


def _halved(average: dict[str, Tensor], learned: set[str]) -> dict[str, Tensor]:
    """Weights in half precision; what is not learned, such as random features, unchanged."""
    return {name: value.half() if name in learned else value for name, value in average.items()}


def snapshots(run: Path) -> list[Path]:
    """The snapshots of a run folder, by step.

    Raises:
        CheckpointError: there are none.
    """
    found = sorted((run / FOLDER).glob(f"step=*{store.SUFFIX}"))
    if not found:
        raise CheckpointError(
            f"{run / FOLDER}: no snapshots of averages. Train with lightning.callbacks.averages={{target: "
            f"ldm.training.callbacks.ema_snapshots.EMASnapshots, params: {{every: ...}}}}"
        )
    return found


def reconstruct(files: Sequence[Path], std: float) -> dict[str, Tensor]:
    """The average of relative width `std` at the time of the last of the snapshots, in float32.

    Raises:
        ConfigError: no power function has that width.
    """
    wanted = power_exponent(std)
    times: list[float] = []
    exponents: list[float] = []
    for file in files:  # read twice, since all of them together may not fit into memory
        state = store.load(file)
        times += [state["images_seen"]] * len(state["exponents"])
        exponents += state["exponents"]
    shares = iter(mixture(times, exponents, times[-1], wanted).tolist())
    total: dict[str, Tensor] = {}
    for file in files:
        for average in store.load(file)["averages"]:
            _add(total, average, next(shares))
    return {name: value.float() if value.is_floating_point() else value for name, value in total.items()}


def _add(total: dict[str, Tensor], average: dict[str, Tensor], share: float) -> None:
    for name, value in average.items():
        if not value.is_floating_point():
            total[name] = value  # a counter: the latest
        elif name in total:
            total[name].add_(double(value), alpha=share)
        else:
            total[name] = double(value) * share
