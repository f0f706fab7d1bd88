"""From YAML text and `a.b=value` overrides to one merged tree in which every value remembers where it was written.

The dialect is YAML 1.2's core schema with the traps taken out: `1e-4` is a number, dates are text, and what the
two versions of YAML read differently (`012`, `yes`, `off`) is refused. Aliases, tags and duplicate keys are errors.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import yaml

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
        """The values inside by name or index; none in a scalar."""
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
        """The value as plain Python containers, all of them new."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value


def from_plain(value: Any, origin: str, key: str = "") -> Node:
    """The tree of plain containers, with the names of today; ConfigError if something else is among them."""
    return _current(_from_plain(value, origin, key))


def current_plain(value: Any, origin: str = "a stored configuration") -> Any:
    """Plain containers, such as the configuration in a checkpoint, with the names of today; all of them new."""
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


def _current(node: Node) -> Node:
    """The tree with the names of today in every object."""
    if isinstance(node.value, list):
        return Node([_current(child) for child in node.value], node.origin)
    if not isinstance(node.value, dict):
        return node
    children = {key: _current(child) for key, child in node.value.items()}
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
    """The end of a message about a wrong name: the likeliest right one, otherwise all of them."""
    names = sorted(set(valid))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"valid: {', '.join(names[:40]) or 'none'}"


# ---- YAML -----------------------------------------------------------------------------------------------------

_AMBIGUOUS = "tag:ldm:ambiguous"
_CORE = [  # (tag, what a plain scalar looks like, the characters it can start with)
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?(0|[1-9][0-9_]*)|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (_AMBIGUOUS, r"[-+]?0[0-9]+", list("-+0")),
    (_AMBIGUOUS, r"(?i:yes|no|on|off|y)|[nN]", list("yYnNoO")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def check_printable(self, data: Any) -> None:
        # Bytes of a path that are not UTF-8, as Python has them from the command line.
        super().check_printable(re.sub("[\udc80-\udcff]", "?", data))

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(
                problem="an alias (*name); write ${a.b} to refer to another key, or quote the text", problem_mark=mark
            )
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    # The same rules as the loader's decide which texts need quotes.
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # Unicode has line ends that YAML folds into a space unless they are escaped.
    style = None if text.splitlines() in ([], [text]) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
for _tag, _pattern, _first in _CORE:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)


def to_yaml(tree: Any) -> str:
    """Plain containers as YAML text that `load` reads back to the same tree."""
    return str(yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


def parse(text: str, name: str, *, numbered: bool = True) -> Node | None:
    """The document as a Node, with the names of today; None if it is empty.

    Args:
        name: the file, or `command line: a.b=1`.
        numbered: whether origins are `name:line` or `name` alone.

    Raises:
        ConfigError: it is not valid; names `name` and the line.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
        return None if root is None else _current(_convert(root, name, numbered, ""))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if numbered and mark else name
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        context = getattr(error, "context", None)
        line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
        hint = "; quote '${...}' inside [ ] and { }" if "${" in line else ""
        raise ConfigError(f"{where}: not valid YAML: {f'{context}: ' if context else ''}{problem}{hint}") from error
    except RecursionError as error:
        raise ConfigError(f"{name}: not a configuration: nested too deeply") from error


def _convert(node: yaml.Node, name: str, numbered: bool, key: str) -> Node:
    origin = f"{name}:{node.start_mark.line + 1}" if numbered else name
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return Node([_convert(child, name, numbered, dotted(key, i)) for i, child in enumerate(node.value)], origin)
    if isinstance(node, yaml.MappingNode) and kind == "map":
        children: dict[str, Node] = {}
        for key_node, value_node in node.value:
            where = f"{name}:{key_node.start_mark.line + 1}" if numbered else name
            child = _key(key_node, where, key)
            if child in children:
                raise ConfigError(
                    f"{dotted(key, child)} ({where}): duplicate key, first written at {children[child].origin}; "
                    "keep one of the two"
                )
            # The line of the key: the value of `a:` starts only on the next line.
            children[child] = replace(_convert(value_node, name, numbered, dotted(key, child)), origin=where)
        return Node(children, origin)
    if isinstance(node, yaml.ScalarNode):
        return Node(_scalar(node, f"{key or 'the value'} ({origin})"), origin)
    raise ConfigError(f"{key or 'the value'} ({origin}): the tag {node.tag} is refused; remove it")


def _key(node: yaml.Node, where: str, parent: str) -> str:
    if not isinstance(node, yaml.ScalarNode) or not re.fullmatch(r"[^.\s=]+", node.value):
        found = repr(node.value) if isinstance(node, yaml.ScalarNode) else "a list or mapping"
        raise ConfigError(
            f"{parent or 'top level'} ({where}): a key is text without dots, spaces and '=', found {found}"
        )
    return str(node.value)


def _scalar(node: yaml.ScalarNode, where: str) -> Scalar:
    text, kind = node.value, node.tag.removeprefix("tag:yaml.org,2002:")
    if kind == _AMBIGUOUS:
        fix = f"write {int(text)}" if text.lstrip("+-").isdigit() else "write true or false"
        raise ConfigError(f"{where}: '{text}' is ambiguous in YAML; {fix}, or quote it if it is text: '{text}'")
    if kind not in ("str", "null", "bool", "int", "float"):
        raise ConfigError(f"{where}: the tag {kind} is refused; expected plain text, a number, true/false or null")
    try:
        value: Scalar = yaml.constructor.SafeConstructor().construct_object(node)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{where}: '{text}' is no {kind}; remove the tag") from error
    return value


def read(path: Path) -> Node:
    """The mapping in a YAML file; ConfigError if it is missing, not YAML, empty or not a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        beside = [str(other) for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such file; {nearest(str(path), beside)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a YAML file: it is not UTF-8 text") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; expected a YAML file") from error
    root = parse(text, str(path))
    if root is None:
        raise ConfigError(f"{path}:1: the file is empty; expected a mapping with model, data, lightning, seed")
    if not isinstance(root.value, dict):
        raise ConfigError(f"{root.origin}: expected a mapping (key: value), found {show(root)}")
    return root


def show(node: Node) -> str:
    """The value as a message shows it: short, with its kind."""
    if isinstance(node.value, dict):
        return f"a mapping with {', '.join(node.value) or 'no keys'}"
    if isinstance(node.value, list):
        return f"a list of {len(node.value)}"
    if node.value is None:
        return "null"
    text = repr(node.value)
    return f"{type(node.value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


# ---- merging --------------------------------------------------------------------------------------------------


def merge(base: Node, over: Node) -> Node:
    """`over` laid on `base`: mappings key by key, everything else replaced.

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

    Changes of a `target` go first, outermost before inner, so that they never wipe out another override.
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
