"""The forms of cost.py against two real processes on this machine: collectives, steps, bytes held, memory."""

import socket
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ldm.evaluation.report import markdown
from scripts.bench import cost
from scripts.bench.child import Answer, Built, Make, Place, count, timed
from scripts.bench.contest import WARM_UP, Child, Side
from scripts.bench.networks import shapes
from scripts.bench.sides import links, ours
from scripts.bench.sides.launched import Rank
from scripts.bench.sides.links import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Collective
from scripts.bench.sizes import UNetSize
from scripts.bench.steps import sizes
from scripts.bench.tables import spread, written

WORLD = 2
KINDS = ("weights", "gradients", "moments", "averages")
_SIZES, _TINY_SIZES = (2**16, 2**20, 2**23, 2**26), (2**16, 2**20)
_STEPS = ["processes", "images each", "ms (min to max)", "predicted", "error", "peak, MiB", "predicted", "error"]
_NOTES = (
    "each process has one thread; `apart`: two processes that train a model each, and do not communicate",
    "predicted: seconds of a step apart, and the bytes of each collective at the rate of the largest one above; "
    "nothing is hidden behind the backward pass, since the processor that computes also sends",
    "held: by the first rank, bytes after a step, against the closed form, which is exact",
    "peak: resident memory of the first rank, with libraries and what its allocator has not given back; predicted: "
    "that of `apart`, and what a strategy holds more or less of states, buckets and gathered parts",
)

Sent = dict[tuple[Collective, int], list[float]]
"""Seconds of each (collective, bytes)."""
Rates = dict[Collective, float]
"""Bytes a second that a process sends in each."""


class Strategy(NamedTuple):
    """What is known of a class of ldm/training/strategies.py.

    Attributes:
        communicates: (bytes of the weights in float32, rates) -> seconds of a step.
        memory: network -> bytes of a rank, without what the forward pass keeps.
        devices: that share the states.
    """

    name: str
    communicates: Callable[[int, Rates], float]
    memory: Callable[[cost.Network], float]
    devices: int


def _ddp(size: int, rates: Rates) -> float:
    return cost.all_reduce(size, WORLD, rates[ALL_REDUCE])


def _fsdp(size: int, rates: Rates) -> float:
    gathers = 2 * cost.gather(size, WORLD, rates[ALL_GATHER])
    return gathers + cost.gather(size, WORLD, rates[REDUCE_SCATTER])


STRATEGIES = (
    Strategy("DDP", _ddp, lambda network: cost.ddp_memory(network, 0, WORLD), 1),
    Strategy("FSDP2", _fsdp, lambda network: cost.fsdp_memory(network, 0, WORLD, cost.FLOAT), WORLD),
)


@dataclass
class Group:
    """Processes that step at once.

    Attributes:
        strategy: None: they do not communicate.
        seconds: of each step: those of the slowest.
        held: bytes of the first one, by kind.
        peak: bytes of resident memory of the first one.
    """

    name: str
    children: Sequence[Child]
    strategy: Strategy | None = None
    seconds: list[float] = field(default_factory=list)
    held: dict[str, int] = field(default_factory=dict)
    peak: int = 0

    def step(self, request: Any = timed) -> Answer:
        """One step of all; the answer of the first process, with the slowest one's seconds."""
        for child in self.children:
            child.begin(request)
        answers = [child.answer() for child in self.children]
        return answers[0] | {"seconds": max(answer.get("seconds", 0.0) for answer in answers)}

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def started(
    name: str, makes: Sequence[Make], place: Place, stack: ExitStack, strategy: Strategy | None = None
) -> Group:
    """A process for each, ready for its first step."""
    children = [stack.enter_context(Child(Side(f"{name}, {i}", make), place)) for i, make in enumerate(makes)]
    for child in children:
        child.answer()
    return Group(name, children, strategy)


def _ranks() -> list[Rank]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [Rank(number, WORLD, port) for number in range(WORLD)]


def ranks(options: Any) -> str:
    """The table of `bench ranks`."""
    place = Place("cpu", False)
    sent = links_measured(_TINY_SIZES if options.tiny else _SIZES, options.repeats, place)
    size = sizes(options).sampled
    each = [size] if options.tiny else [size, replace(size, images=1)]
    cases = [(one, steps_measured(one, options.repeats, place)) for one in each]
    steps = [row for one, groups in cases for row in steps_rows(groups, one, sent)]
    texts = [links_table(sent), markdown(_STEPS, steps), held_table(cases[0][1], size)]
    records = [
        {"name": f"{one.name}, {size} bytes", "seconds": seconds, "rate": rate(one, size, seconds)}
        for (one, size), seconds in sent.items()
    ]
    records += [
        {"name": f"{group.name}, {one.images} images each", "seconds": group.seconds}
        | {"held": group.held, "peak_bytes": group.peak}
        for one, groups in cases
        for group in groups
    ]
    return written(options, records, "\n\n".join(texts), _NOTES)


