"""Checks values of the configuration against type hints.

Strict, since the constructor receives the value unchanged: text is not a number and true is not 1. What YAML
cannot write otherwise is let through: a list for a tuple or set, text for a path, an int for a float. Numbers are
finite, and within the range that their hint states (ldm/ranges.py). A node fits where the class it makes does. Where
nothing can be decided (protocols, unresolved names), nothing is said.
"""

import collections.abc as abc
import inspect
import os
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ldm import ranges
from ldm.config.tree import Node, dotted, show
from ldm.errors import ConfigError


@dataclass(frozen=True)
class Parameter:
    """One argument of a constructor; `hint` is typing.Any where nothing is known."""

    hint: Any
    required: bool


@dataclass(frozen=True)
class Signature:
    """The parameters of a target; `open` if it accepts any keyword. `made` is the class that it returns, if known."""

    parameters: dict[str, Parameter]
    open: bool
    made: type | None = None
    is_function: bool = False


# (target, whether it is a partial) -> what is known about it; ConfigError if it may not be used.
LookUp = Callable[[str, bool], Signature | None]


class Mismatch(NamedTuple):
    """A value at `key` that does not match its hint."""

    key: str
    node: Node
    text: str


_SEQUENCES = (list, tuple, set, frozenset, abc.Sequence, abc.MutableSequence, abc.Iterable, abc.Collection, abc.Set)
_MAPPINGS = (dict, abc.Mapping, abc.MutableMapping)


def mismatches(node: Node, hint: Any, key: str, look_up: LookUp) -> list[Mismatch]:
    """Where `node`, at `key`, does not match `hint`; empty if it does or if that cannot be decided."""
    ranged, hint = hint, _simplify(hint)
    if hint is Any or hint is object or _is_deferred(node):
        return []
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _union(node, hint, key, look_up)
    kind = typing.get_origin(hint) or hint
    wrong = [Mismatch(key, node, f"expected {_wanted(node, ranged)}, found {show(node)}{_fix(node, kind)}")]
    if node.is_object:
        return _object(node, kind, key, look_up)
    if isinstance(node.value, list):
        return _list(node.value, hint, key, look_up) if kind in _SEQUENCES else wrong
    if isinstance(node.value, dict):
        if typing.is_typeddict(kind):
            return []
        return _dict(node.value, hint, key, look_up) if kind in _MAPPINGS else wrong
    return [] if _leaf_fits(node.value, hint, kind) and _is_in_range(node.value, ranged) else wrong


def _is_in_range(value: Any, hint: Any) -> bool:
    return isinstance(value, bool) or not isinstance(value, int | float) or ranges.admits(hint, value)


def _wanted(node: Node, hint: Any) -> str:
    """What the message expects: the hint, and of a number without a range that it is finite."""
    infinite = isinstance(node.value, float) and not ranges.is_finite(node.value)
    ranged = any(ranges.bounds(arm) for arm in (hint, *typing.get_args(hint)))
    return "a finite number" if infinite and not ranged else spell(hint)


def _simplify(hint: Any) -> Any:
    while True:
        if typing.get_origin(hint) is typing.Annotated:
            hint = typing.get_args(hint)[0]
        elif isinstance(hint, typing.NewType):
            hint = hint.__supertype__
        elif isinstance(hint, typing.TypeVar):
            hint = hint.__bound__ or Any
        elif isinstance(hint, str | typing.ForwardRef):
            return Any
        else:
            return type(None) if hint is None else hint


def _is_deferred(node: Node) -> bool:
    return isinstance(node.value, str) and "${data:" in node.value


def _union(node: Node, hint: Any, key: str, look_up: LookUp) -> list[Mismatch]:
    inside = []
    for arm in typing.get_args(hint):
        wrong = mismatches(node, arm, key, look_up)
        if not wrong:
            return []
        if any(mismatch.key != key for mismatch in wrong):
            inside.append(wrong)
    if len(inside) == 1:  # the only arm of the right shape: say what is wrong within it
        return inside[0]
    return [Mismatch(key, node, f"expected {_wanted(node, hint)}, found {show(node)}")]


