"""Numeric types with ranges, for constructors' hints, against which values in a YAML file are checked.

    def __init__(self, dropout: FractionBelowOne = 0.0, heads: Count | None = None) -> None: ...

A custom range is `Annotated[float, Interval(ge=0, lt=2)]`. Nothing is checked when Python calls a constructor.
NaN fits no range, and infinity only one that includes it by name (`le=math.inf`).
"""

import math
import operator
import typing
from typing import Annotated, Any, NamedTuple

from annotated_types import Ge, GroupedMetadata, Gt, Interval, Le, Lt

Count = Annotated[int, Ge(1)]
CountOrZero = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Finite = Annotated[float, Interval(gt=-math.inf, lt=math.inf)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
FractionBelowOne = Annotated[float, Interval(ge=0, lt=1)]
FractionAboveZero = Annotated[float, Interval(gt=0, le=1)]
Seed = Annotated[int, Interval(ge=0, lt=2**64)]
Resolution = Count | tuple[Count, Count]
"""Pixels: the side of a square, or (height, width); see ldm/sizes.py."""

_HOLDS = {Ge: operator.ge, Gt: operator.gt, Le: operator.le, Lt: operator.lt}
_WORDS = {Ge: "from {} up", Gt: "above {}", Le: "up to {}", Lt: "below {}"}


class Bound(NamedTuple):
    """One end of a range: a class of annotated_types (Ge, Gt, Le, Lt), and the number."""

    kind: type
    number: float


def bounds(hint: Any) -> list[Bound]:
    """The bounds that a hint states, the lower one first; empty where it states none."""
    notes = getattr(hint, "__metadata__", ())
    single = [one for note in notes for one in (note if isinstance(note, GroupedMetadata) else [note])]
    found = [Bound(type(one), getattr(one, type(one).__name__.lower())) for one in single if type(one) in _HOLDS]
    return sorted(found, key=lambda bound: bound.kind in (Le, Lt))


def admits(hint: Any, value: float) -> bool:
    """Whether the number `value` lies within the bounds of `hint` and, unless one of them names it, is finite."""
    stated = bounds(hint)
    within = all(_HOLDS[bound.kind](value, bound.number) for bound in stated)
    return within and (is_finite(value) or any(value == bound.number for bound in stated))


def is_finite(value: float) -> bool:
    """Whether the value is finite; an integer always is, even one too large for a float."""
    return isinstance(value, int) or math.isfinite(value)


def spell(hint: Any) -> str:
    """A hint with bounds in a user's words, such as "a number from 0 to 1"."""
    kind = "whole number" if typing.get_args(hint)[0] is int else "number"
    ends = [bound for bound in bounds(hint) if is_finite(bound.number)]
    if not ends:
        return f"a finite {kind}"
    if [bound.kind for bound in ends] == [Ge, Le]:
        return f"a {kind} from {_short(ends[0].number)} to {_short(ends[1].number)}"
    return f"a {kind} {', '.join(_WORDS[bound.kind].format(_short(bound.number)) for bound in ends)}"


def _short(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:.4g}"
