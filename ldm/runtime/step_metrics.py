"""The metrics of a step: means over its micro-batches and all ranks, the same as for a single process."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.runtime import distributed


def is_logged(trainer: Any) -> bool:
    """Whether Lightning's trainer logs the current optimizer step."""
    return (trainer.global_step + 1) % trainer.log_every_n_steps == 0


def was_logged(trainer: Any) -> bool:
    """Whether it has logged the optimizer step that has just ended."""
    return bool(trainer.global_step % trainer.log_every_n_steps == 0)


class StepMean:
    """Averages the scalars of micro-batches over a step, without waiting for a device.

    Exact if micro-batches have equal size and the values are means over their rows, as losses are.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._rows: list[Tensor] = []

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Scalars of one micro-batch, by name."""
        self._names = [*values]
        self._rows.append(torch.stack([value.detach().float() for value in values.values()]))

    def take(self) -> dict[str, Tensor]:
        """The means since the last call, float32 scalars by name; every rank has to call it."""
        means = distributed.mean_over_ranks(torch.stack(self._rows).mean(0))
        self._rows = []
        return dict(zip(self._names, means.unbind(), strict=True))
