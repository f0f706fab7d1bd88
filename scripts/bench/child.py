"""One side of a comparison, in a process of its own that is kept alive: it takes one step each time it is asked to.

Nothing here imports ldm, so that a process can hold another package of that name (sides/imports.py).
"""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Place(NamedTuple):
    """Where a side computes, and how precisely: in bfloat16 by autocast, or in float32."""

    device: str
    bf16: bool

    def precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.bf16)

    def settle(self) -> None:
        """Wait for the device."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()


class Built(NamedTuple):
    """What a side has made before its first step.

    Attributes:
        parameters: weights of the networks that are compared.
        train: takes one step at each turn, until there are no more.
        networks: modules whose time is measured apart from that of the rest of a step.
    """

    parameters: int
    train: Callable[[Iterator[None]], None]
    networks: Sequence[nn.Module] = ()


class Failed(NamedTuple):
    """Why a side cannot go on: the error in one line, and its traceback."""

    reason: str
    details: str


Make = Callable[[Place], Built]
Answer = dict[str, Any]
Request = Callable[[Place, Built], AbstractContextManager[Answer]]
"""Surrounds a step, and has its answer complete when the step is over."""


def count(*modules: nn.Module) -> int:
    """Trained weights."""
    return sum(weight.numel() for module in modules for weight in module.parameters() if weight.requires_grad)


def repeat(step: Callable[[], None], place: Place) -> Callable[[Iterator[None]], None]:
    """The plain loop around a step."""

    def train(turns: Iterator[None]) -> None:
        for _ in turns:
            with place.precision():
                step()

    return train


def run(connection: Connection, make: Make, place: Place) -> None:
    """The process."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # what others print is not part of the table
    serve(connection, make, place)


def serve(connection: Connection, make: Make, place: Place) -> None:
    """Build, then answer requests until one is None."""
    try:
        built = make(place)
        connection.send({"parameters": built.parameters})
        built.train(_turns(connection, place, built))
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        connection.send(Failed(reason, traceback.format_exc()))


def _turns(connection: Connection, place: Place, built: Built) -> Iterator[None]:
    """A turn for each request; the step is between one turn and the next."""
    while (request := connection.recv()) is not None:
        with request(place, built) as answer:
            yield
        connection.send(answer)


@contextmanager
def timed(place: Place, built: Built) -> Iterator[Answer]:
    """`seconds` of the step, `inside` of them in the networks, and `peak_bytes` so far."""
    answer: Answer = {"inside": 0.0}
    place.settle()
    with _watched(place, built.networks, answer):
        start = time.perf_counter()
        yield answer
        place.settle()
        answer["seconds"] = time.perf_counter() - start
    answer["peak_bytes"] = peak_memory(place)


@contextmanager
def _watched(place: Place, networks: Sequence[nn.Module], answer: Answer) -> Iterator[None]:
    """Add the time of every call of the networks to `answer["inside"]`."""
    starts: list[float] = []

    def before(*_: Any) -> None:
        place.settle()
        starts.append(time.perf_counter())

    def after(*_: Any) -> None:
        place.settle()
        answer["inside"] += time.perf_counter() - starts.pop()

    hooks = [network.register_forward_pre_hook(before) for network in networks]
    hooks += [network.register_forward_hook(after) for network in networks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# The registry has no operators that write into an argument, of which ours has this one.
_FORMULAS = {**flop_registry, torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm]}


class Flops(TorchDispatchMode):
    """The `total` of torch.utils.flop_counter's formulas; its own counter cannot follow CompVis' checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = _FORMULAS.get(func.overloadpacket)
        if formula is None:
            with self:  # of what it consists of, if it comes whole, as in inference
                parts = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if parts is NotImplemented else parts
        output = func(*args, **kwargs)
        self.total += formula(*args, **kwargs, out_val=output)
        return output


@contextmanager
def counted(place: Place, built: Built) -> Iterator[Answer]:
    """`flops` of the step, of convolutions, matrix products and attention."""
    answer: Answer = {}
    # The counter sees no operators inside of compiled code.
    with torch.compiler.set_stance("force_eager"), Flops() as counter:
        yield answer
    answer["flops"] = counter.total


def peak_memory(place: Place) -> int:
    """The most memory that this process has had, bytes: the device's, or resident memory.

    From /proc where there is one, since ru_maxrss of a new process begins with that of the one that has started it.
    """
    if place.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
