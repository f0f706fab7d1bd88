"""Merges configuration trees, and applies `a.b=value` overrides."""

import re
from collections.abc import Sequence

from ldm.config import moved
from ldm.config.tree import Node, dotted, show
from ldm.config.yaml_text import parse
from ldm.errors import ConfigError


def merge(base: Node, over: Node) -> Node:
    """`base` updated with `over`: mappings are merged key by key, everything else is replaced.

    A node that names another `target` replaces the whole node: the parameters of one class are not another's.
    """
    if not isinstance(base.value, dict) or not isinstance(over.value, dict):
        return over
    if over.is_object and base.is_object and over.value["target"].value != base.value["target"].value:
        return over
    merged = dict(base.value)
    for key, child in over.value.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return Node(merged, base.origin if base.value else over.origin)


def apply(root: Node, overrides: Sequence[str]) -> Node:
    """The tree with every `a.b.c=value` (value in YAML, numbers index lists) merged in; later ones win.

    Overrides of a `target` are applied first, outer before inner, so that they never discard another override.
    """
    parsed = [_override(text) for text in overrides]
    parsed.sort(key=lambda item: (False, len(item[0])) if item[0][-1] == "target" else (True, 0))
    for keys, value in parsed:
        root = merge(root, _nested(root, keys, value, ""))
    return root


def _override(text: str) -> tuple[list[str], Node]:
    key, equals, value = text.partition("=")
    origin = f"command line: {text}"
    if not equals or not re.fullmatch(r"[^.\s=]+(\.[^.\s=]+)*", key):
        raise ConfigError(f"{origin}: expected key=value with a dotted key, as in data.params.batch_size=64")
    node, keys = parse(value, origin, numbered=False) or Node(None, origin), key.split(".")
    if keys[-1] == "target" and isinstance(node.value, str):
        node = Node(moved.target(node.value), origin)
    return keys, node


def _nested(node: Node, keys: list[str], value: Node, key: str) -> Node:
    """`value` inside the mappings (or the changed list) that put it at `keys` of `node`."""
    if not keys:
        return value
    name, rest = keys[0], keys[1:]
    here = dotted(key, name)
    if isinstance(node.value, list):
        if not re.fullmatch(r"[0-9]+", name) or int(name) >= len(node.value):
            raise ConfigError(
                f"{here} ({value.origin}): {key} is a list ({node.origin}); expected an index from 0 to "
                f"{len(node.value) - 1}, found '{name}'"
            )
        items = list(node.value)
        items[int(name)] = merge(items[int(name)], _nested(items[int(name)], rest, value, here))
        return Node(items, node.origin)
    if node.value is not None and not isinstance(node.value, dict):
        raise ConfigError(
            f"{here} ({value.origin}): {key} is {show(node)} ({node.origin}), which has no keys; write {key}=..."
        )
    child = node.children.get(name, Node(None, value.origin))
    return Node({name: _nested(child, rest, value, here)}, value.origin)
