"""Keeps weights finite: non-finite steps are skipped, and too many in a row end the run."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor
from torch.optim import Optimizer

from ldm.checkpoints.store import SUFFIX
from ldm.data.datamodule import ElasticDataModule
from ldm.errors import ConfigError, LdmError, NumericError
from ldm.optim.optimizers import unscales
from ldm.ranges import Count, CountOrZero
from ldm.runtime.distributed import gather
from ldm.runtime.fsdp import total_norm
from ldm.training import lightning_internals
from ldm.training.callbacks.checkpoints import save_at_end
from ldm.training.callbacks.step_callback import StepCallback

_FILES = 32  # named in a message, at most

log = logging.getLogger(__name__)


@dataclass
class _Step:
    """The record of one optimizer step; tensors stay on the device until they are needed."""

    number: int = 0
    bad: list[Tensor] = field(default_factory=list)  # one boolean scalar an optimizer
    losses: list[Tensor] = field(default_factory=list)  # one scalar a micro-batch
    samples: list[np.ndarray] = field(default_factory=list)  # sample numbers of each micro-batch
    in_a_row: Tensor | int = 0  # bad steps up to this one


class SkipNonFinite(StepCallback):
    """Skips every step whose loss or gradient is not finite, and ends the run after too many of them in a row.

    A fused optimizer skips such an update on the device itself (`found_inf`), without waiting; for others this waits
    for the device and removes the gradients. So it reaches neither the weights nor the average nor a file. The ranks
    need not communicate: a non-finite loss makes the gradient non-finite, and the gradient is common to all. The record
    is checked now and then (on the CPU after every step) and before every save: each skipped step is reported with its
    samples and their files. In fp16 the gradient scaler skips such steps by design, and this does nothing.

    Logs `train/skipped_steps`, over the whole run.

    Args:
        folder: where `finite.ckpt` is saved at the end, with weights that no bad step has touched; a run resumed from
            it continues after the bad steps.
        limit: how many in a row are skipped without ending the run; 0: the first one ends it.
        every_n_steps: how often to check, if checking makes the host wait for the device.

    Raises:
        NumericError: in the training loop, on all ranks, naming step, samples, loss, files and checkpoint.
    """

    def __init__(self, folder: Path | str, limit: CountOrZero = 3, every_n_steps: Count = 50) -> None:
        if limit < 0 or every_n_steps < 1:
            raise ConfigError(f"finite: expected limit >= 0 and every_n_steps >= 1, found {limit} and {every_n_steps}")
        super().__init__()
        self._path = Path(folder) / f"finite{SUFFIX}"
        self._limit = limit
        self._every_n_steps = every_n_steps
        self._steps: list[_Step] = []
        self._current = _Step()
        self._in_a_row: Tensor | int = 0
        self._skipped: Tensor | int = 0

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": int(self._in_a_row), "skipped": int(self._skipped)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._in_a_row, self._skipped = state_dict["in_a_row"], state_dict["skipped"]

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if not _scaled(trainer):
            finite = torch.isfinite(loss.detach())
            loss.register_hook(lambda gradient: torch.where(finite, gradient, torch.nan))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if _scaled(trainer):
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients:
            return
        bad = ~torch.isfinite(total_norm(gradients))
        if unscales(optimizer):
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
            self._current.losses.append(loss.detach() * lightning_internals.loss_divisor(trainer, pl_module))
        if isinstance(batch, Mapping) and "draws" in batch:
            self._current.samples.append(batch["draws"].numbers)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        self._count(trainer, pl_module)
        if pl_module.device.type == "cpu" or trainer.global_step % self._every_n_steps == 0:
            self._look(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._look(trainer)

    def _count(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish the record of the current step; counts on the device, so that the host need not wait."""
        step, self._current = self._current, _Step()
        if step.bad:
            bad = torch.stack(step.bad).any()
            self._in_a_row = (self._in_a_row + 1) * bad
            self._skipped = self._skipped + bad
            step.number, step.in_a_row = trainer.global_step, self._in_a_row
            self._steps.append(step)
            pl_module.log("train/skipped_steps", self._skipped.float(), batch_size=1)

    def _look(self, trainer: pl.Trainer) -> None:
        steps, self._steps = self._steps, []
        rows = torch.stack([torch.as_tensor(step.in_a_row) for step in steps]).tolist() if steps else []
        for step, row in zip(steps, rows, strict=True):
            if row > self._limit:
                self._end(trainer, step, row)
            if row:
                described = _describe(trainer, step)
                if trainer.is_global_zero:
                    log.warning("step %d is left out, the %s in a row: %s", step.number, _nth(row), described)

    def _end(self, trainer: pl.Trainer, step: _Step, row: int) -> NoReturn:
        described = _describe(trainer, step)
        try:
            save_at_end(trainer, self._path)
            kept = f"weights it has not touched are in {self._path}, and a run resumed from there continues after it"
        except LdmError as error:
            kept = f"nothing was saved ({error})"
        raise NumericError(
            f"step {step.number}: {described}; the {_nth(row)} step in a row, allowed are {self._limit}; {kept}.\n"
            f"If it happens again: lower the learning rate, lengthen its warm-up, clip gradients, or train in fp32."
        )


def _scaled(trainer: pl.Trainer) -> bool:
    """Whether there is a gradient scaler, which detects and skips non-finite gradients itself."""
    precision = trainer.precision_plugin
    return isinstance(precision, MixedPrecision) and precision.scaler is not None


def _describe(trainer: pl.Trainer, step: _Step) -> str:
    """Loss, sample numbers and files of a bad step, of all ranks; every rank has to call it.

    Only the micro-batches whose own loss is not finite, if there are any.
    """
    own = zip_longest(map(float, step.losses), [numbers.tolist() for numbers in step.samples])
    pieces = [piece for share in gather(list(own)) for piece in share]
    guilty = [piece for piece in pieces if piece[0] is not None and not math.isfinite(piece[0])]
    pieces = guilty or pieces
    losses = ", ".join(f"{loss:.6g}" for loss, _ in pieces if loss is not None) or "unknown"
    samples = ", ".join(f"{min(numbers)} to {max(numbers)}" for _, numbers in pieces if numbers) or "unknown"
    what = f"the {'loss' if guilty else 'gradient'} is not finite (loss {losses}; sample numbers {samples})"
    data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning's own, set by fit
    if not isinstance(data, ElasticDataModule):
        return what
    files = data.sources([number for _, numbers in pieces for number in numbers or ()])
    more = f" and {len(files) - _FILES} more" if len(files) > _FILES else ""
    return f"{what}, made of {', '.join(files[:_FILES])}{more}"


def _nth(number: int) -> str:
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
