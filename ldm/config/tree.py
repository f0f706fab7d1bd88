"""A configuration as a tree in which each value carries the place where it was written."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ldm.config import moved
from ldm.errors import ConfigError

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Node:
    """A value of the configuration and the place it comes from: `file:line` or `command line: a.b=1`."""

    value: "dict[str, Node] | list[Node] | Scalar"
    origin: str

    @property
    def children(self) -> "dict[str, Node]":
        """The values in a mapping or list, by name or index; empty for a scalar."""
        if isinstance(self.value, list):
            return {str(i): child for i, child in enumerate(self.value)}
        return self.value if isinstance(self.value, dict) else {}

    @property
    def is_object(self) -> bool:
        """Whether this is `{target: ..., params: ..., partial: ...}`."""
        return isinstance(self.value, dict) and "target" in self.value

    @property
    def is_partial(self) -> bool:
        """Whether this object is a factory."""
        return "partial" in self.children and self.children["partial"].value is True

    def plain(self) -> Any:
        """The value as newly created plain Python containers."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value


def from_plain(value: Any, origin: str, key: str = "") -> Node:
    """The tree of plain containers, with current names; ConfigError if they hold anything else."""
    return current(_from_plain(value, origin, key))


def current_plain(value: Any, origin: str = "a stored configuration") -> Any:
    """A copy of plain containers, such as the configuration in a checkpoint, with current names."""
    return from_plain(value, origin).plain()


def _from_plain(value: Any, origin: str, key: str) -> Node:
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str):
                raise ConfigError(f"{origin}: {key or 'top level'}: keys are text, found {name!r}")
        return Node({name: _from_plain(child, origin, dotted(key, name)) for name, child in value.items()}, origin)
    if isinstance(value, list | tuple):
        return Node([_from_plain(child, origin, dotted(key, i)) for i, child in enumerate(value)], origin)
    if value is None or type(value) in (str, int, float, bool):
        return Node(value, origin)
    raise ConfigError(
        f"{origin}: {key}: expected text, number, true/false, null, list or mapping, found {type(value).__name__}"
    )


def current(node: Node) -> Node:
    """The tree with current names in every object."""
    if isinstance(node.value, list):
        return Node([current(child) for child in node.value], node.origin)
    if not isinstance(node.value, dict):
        return node
    children = {key: current(child) for key, child in node.value.items()}
    target, params = children.get("target"), children.get("params")
    if target is not None and isinstance(target.value, str):
        name = moved.target(target.value)
        children["target"] = Node(name, target.origin)
        if params is not None and isinstance(params.value, dict):
            renamed = {moved.parameter(name, key): child for key, child in params.value.items()}
            children["params"] = Node(renamed, params.origin)
    return Node(children, node.origin)


def dotted(*keys: str | int) -> str:
    """`a.b` and `c` -> `a.b.c`."""
    return ".".join(str(key) for key in keys if key != "")


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest valid one, or all of them."""
    names = sorted(set(valid))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"valid: {', '.join(names[:40]) or 'none'}"


def show(node: Node) -> str:
    """The value as messages show it: shortened, with its type."""
    if isinstance(node.value, dict):
        return f"a mapping with {', '.join(node.value) or 'no keys'}"
    if isinstance(node.value, list):
        return f"a list of {len(node.value)}"
    if node.value is None:
        return "null"
    text = repr(node.value)
    return f"{type(node.value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
