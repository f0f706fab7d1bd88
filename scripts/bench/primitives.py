"""Convolutions, matrix products and attention of a step: how long they take in it, and how long alone.

Nothing here imports ldm (child.py).
"""

import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.bench.child import Answer, Built, Flops, Place

_PRODUCT = "matrix products"
_ATTENTION = "attention"
KINDS = {
    "aten::convolution": "convolutions, forward",
    "aten::convolution_backward": "convolutions, backward",
    **{f"aten::{name}": _PRODUCT for name in ("mm", "addmm", "bmm", "baddbmm", "baddbmm_")},
    **{
        f"aten::_scaled_dot_product_{name}{way}": _ATTENTION
        for name in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
        for way in ("", "_backward")
    },
}
"""Operators by name: what they are."""


class _Like(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def made(self, device: str) -> Tensor:
        # Values first: of a tensor that is expanded, several elements are one.
        number = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        values = torch.zeros(max(number, 0), dtype=self.dtype, device=device)
        if self.dtype.is_floating_point:
            values.normal_()
        return values.as_strided(self.shape, self.stride)


class Primitive(NamedTuple):
    """One call: an operator, its arguments, tensors without their values; and how often the step makes it."""

    name: str
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]
    times: int = 1

    def seconds_and_flops(self, place: Place) -> tuple[float, int]:
        """Of all its calls, by the second of two alone."""
        operator = getattr(torch.ops.aten, self.name.removeprefix("aten::")).default
        arguments = _filled(self.arguments, place.device)
        options = {name: _filled(value, place.device) for name, value in self.options}
        with Flops() as counter:
            operator(*arguments, **options)
        place.settle()
        start = time.perf_counter()
        operator(*arguments, **options)
        place.settle()
        return self.times * (time.perf_counter() - start), self.times * counter.total


class _Recorder(TorchDispatchMode):
    """Counts the calls of every primitive with the same arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Primitive] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in KINDS:
            options = tuple((name, _emptied(value)) for name, value in (kwargs or {}).items())
            self.calls[Primitive(func.name(), _emptied(args), options)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded(place: Place, built: Built) -> Iterator[Answer]:
    """`primitives` of the step."""
    answer: Answer = {}
    with torch.compiler.set_stance("force_eager"), _Recorder() as recorder:
        yield answer
    answer["primitives"] = [call._replace(times=times) for call, times in recorder.calls.items()]


@contextmanager
def profiled(primitives: list[Primitive], place: Place, built: Built) -> Iterator[Answer]:
    """`seconds` of the step; by kind of its primitives `inside`, the seconds that they take in it; `alone`; `flops`.

    To be used as a partial that has the primitives.
    """
    answer: Answer = {}
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if place.device.startswith("cuda") else [])]
    place.settle()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports the lack of a GPU as an error, for each profile
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        yield answer
        place.settle()
        answer["seconds"] = time.perf_counter() - start
    answer["inside"] = _inside(profiler, place)
    alone, flops = defaultdict[str, float](float), defaultdict[str, int](int)
    with torch.no_grad():
        for primitive in primitives:
            seconds, operations = primitive.seconds_and_flops(place)
            alone[KINDS[primitive.name]] += seconds
            flops[KINDS[primitive.name]] += operations
    answer |= {"alone": dict(alone), "flops": dict(flops)}


def _inside(profiler: profile, place: Place) -> Mapping[str, float]:
    """Seconds by kind. Some primitives call others, which are not counted again."""
    seconds = defaultdict[str, float](float)
    for event in profiler.events() or ():
        if event.name in KINDS and not _within_another(event):
            microseconds = event.device_time_total if place.device.startswith("cuda") else event.cpu_time_total
            seconds[KINDS[event.name]] += microseconds / 1e6
    return dict(seconds)


def _within_another(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name in KINDS:
            return True
        parent = parent.cpu_parent
    return False


def _emptied(value: Any) -> Any:
    """Hashable, without the values of tensors."""
    if isinstance(value, Tensor):
        return _Like(tuple(value.shape), value.stride(), value.dtype)
    return tuple(map(_emptied, value)) if isinstance(value, list | tuple) else value


def _filled(value: Any, device: str) -> Any:
    if isinstance(value, _Like):
        return value.made(device)
    return [_filled(one, device) for one in value] if isinstance(value, tuple) else value
