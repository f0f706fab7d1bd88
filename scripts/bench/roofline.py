"""What of our steps is arithmetic, and how near that is to the same arithmetic alone, and to the machine's best."""

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from ldm.evaluation.report import markdown
from scripts.bench.child import Answer, Place, timed
from scripts.bench.contest import WARM_UP, Child, Side
from scripts.bench.primitives import profiled, recorded
from scripts.bench.sides import ours, peak
from scripts.bench.steps import sizes
from scripts.bench.tables import NAMES, places, spread, written

_HEADER = ["step", "precision", "what", "ms (min to max)", "share of the step", "time alone / in the step"]
_SPEEDS = ["GFLOP", "GFLOP/s in the step", "GFLOP/s alone", "of the peak, alone"]
_ALL = "all of these"
_NOTES = (
    "share of the step: by torch.profiler; in ours is Lightning, the batch from its loader, the optimizer, the average",
    "alone: the same operators with the same shapes and strides, one after another in the same process, once a step",
)


@dataclass
class Kind:
    """Primitives of one kind: seconds of each step in it, and alone; FLOPs of a step."""

    inside: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    flops: int = 0

    def add(self, inside: float, alone: float, flops: int) -> None:
        self.inside.append(inside)
        self.alone.append(alone)
        self.flops = flops


@dataclass
class Profile:
    """A step: its seconds, its primitives by kind, and FLOP/s of the largest product that was measured beside it."""

    name: str
    bf16: bool
    seconds: list[float] = field(default_factory=list)
    kinds: dict[str, Kind] = field(default_factory=dict)
    peak: float = 0.0

    def add(self, answer: Answer) -> None:
        """The answer of `profiled`."""
        self.seconds.append(answer["seconds"])
        totals = [sum(answer[what].values()) for what in ("inside", "alone", "flops")]
        self.kinds.setdefault(_ALL, Kind()).add(totals[0], totals[1], int(totals[2]))
        for name, flops in answer["flops"].items():
            self.kinds.setdefault(name, Kind()).add(answer["inside"].get(name, 0.0), answer["alone"][name], flops)


def roofline(options: Any) -> str:
    """The table of `bench roofline`."""
    chosen = sizes(options)
    where, without = places(options.device)
    sides = {
        f"autoencoder, {size.images} x {size.resolution} px, {loss}": partial(ours.autoencoder, size, adversarial)
        for size in chosen.autoencoders
        for loss, adversarial in (("L1, KL", False), ("LPIPS, discriminator", True))
    }
    sides["UNet, on the cache"] = partial(ours.unet, chosen.unet)
    sides["DiT-S/2, on the cache"] = partial(ours.dit, chosen.dit, False, ours.ddpm, False)
    product = Side(f"matrix product, {chosen.product}", partial(peak.product, chosen.product))
    found = [
        profile(Side(name, make), product, 2 * chosen.product**3, place, options.repeats)
        for name, make in sides.items()
        for place in where
    ]
    notes = [*_NOTES, f"the peak: a {product.name}", *without]
    return written(options, [asdict(one) for one in found], table(found), notes)


def profile(side: Side, product: Side, flops: int, place: Place, repeats: int) -> Profile:
    """A step of `side` and one of `product`, of so many FLOPs, in turn."""
    found, best = Profile(side.name, place.bf16), []
    with ExitStack() as stack:
        both = [stack.enter_context(Child(one, place)) for one in (side, product)]
        for child in both:
            child.answer()
            for _ in range(WARM_UP):
                child.ask(timed)
        primitives = both[0].ask(recorded)["primitives"]
        for _ in range(repeats):
            found.add(both[0].ask(partial(profiled, primitives)))
            best.append(both[1].ask(timed)["seconds"])
    found.peak = flops / statistics.median(best)
    return found


def table(found: Sequence[Profile]) -> str:
    """A row for each kind of primitive of each step."""
    rows = [_row(one, name, kind) for one in found for name, kind in one.kinds.items()]
    return markdown([*_HEADER, *_SPEEDS], rows)


def _row(one: Profile, name: str, kind: Kind) -> list[str]:
    shares = [inside / seconds for inside, seconds in zip(kind.inside, one.seconds, strict=True)]
    near = [alone / inside for alone, inside in zip(kind.alone, kind.inside, strict=True) if inside]
    in_step, alone = (statistics.median(times) for times in (kind.inside, kind.alone))
    return [
        *(one.name, NAMES[one.bf16], name, spread(one.seconds) if name == _ALL else ""),
        *(f"{statistics.median(shares):.0%}", f"{statistics.median(near):.0%}" if near else ""),
        f"{kind.flops / 1e9:.4g}",
        f"{kind.flops / in_step / 1e9:.0f}" if in_step else "",
        f"{kind.flops / alone / 1e9:.0f}",
        f"{kind.flops / alone / one.peak:.0%}",
    ]
