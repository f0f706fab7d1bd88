"""What keeps a run's work: atomic checkpoints that say where they come from, clean stops, weights that stay finite."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import CheckpointIO, MixedPrecision
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

import ldm
from ldm.checkpoint import SUFFIX, load, save
from ldm.distributed import max_over_ranks
from ldm.errors import NumericError
from ldm.signals import Listener, Stopped

FORMAT = 1
"""Of the "ldm" key of a checkpoint."""


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's reading and writing of checkpoints, done by ldm.checkpoint; the first save is read back at once."""

    def __init__(self) -> None:
        self._proven = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        save(Path(path), checkpoint)
        if not self._proven:
            load(Path(path))  # what cannot be loaded should be known in the first minute, not at resume
            self._proven = True

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return load(Path(path), "cpu" if map_location is None else map_location)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class Describes(Protocol):
    """A module that says what its checkpoints are: `kind`, `latents`, `metrics`, in plain containers."""

    def checkpoint_facts(self) -> dict[str, Any]: ...


class Provenance(pl.Callback):
    """Writes the key "ldm" of every checkpoint: what it is, and what made it.

    Args:
        config: the run's resolved configuration, in plain containers.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = dict(config)
        self._versions = versions()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        clock = trainer.datamodule.state_dict() if trainer.datamodule is not None else {}  # type: ignore[attr-defined]
        checkpoint["ldm"] = {
            "format": FORMAT,
            "config": self._config,
            "step": trainer.global_step,
            "images_seen": clock.get("images_seen", 0),
            "versions": self._versions,
            **cast(Describes, pl_module).checkpoint_facts(),
        }


def versions() -> dict[str, str]:
    """What this process runs on: python, torch, lightning, ldm, and ldm's git commit where there is one."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("pytorch-lightning", "ldm"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    root = Path(str(ldm.__file__)).parents[1]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with suppress(OSError, subprocess.SubprocessError):
            found["commit"] = subprocess.check_output(command, text=True, timeout=10, stderr=subprocess.DEVNULL).strip()
    return found


