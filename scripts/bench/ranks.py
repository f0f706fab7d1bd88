"""The forms of cost.py against two real processes on this machine: collectives, steps, bytes held, memory."""

import math
import socket
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ldm.evaluation.report import markdown
from scripts.bench import cost
from scripts.bench.child import Answer, Built, Make, Place, timed
from scripts.bench.contest import WARM_UP, Child, Side
from scripts.bench.networks import shapes
from scripts.bench.sides import links, ours
from scripts.bench.sides.launched import Rank
from scripts.bench.sizes import UNetSize
from scripts.bench.steps import sizes
from scripts.bench.tables import spread, written

WORLD = 2
KINDS = ("weights", "gradients", "moments", "averages")
_SIZES, _TINY_SIZES = (2**16, 2**20, 2**23, 2**26), (2**16, 2**20)
_STEPS = ["processes", "images each", "ms (min to max)", "predicted", "error", "peak, MiB", "predicted", "error"]
_NOTES = (
    "each process has one thread; `apart`: two processes that train a model each, and do not communicate",
    "predicted: seconds of a step apart, and the bytes of each collective at the rate of the largest one above; nothing "
    "is hidden behind the backward pass, since the processor that computes also sends",
    "held: by the first rank, bytes of storages after a step, against the closed form, which is exact",
    "peak: resident memory of the first rank, libraries included; predicted: that of `apart`, and the difference of "
    "what is held",
)


@dataclass
class Group:
    """Processes that step at once.

    Attributes:
        seconds: of each step: those of the slowest.
        held: bytes of the first one, by kind.
        peak: bytes of resident memory of the first one.
    """

    name: str
    children: Sequence[Child]
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


def grouped(name: str, make: Callable[[Rank], Make], world: int, place: Place, stack: ExitStack) -> Group:
    """A group of `world` ranks, ready for its first step."""
    port = _free_port()
    ranks = [Rank(number, world, port) for number in range(world)]
    children = [stack.enter_context(Child(Side(f"{name}, rank {rank.number}", make(rank)), place)) for rank in ranks]
    return _ready(Group(name, children))


def apart(make: Callable[[Rank], Make], place: Place, stack: ExitStack) -> Group:
    """Two ranks of a world of their own."""
    alone = Rank(0, 1, 0)
    children = [stack.enter_context(Child(Side("apart", make(alone)), place)) for _ in range(WORLD)]
    return _ready(Group("2, apart", children))


def _ready(group: Group) -> Group:
    for child in group.children:
        child.answer()
    return group


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def ranks(options: Any) -> str:
    """The table of `bench ranks`."""
    place = Place("cpu", False)
    sent = links_measured(_TINY_SIZES if options.tiny else _SIZES, options.repeats, place)
    size = sizes(options).sampled
    cases = {one.images: (one, steps_measured(one, options.repeats, place)) for one in (size, replace(size, images=1))}
    steps = [row for one, groups in cases.values() for row in steps_rows(groups, one, sent)]
    groups = cases[size.images][1]
    texts = [links_table(sent), markdown(_STEPS, steps), held_table(groups, size)]
    records = [
        {"name": f"{kind}, {size} bytes", "seconds": seconds, "rate": rate(kind, size, statistics.median(seconds))}
        for (kind, size), seconds in sent.items()
    ]
    records += [
        {
            **{"name": f"{group.name}, {images} images each", "seconds": group.seconds},
            **{"held": group.held, "peak_bytes": group.peak},
        }
        for images, (_, groups) in cases.items()
        for group in groups
    ]
    return written(options, records, "\n\n".join(texts), _NOTES)


Sent = dict[tuple[str, int], list[float]]
"""Seconds of each (collective, bytes)."""


def links_measured(sizes: tuple[int, ...], repeats: int, place: Place) -> Sent:
    """The collectives of two processes, alone."""
    found: Sent = {kind: [] for kind in links.kinds(sizes)}
    with ExitStack() as stack:
        group = grouped("links", lambda rank: partial(links.collectives, sizes, rank), WORLD, place, stack)
        for turn in range(WARM_UP + repeats):
            for kind in found:
                seconds = group.step()["seconds"]
                if turn >= WARM_UP:
                    found[kind].append(seconds)
    return found


def rate(kind: str, size: int, seconds: float) -> float:
    """Bytes a second that each process has sent: once a `one_way`, twice for an all-reduce."""
    return (2 if kind == "all-reduce" else 1) * cost.one_way(size, WORLD) / seconds


def steps_measured(size: UNetSize, repeats: int, place: Place) -> list[Group]:
    """One process, two apart, two under each strategy: step by step in turn."""
    with ExitStack() as stack:

        def of(strategy: str | None) -> Callable[[Rank], Make]:
            return lambda rank: partial(ours.ranked, size, strategy, rank)

        groups = [grouped("1", of(None), 1, place, stack), apart(of(None), place, stack)]
        groups += [grouped(f"{WORLD}, {name}", of(name), WORLD, place, stack) for name in ("DDP", "FSDP2")]
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
    """Bytes of the storages of a LatentDiffusion's weights, gradients, moments and averages on this rank."""
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
    rows = [
        [kind, f"{size / 2**20:g}", spread(found), f"{rate(kind, size, statistics.median(found)) / 1e9:.2f}"]
        for (kind, size), found in sent.items()
    ]
    return markdown(["collective", "MiB", "ms (min to max)", "GB/s"], rows)


def predicted_seconds(group: Group, arithmetic: float, parameters: int, sent: Sent) -> float:
    """Of a step, from that of a process that does not communicate."""
    largest = max(size for _, size in sent)
    speed = {
        kind: rate(kind, size, statistics.median(found)) for (kind, size), found in sent.items() if size == largest
    }
    size = cost.FLOAT * parameters
    if group.name.endswith("DDP"):
        return arithmetic + cost.all_reduce(size, WORLD, speed["all-reduce"])
    gathered = 2 * cost.gather(size, WORLD, speed["all-gather"])
    return arithmetic + gathered + cost.gather(size, WORLD, speed["reduce-scatter"])


def steps_rows(groups: Sequence[Group], size: UNetSize, sent: Sent) -> list[list[str]]:
    """A row for each group."""
    with torch.device("meta"):
        network = ours.make_unet(size)
    parameters = sum(map(math.prod, shapes(network)))
    without = groups[1]
    own = cost.held(shapes(network)).total
    rows = []
    for group in groups:
        row = [group.name, str(size.images), spread(group.seconds), "", "", f"{group.peak / 2**20:.0f}", "", ""]
        if group in groups[2:]:
            seconds = predicted_seconds(group, without.median, parameters, sent)
            more = sum(group.held.values()) - own + (own // 5 if group.name.endswith("DDP") else 0)
            peak = without.peak + more
            row[3:5] = [f"{seconds * 1e3:.0f}", f"{seconds / group.median - 1:+.0%}"]
            row[6:] = [f"{peak / 2**20:.0f}", f"{peak / group.peak - 1:+.0%}"]
        rows.append(row)
    return rows


def held_table(groups: Sequence[Group], size: UNetSize) -> str:
    """A row for each group: bytes held by kind, and what the closed form says."""
    with torch.device("meta"):
        found = shapes(ours.make_unet(size))
    rows = []
    for group in groups:
        devices = WORLD if group.name.endswith("FSDP2") else 1
        expected = cost.held(found, devices=devices)
        rows.append([group.name, *(f"{group.held[kind]:,}" for kind in KINDS), f"{expected.total:,}"])
    return markdown(["processes", *(f"{kind}, bytes" for kind in KINDS), "predicted, all of them"], rows)