def links_measured(sizes: tuple[int, ...], repeats: int, place: Place) -> Sent:
    """The collectives of two processes, alone."""
    found: Sent = {turn: [] for turn in links.turns(sizes)}
    with ExitStack() as stack:
        makes = [partial(links.collectives, sizes, rank) for rank in _ranks()]
        group = started("links", makes, place, stack)
        for turn in range(WARM_UP + repeats):
            for seconds in found.values():
                answer = group.step()
                if turn >= WARM_UP:
                    seconds.append(answer["seconds"])
    return found


def rate(one: Collective, size: int, seconds: Sequence[float]) -> float:
    """Bytes a second that each process has sent, at the median."""
    return one.passes * cost.one_way(size, WORLD) / statistics.median(seconds)


def steps_measured(size: UNetSize, repeats: int, place: Place) -> list[Group]:
    """One process, two apart, two under each strategy: step by step in turn."""
    with ExitStack() as stack:
        alone = partial(ours.ranked, size, None, Rank(0, 1, 0))
        groups = [started(name, [alone] * n, place, stack) for name, n in (("1", 1), (f"{WORLD}, apart", WORLD))]
        for one in STRATEGIES:
            makes = [partial(ours.ranked, size, one.name, rank) for rank in _ranks()]
            groups.append(started(f"{WORLD}, {one.name}", makes, place, stack, one))
        for turn in range(WARM_UP + repeats):
            for group in groups:
                answer = group.step()
                if turn >= WARM_UP:
                    group.seconds.append(answer["seconds"])
                group.peak = answer["peak_bytes"]
        for group in groups:
            group.held = group.step(holding)["held"]
    return groups


@contextmanager
def holding(place: Place, built: Built) -> Iterator[Answer]:
    """What is `held` after the step."""
    answer: Answer = {}
    yield answer
    answer["held"] = held(built.networks[0])


def held(module: Any) -> dict[str, int]:
    """Bytes of a LatentDiffusion's weights, gradients, moments and averages on this rank."""
    weights = [weight for weight in module.denoiser.parameters() if weight.requires_grad]
    state = module.optimizers().optimizer.state
    moments = [value for weight in weights for name, value in state[weight].items() if name != "step"]
    averages = [*module.ema.average.parameters(), *module.ema.extra.parameters()]
    gradients = [weight.grad for weight in weights]
    return dict(zip(KINDS, map(_bytes, (weights, gradients, moments, averages)), strict=True))


def _bytes(tensors: Sequence[Tensor | None]) -> int:
    local = [one.to_local() if isinstance(one, DTensor) else one for one in tensors if one is not None]
    return sum(one.numel() * one.element_size() for one in local)


def links_table(sent: Sent) -> str:
    """A row for each collective at each size."""
    rows = [
        [one.name, f"{size / 2**20:g}", spread(seconds), f"{rate(one, size, seconds) / 1e9:.2f}"]
        for (one, size), seconds in sent.items()
    ]
    return markdown(["collective", "MiB", "ms (min to max)", "GB/s"], rows)


def steps_rows(groups: Sequence[Group], size: UNetSize, sent: Sent) -> list[list[str]]:
    """A row for each group; the second is apart."""
    network, apart = described(size), groups[1]
    largest = max(size for _, size in sent)
    rates = {one: rate(one, size, seconds) for (one, size), seconds in sent.items() if size == largest}
    rows = []
    for group in groups:
        row = [group.name, str(size.images), spread(group.seconds), "", "", f"{group.peak / 2**20:.0f}", "", ""]
        if group.strategy is not None:
            seconds = apart.median + group.strategy.communicates(cost.FLOAT * network.parameters, rates)
            row[3:5] = [f"{seconds * 1e3:.0f}", f"{seconds / group.median - 1:+.0%}"]
            peak = apart.peak + group.strategy.memory(network) - cost.ddp_memory(network, 0, 1)
            row[6:] = [f"{peak / 2**20:.0f}", f"{peak / group.peak - 1:+.0%}"]
        rows.append(row)
    return rows


def described(size: UNetSize) -> cost.Network:
    """The UNet, for what its weights take."""
    with torch.device("meta"):
        module = ours.make_unet(size)
    each = [count(part) for part in module.blocks()]
    largest = max(*each, count(module) - sum(each))
    return cost.Network("UNet", count(module), largest, len(each) + 1, flops=0.0, activations=0.0, copies=0.0)


def held_table(groups: Sequence[Group], size: UNetSize) -> str:
    """A row for each group: bytes held by kind, and what the closed form says."""
    with torch.device("meta"):
        found = shapes(ours.make_unet(size))
    rows = []
    for group in groups:
        expected = cost.held(found, devices=1 if group.strategy is None else group.strategy.devices)
        rows.append([group.name, *(f"{group.held[kind]:,}" for kind in KINDS), f"{expected.total:,}"])
    return markdown(["processes", *(f"{kind}, bytes" for kind in KINDS), "predicted, all of them"], rows)
