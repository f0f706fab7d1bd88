"""GroupNorms that see tiles of a picture, and normalize by the mean and variance of all of it.

A tile of sky alone, normalized by itself, comes out in another brightness than beside a house: the chief cause of seams
between tiles. So the tiles go through the network once more, before, to measure. That is exact for the first norm and
near for the others, whose input depended on those before.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Hook = Callable[[nn.GroupNorm, tuple[Tensor], Tensor], Tensor | None]


class WholeNorms:
    """The GroupNorms of a network that tiles of one picture, a row each, go through.

    Attributes:
        weights: (h,w), of the tile that is on its way, in any resolution: how much each place of it counts.
    """

    weights: Tensor

    def __init__(self, network: nn.Module) -> None:
        self.norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
        self._sums: dict[nn.GroupNorm, Tensor] = {}  # (3, groups): of weights, and of values and squares times them
        self._measured: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}  # scale and shift, each (C,)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Within the block all tiles of the picture go through, each normalized as it was before."""
        self._sums = {}
        with self._hooked(self._measure):
            yield
        self._measured = {norm: _affine(norm, sums) for norm, sums in self._sums.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block tiles are normalized by what was measured, if anything was."""
        with self._hooked(self._apply):
            yield

    @contextmanager
    def _hooked(self, hook: Hook) -> Iterator[None]:
        handles = [norm.register_forward_hook(hook) for norm in self.norms]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _measure(self, norm: nn.GroupNorm, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        x = inputs[0].float().flatten(2)  # (1, C, H W)
        groups = x.reshape(norm.num_groups, -1, x.shape[2])  # (groups, C / groups, H W)
        weights = _resized(self.weights, x.shape[2])  # (H W,), of the same sum whatever the resolution
        with torch.autocast(x.device.type, enabled=False):
            sums = torch.stack(
                [weights.sum().expand(len(groups)), groups.mean(1) @ weights, groups.square().mean(1) @ weights]
            )
        self._sums[norm] = self._sums.get(norm, 0) + sums
        return self._apply(norm, inputs, output)

    def _apply(self, norm: nn.GroupNorm, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        if norm not in self._measured:
            return None
        shape = [1, -1, *[1] * (output.ndim - 2)]
        scale, shift = (value.to(output.dtype).reshape(shape) for value in self._measured[norm])
        return torch.addcmul(shift, inputs[0].to(output.dtype), scale, out=output)  # no memory of its own


def _resized(weights: Tensor, places: int) -> Tensor:
    """Weights (h,w) at a resolution of so many places (some layers see them in a row): (places,), of the same sum."""
    times = math.sqrt(places / weights.numel())
    sides = [round(side * times) for side in weights.shape]
    larger = F.interpolate(weights[None, None], sides, mode="bilinear").flatten()
    return larger * (weights.sum() / larger.sum())


def _affine(norm: nn.GroupNorm, sums: Tensor) -> tuple[Tensor, Tensor]:
    """What the norm with this mean and variance does, as scale and shift: each (C,)."""
    total, values, squares = sums  # each (groups,)
    mean = values / total
    variance = (squares / total - mean**2).clamp(min=0)
    each = norm.num_channels // norm.num_groups
    mean, scale = (value.repeat_interleave(each) for value in (mean, (variance + norm.eps).rsqrt()))
    return (scale * norm.weight, norm.bias - mean * scale * norm.weight) if norm.affine else (scale, -mean * scale)