def _list(items: list[Node], hint: Any, key: str, look_up: LookUp) -> list[Mismatch]:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and Ellipsis not in arguments:
        if len(arguments) != len(items):
            whole = Node(list(items), items[0].origin if items else "")
            return [Mismatch(key, whole, f"expected {spell(hint)}, found a list of {len(items)}")]
        hints = arguments
    else:
        hints = (arguments[0] if arguments else Any,) * len(items)
    return [
        wrong
        for i, (item, of) in enumerate(zip(items, hints, strict=True))
        for wrong in mismatches(item, of, dotted(key, i), look_up)
    ]


def _dict(items: dict[str, Node], hint: Any, key: str, look_up: LookUp) -> list[Mismatch]:
    of = (*typing.get_args(hint), Any, Any)[1]
    return [wrong for name, item in items.items() for wrong in mismatches(item, of, dotted(key, name), look_up)]


def _object(node: Node, kind: Any, key: str, look_up: LookUp) -> list[Mismatch]:
    """Checks that the class which a node builds is the one that the hint asks for."""
    target, is_partial = str(node.children["target"].value), node.is_partial
    if not inspect.isclass(kind) or getattr(kind, "_is_protocol", False) or (is_partial and kind not in _PLAIN):
        return []
    try:
        signature = look_up(target, is_partial)
    except ConfigError:
        return []  # reported where the node itself is looked at
    if signature is None or signature.made is None:
        return []
    try:
        fits = not is_partial and issubclass(signature.made, kind)
    except TypeError:
        return []
    factory = "a factory (partial: true) of " if is_partial else ""
    return [] if fits else [Mismatch(key, node, f"expected {spell(kind)}, found {factory}{target}")]


_PLAIN = (bool, int, float, str, list, tuple, dict)


def _leaf_fits(value: Any, hint: Any, kind: Any) -> bool:
    if kind is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(hint))
    if isinstance(value, bool):
        return kind is bool
    if not inspect.isclass(kind):
        return False
    if kind in _SEQUENCES:
        return False  # a text is a sequence only to Python
    if kind in (float, complex):
        return isinstance(value, int | float)
    if isinstance(value, str) and issubclass(kind, os.PathLike):
        return True
    try:
        return isinstance(value, kind)
    except TypeError:  # a protocol that cannot be tested
        return True


def _fix(node: Node, kind: Any) -> str:
    if kind is str and isinstance(node.value, int | float):
        return "; put it in quotes if it is meant as text"
    if kind is int and isinstance(node.value, float) and node.value.is_integer():
        return f"; write {int(node.value)}"
    if kind in _SEQUENCES and not isinstance(node.value, dict | list):
        return "; write [...]"
    if inspect.isclass(kind) and kind.__module__ != "builtins" and kind not in (*_SEQUENCES, *_MAPPINGS):
        factory = ", partial: true" if kind is abc.Callable else ""
        return f"; write {{target: ..., params: {{...}}{factory}}}"
    return ""


def spell(hint: Any) -> str:
    """The hint in words for the user."""
    if ranges.bounds(hint):
        return ranges.spell(hint)
    hint = _simplify(hint)
    arguments = typing.get_args(hint)
    kind = typing.get_origin(hint) or hint
    if kind in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(spell(arm) for arm in arguments))
    if kind is typing.Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if kind is abc.Callable:
        return "a callable"
    if kind is tuple and arguments and Ellipsis not in arguments:
        return f"a list of {len(arguments)} ({', '.join(spell(of) for of in arguments)})"
    if kind in _SEQUENCES:
        return f"a list of {spell(arguments[0])}" if arguments else "a list"
    if kind in _MAPPINGS:
        return f"a mapping to {spell(arguments[1])}" if len(arguments) == 2 else "a mapping"
    names = {type(None): "null", bool: "true or false", Any: "anything"}
    return names.get(kind) or str(getattr(kind, "__name__", kind))
