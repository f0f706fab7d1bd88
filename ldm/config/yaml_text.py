"""Reads YAML text into a tree, and writes it.

The dialect is YAML 1.2's core schema without its traps: `1e-4` is a number, dates are text, and what the
two versions of YAML read differently (`012`, `yes`, `off`) is refused. Aliases, tags and duplicate keys are errors.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import yaml

from ldm.config.tree import Node, Scalar, current, dotted, nearest, show
from ldm.errors import ConfigError

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
        # Surrogates: how Python represents bytes of a command line that are not UTF-8.
        super().check_printable(re.sub("[\udc80-\udcff]", "?", data))

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(
                problem="an alias (*name); write ${a.b} to refer to another key, or quote the text", problem_mark=mark
            )
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    # The loader's rules decide which texts need quotes.
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # YAML folds Unicode's line ends into a space unless they are escaped.
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
    """The document as a Node, with current names; None if it is empty.

    Args:
        name: the file, or `command line: a.b=1`.
        numbered: whether origins are `name:line` or `name` alone.

    Raises:
        ConfigError: it is not valid; names `name` and the line.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
        return None if root is None else current(_convert(root, name, numbered, ""))
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
