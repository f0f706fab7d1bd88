"""Tables of tensors: which of another code's weights are which of ours, and how their numbers are arranged.

A table is made for one architecture and lists every tensor once, so it works in both directions, and a file that has
one tensor too many, one too few or one of another shape does not fit. The keys of both sides are `state_dict` names.
"""

import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.errors import CheckpointError

_SHOWN = 12
"""Lines of a message that lists tensors."""


@dataclass(frozen=True)
class Change:
    """How numbers are arranged differently: two functions, each the other's inverse.

    Attributes:
        ours: their tensors, in the order of `Entry.theirs` -> our tensor.
        theirs: our tensor -> their tensors.
    """

    ours: Callable[[Sequence[Tensor]], Tensor]
    theirs: Callable[[Tensor], Sequence[Tensor]]


def each(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor]) -> Change:
    """The change of one tensor into one."""
    return Change(lambda tensors: ours(*tensors), lambda tensor: (theirs(tensor),))


SAME = each(lambda tensor: tensor, lambda tensor: tensor)
# A linear layer (out, in) is a convolution of size 1 (out, in, 1, 1), or one over a sequence (out, in, 1).
LINEAR_AS_CONV2D = each(lambda weight: weight[:, :, None, None], lambda weight: weight[:, :, 0, 0])
CONV1D_AS_CONV2D = each(lambda weight: weight[..., None], lambda weight: weight[..., 0])


@dataclass(frozen=True)
class Entry:
    """One tensor of ours, and the one or several of theirs that hold the same numbers."""

    ours: str
    theirs: tuple[str, ...]
    change: Change = SAME


Table = Sequence[Entry]


def layer(ours: str, theirs: str, weight: Change = SAME, bias: Change | None = SAME) -> list[Entry]:
    """The entries of a layer's weight and, unless its change is None, its bias."""
    entries = [Entry(f"{ours}.weight", (f"{theirs}.weight",), weight)]
    return entries if bias is None else [*entries, Entry(f"{ours}.bias", (f"{theirs}.bias",), bias)]


def constant(ours: str, value: Tensor) -> Entry:
    """A tensor of ours that theirs do not have, because in their model it is always this: an identity, or zeros.

    On the way out it must still be that: `to_theirs` raises CheckpointError where training has changed it.
    """

    def leave_out(tensor: Tensor) -> Sequence[Tensor]:
        if not tensor.is_meta and not torch.equal(tensor.cpu(), value.to(tensor.dtype)):
            raise CheckpointError(
                f"{ours}: has been trained, and the format asked for has no place for it (there it is always what it "
                f"was when the model was converted). Save the model in a format that has one."
            )
        return ()

    return Entry(ours, (), Change(lambda _: value.clone(), leave_out))


def identity_conv(ours: str, channels: int) -> list[Entry]:
    """The entries of a 1x1 convolution of ours, with bias, in the place of which theirs have nothing."""
    weight = torch.eye(channels)[:, :, None, None]
    return [constant(f"{ours}.weight", weight), constant(f"{ours}.bias", torch.zeros(channels))]


def under(table: Table, ours: str = "", theirs: str = "") -> list[Entry]:
    """The same table for a part: with these prefixes, which end with a dot."""
    return [
        Entry(f"{ours}{entry.ours}", tuple(f"{theirs}{name}" for name in entry.theirs), entry.change) for entry in table
    ]


@dataclass(frozen=True)
class Dropped:
    """Tensors of theirs that have no place in our model, and why.

    Attributes:
        pattern: of names, with * for any characters.
        reason: what they are, for the note on where a model comes from.
    """

    pattern: str
    reason: str

    def covers(self, name: str) -> bool:
        return fnmatch.fnmatchcase(name, self.pattern)


@dataclass(frozen=True)
class Fitted:
    """Weights in our names.

    Attributes:
        weights: float32 by our name.
        dropped: {reason: number of tensors} of what was left out.
    """

    weights: dict[str, Tensor]
    dropped: dict[str, int] = field(default_factory=dict)


