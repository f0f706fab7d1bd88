"""The metrics of validation: objects that see each batch and are reduced over the ranks, named by a configuration.

    model:
      params:
        metrics:
          edges: {target: house.metrics.Edges}   # beside the stage's standard ones, or in place of the one of that name
          ssim: null                              # without it

A metric is a `torchmetrics.Metric` with `update(batch, output)`, where `output` is what the stage says of the batch
(`Output` in its metrics.py), and `compute()`: a scalar, logged as `val/<its key>`, or a mapping of scalars, each logged
as `val/<its name>`.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ldm.errors import ConfigError
from ldm.runtime.float64 import double, home


class Mean(Metric):
    """The mean of a value over all items, summed in float64: however they are cut into batches and shared by ranks."""

    totals: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        # The totals take their shape from the first values.
        self.add_state("totals", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @abstractmethod
    def values(self, batch: Mapping[str, Any], output: Any) -> Tensor:
        """Of each item of the batch: (N,), or (k, N) for k means."""

    def update(self, batch: Mapping[str, Any], output: Any) -> None:
        values = double(self.values(batch, output))
        self.totals = self.totals + values.sum(-1)
        self.count = self.count + values.shape[-1]

    def compute(self) -> Any:
        """() or (k,), float64."""
        return self.totals / self.count


class ValidationMetrics:
    """The metrics of a stage.

    No submodules of the model: what they hold is neither trained, saved, averaged nor sharded. They lie on the model's
    device; on one without float64, on the CPU.

    Args:
        standard: the stage's own, by name.
        named: added to these, or in place of the one of that name; None: without it.
    """

    def __init__(self, standard: Mapping[str, Metric], named: Mapping[str, Metric | None] | None = None) -> None:
        chosen = {**standard, **(named or {})}
        self._metrics = {name: metric.eval() for name, metric in chosen.items() if metric is not None}
        self._device = torch.device("cpu")

    def start(self, device: torch.device) -> None:
        """Begin anew, on the model's device."""
        self._device = device
        for metric in self._metrics.values():
            metric.to(home(device))
            metric.reset()

    @torch.no_grad()
    def update(self, batch: Mapping[str, Any], output: Any) -> None:
        """Show a batch, and what the stage says of it, to each metric, outside of autocast."""
        with torch.autocast(self._device.type, enabled=False):
            for metric in self._metrics.values():
                metric.update(batch, output)

    def compute(self) -> dict[str, Tensor]:
        """`val/<name>` -> float32 scalar, of all batches of all ranks since the start; every rank has to call it.

        Raises:
            ConfigError: two metrics log the same name, or one that is no scalar.
        """
        found: dict[str, Tensor] = {}
        origin: dict[str, str] = {}
        for key, metric in self._metrics.items():
            value = metric.compute()
            for name, scalar in (value if isinstance(value, Mapping) else {key: value}).items():
                if name in found:
                    raise ConfigError(
                        f"model.params.metrics: '{origin[name]}' and '{key}' both log val/{name}: give one another "
                        f"name, or leave it out (model.params.metrics.{key}=null)"
                    )
                found[name], origin[name] = _scalar(scalar, f"model.params.metrics.{key}: val/{name}"), key
            metric.reset()
            metric.to("cpu")  # nothing is kept on the device through training
        return {f"val/{name}": scalar for name, scalar in found.items()}


def _scalar(value: Any, what: str) -> Tensor:
    tensor = torch.as_tensor(value)
    if tensor.numel() != 1:
        raise ConfigError(f"{what}: expected a scalar, found shape {tuple(tensor.shape)}")
    return tensor.detach().float().reshape(())