class StopOnSignal(pl.Callback):
    """Turns a signal into one checkpoint and a clean end, `Stopped`, on all ranks after the same step.

    The ranks compare notes after each optimizer step, never within an accumulation, and after each validation batch.

    Args:
        folder: where `stopped.ckpt` goes.
    """

    def __init__(self, folder: Path | str) -> None:
        self._path = Path(folder) / f"stopped{SUFFIX}"
        self._listener = Listener()
        self._step = 0
        self._shared_batches = 0  # validation batches that every rank has: only there may they wait for each other
        self._seen_batches = 0
        self._validation_cut = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Here, because Lightning's own handlers are in place by now: that of SIGTERM broadcasts where it should not.
        self._listener.install()
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self._step:
            return  # within an accumulation
        self._step = trainer.global_step
        self._stop_if_asked(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            own = int(min(sum(trainer.num_val_batches), 2**31))
            self._shared_batches = -max_over_ranks(-own, pl_module.device)
            self._seen_batches = 0

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._seen_batches += 1
        if self._seen_batches <= self._shared_batches:
            self._validation_cut = True
            self._stop_if_asked(trainer, pl_module)
            self._validation_cut = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._validation_cut:
            _restart_validation(checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"])

    def _stop_if_asked(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        number = max_over_ranks(self._listener.received, pl_module.device)
        if not number:
            return
        trainer.save_checkpoint(self._path)
        stopped = Stopped(number)
        rank_zero_info(f"stopped by {stopped.signal.name} after step {trainer.global_step}: saved {self._path}")
        raise stopped


def _restart_validation(progress: dict[str, Any]) -> None:
    """Make the state of a validation that was cut short that of one whose first batch is not yet done.

    Lightning then begins it anew at resume, in full; it cannot go on in the middle.
    """
    before = progress["total"]["ready"] - progress["current"]["ready"]
    progress["total"].update(ready=before + 1, started=before + 1, processed=before, completed=before)
    progress["current"].update(ready=1, started=1, processed=0, completed=0)
    progress["is_last_batch"] = False


@dataclass
class _Step:
    """What is known of one optimizer step; tensors stay on the device until somebody asks."""

    number: int = 0
    bad: list[Tensor] = field(default_factory=list)  # one boolean scalar an optimizer
    losses: list[Tensor] = field(default_factory=list)  # one scalar a micro-batch
    samples: list[np.ndarray] = field(default_factory=list)  # sample numbers of each micro-batch


class FiniteGuard(pl.Callback):
    """Ends a run whose gradient is not finite, before that reaches a weight, with a checkpoint that is good.

    An update that is not finite is left out: by a fused optimizer on the device itself (`found_inf`), which costs no
    waiting; for others by waiting for the device and taking the gradients away. Whether it happened is looked at now
    and then (on the CPU after every step) and before every save. In fp16 the gradient scaler leaves such steps out by
    design, and this does nothing.

    Args:
        folder: where `finite.ckpt` goes: weights no bad step has touched; a run resumed from it skips that batch.
        every_n_steps: how often to look, where looking makes the host wait for the device.

    Raises:
        NumericError: in the training loop, naming step, samples, loss and checkpoint.
    """

    def __init__(self, folder: Path | str, every_n_steps: int = 50) -> None:
        self._path = Path(folder) / f"finite{SUFFIX}"
        self._every_n_steps = every_n_steps
        self._steps: list[_Step] = []
        self._current = _Step()
        self._done = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._done = trainer.global_step

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        precision = trainer.precision_plugin
        if isinstance(precision, MixedPrecision) and precision.scaler is not None:
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients:
            return
        bad = ~torch.isfinite(get_total_norm(gradients))
        if all(group.get("fused") for group in optimizer.param_groups):
            vars(optimizer)["found_inf"] = bad.float()  # the kernel reads it, and then changes nothing
        elif bool(bad):
            for parameter in parameters:
                parameter.grad = None
        self._current.bad.append(bad)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            # Lightning has divided it by the number of micro-batches, where the optimisation is its own.
            divided_by = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._current.losses.append(loss.detach() * divided_by)
        if isinstance(batch, Mapping) and "draws" in batch:
            self._current.samples.append(batch["draws"].numbers)
        if trainer.global_step == self._done:
            return  # within an accumulation
        self._current.number = self._done = trainer.global_step
        self._steps.append(self._current)
        self._current = _Step()
        if pl_module.device.type == "cpu" or trainer.global_step % self._every_n_steps == 0:
            self._stop_if_bad(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._stop_if_bad(trainer, pl_module)

    def _stop_if_bad(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        steps, self._steps = self._steps, []
        flags = [torch.stack(step.bad).any() for step in steps if step.bad]
        found = int(torch.stack(flags).any()) if flags else 0
        if not max_over_ranks(found, pl_module.device):
            return
        guilty = next((step for step in steps if step.bad and bool(torch.stack(step.bad).any())), _Step())
        try:
            trainer.save_checkpoint(self._path)
            kept = f"weights it has not touched are in {self._path}, and a run resumed from there skips this batch"
        except NumericError as error:
            kept = f"nothing was saved ({error})"
        raise NumericError(
            f"step {guilty.number}: the gradient is not finite ({_describe(guilty)}); {kept}.\n"
            f"If it comes back: lower the learning rate, lengthen its warm-up, clip gradients, or train in fp32."
        )


def _describe(step: _Step) -> str:
    losses = ", ".join(f"{float(loss):.6g}" for loss in step.losses) or "unknown"
    samples = ", ".join(f"{numbers.min()} to {numbers.max()}" for numbers in step.samples) or "unknown"
    return f"loss {losses}; sample numbers {samples}"