def to_ours(
    table: Table,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    origin: str,
    dropped: Sequence[Dropped] = (),
) -> Fitted:
    """Every tensor of theirs in its place, in float32 (integers as they are).

    Args:
        table: of the architecture.
        tensors: theirs; each is used once, or named by `dropped`.
        shapes: of ours, by name: exactly those that the table lists.
        origin: the file and what it is taken for, for messages.
        dropped: what may be left out.

    Raises:
        CheckpointError: a tensor is missing, left over, of another shape or type, or not finite; one message lists all.
    """
    check_complete(table, shapes)
    wanted = {name for entry in table for name in entry.theirs}
    left = [name for name in tensors if name not in wanted]
    reasons: dict[str, int] = {}
    unused = []
    for name in left:
        why = next((one.reason for one in dropped if one.covers(name)), None)
        if why is None:
            unused.append(name)
        else:
            reasons[why] = reasons.get(why, 0) + 1
    misshapen = _misshapen(table, tensors, shapes)
    there = [name for name in sorted(wanted & tensors.keys()) if name not in misshapen]
    odd = {name: text for name in there if (text := _odd(tensors[name]))}
    problems = listed("missing", sorted(wanted - tensors.keys()))
    problems += listed("in no place of this model", [f"{name} {[*tensors[name].shape]}" for name in unused])
    problems += listed("of another shape", [f"{name}: {text}" for name, text in misshapen.items()])
    problems += listed("of a type that weights do not have", [f"{name}: {text}" for name, text in odd.items()])
    nan = [name for name in there if name not in odd and not _finite(tensors[name])]
    problems += listed("not finite (NaN or infinity)", nan)
    if problems:
        raise CheckpointError(f"{origin}: its tensors do not fit. Nothing was written.\n" + "\n".join(problems))
    weights = {entry.ours: _as_float32(entry.change.ours([tensors[name] for name in entry.theirs])) for entry in table}
    return Fitted(weights, reasons)


def to_theirs(table: Table, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of ours under their names, contiguous; the inverse of `to_ours`."""
    check_complete(table, {name: tensor.shape for name, tensor in weights.items()})
    theirs: dict[str, Tensor] = {}
    for entry in table:
        changed = entry.change.theirs(weights[entry.ours])
        theirs |= {name: tensor.contiguous() for name, tensor in zip(entry.theirs, changed, strict=True)}
    return theirs


def check_complete(table: Table, shapes: Mapping[str, torch.Size]) -> None:
    """AssertionError unless the table lists every one of our tensors exactly once, and each of theirs once: a bug."""
    ours = [entry.ours for entry in table]
    theirs = [name for entry in table for name in entry.theirs]
    assert len({*ours}) == len(ours), f"listed twice: {_twice(ours)}"
    assert len({*theirs}) == len(theirs), f"listed twice: {_twice(theirs)}"
    assert {*ours} == shapes.keys(), f"not in both: {sorted({*ours} ^ shapes.keys())[:8]}"


def renamed(tensors: Mapping[str, Tensor], rename: Callable[[str], str], origin: str) -> dict[str, Tensor]:
    """The same tensors under other names; CheckpointError where two would get one name, and one be lost."""
    made = {rename(name): tensor for name, tensor in tensors.items()}
    if len(made) < len(tensors):
        twice = listed("there twice", _twice([*map(rename, tensors)]))
        said = f"{origin}: holds tensors that differ in a prefix of their names alone."
        raise CheckpointError("\n".join([said, *twice]))
    return made


def _misshapen(table: Table, tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, str]:
    """{name of theirs: "expected [...], found [...]"}, expected of what our shapes become in their arrangement."""
    wrong = {}
    for entry in table:
        expected = entry.change.theirs(torch.empty(shapes[entry.ours], device="meta"))
        for name, one in zip(entry.theirs, expected, strict=True):
            if name in tensors and tensors[name].shape != one.shape:
                wrong[name] = f"expected {[*one.shape]}, found {[*tensors[name].shape]}"
    return wrong


def _odd(tensor: Tensor) -> str | None:
    """What is wrong with a tensor's type: one integer can be a count (BatchNorm's), weights are real numbers."""
    if tensor.layout != torch.strided:
        return f"expected a dense tensor, found {str(tensor.layout).removeprefix('torch.')}"
    if tensor.is_floating_point() or not tensor.ndim:
        return None
    return f"expected floating point, found {str(tensor.dtype).removeprefix('torch.')}"


def _finite(tensor: Tensor) -> bool:
    """Whether all values are finite numbers; true of the meta device's, which has none."""
    return tensor.is_meta or not tensor.is_floating_point() or bool(tensor.float().isfinite().all())


def _as_float32(tensor: Tensor) -> Tensor:
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous()


def listed(what: str, lines: Iterable[str]) -> list[str]:
    """Lines of a message, those that differ in their numbers alone as one."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(re.sub(r"(?<![\w\[])\d+(?=\.)", "*", line), []).append(line)
    texts = [one[0] if len(one) == 1 else f"{pattern} ({len(one)} tensors)" for pattern, one in groups.items()]
    more = [f"    and {len(texts) - _SHOWN} more kinds"] if len(texts) > _SHOWN else []
    total = sum(map(len, groups.values()))
    return [f"  {what} ({total}):", *(f"    {text}" for text in texts[:_SHOWN]), *more] if texts else []


def _twice(names: Sequence[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)[:8]
