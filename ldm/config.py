"""The configuration of a run: YAML files and overrides, merged, checked, resolved and built. The only reader of YAML.

    name: emoji_autoencoder
    seed: 23
    model: {target: ldm.autoencoder.module.AutoencoderKL, params: {...}}
    data: {target: ldm.data.datamodules.ImageDataModule, params: {seed: "${seed}", ...}}
    lightning: {trainer: {max_steps: 1000}, logger: ..., callbacks: ..., strategy: ...}

Every object is a node `{target: dotted.Class, params: {...}}`; `partial: true` makes it a factory with some
arguments filled in. A fact is stated once and referred to: `${a.b}` is another key, `${data:channels}` what the
data says about itself, `${newest:logs/*_name}` the newest run folder that matches.

    config = load([Path("a.yaml")], ["data.params.batch_size=64"])
    config.check()                                        # before anything is built
    data = build(config.resolved()["data"], config.trust)
    model = build(config.resolved(data.facts())["model"], config.trust)
"""

import re
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from ldm import config_check
from ldm.config_read import Node, apply, dotted, from_plain, merge, nearest, read, show, to_yaml
from ldm.config_target import build
from ldm.errors import ConfigError

__all__ = ["Config", "build", "from_tree", "load", "to_yaml"]


def load(files: Sequence[Path], overrides: Sequence[str] = (), trust: Sequence[str] = ()) -> "Config":
    """Merge YAML files from left to right, then `a.b=value` overrides.

    Raises:
        ConfigError: a file is missing or not a YAML mapping, or an override is malformed; names file and line.
    """
    root = reduce(merge, [read(Path(file)) for file in files], Node({}, "command line"))
    return Config(apply(root, overrides), trust)


def from_tree(tree: Mapping[str, Any], origin: str, trust: Sequence[str] = ()) -> "Config":
    """A configuration that is already plain containers, e.g. out of a checkpoint; messages name `origin`."""
    return Config(from_plain(dict(tree), origin), trust)


class Config:
    """A merged configuration whose every value knows where it was written."""

    def __init__(self, root: Node, trust: Sequence[str] = ()) -> None:
        self.root = root
        self.trust = tuple(trust)
        # A new run may appear at any time; one Config always means the same one.
        self._newest: dict[str, str] = {}

    def origin(self, key: str) -> str:
        """Where a dotted key was written: `file:line` or `command line: a.b=1`."""
        return _find(self.root, key).origin

    def check(self, facts: Mapping[str, object] | None = None) -> None:
        """Everything that can be known before anything is built.

        Args:
            facts: the data's facts, once they are known: then the values they fill in are checked too.

        Raises:
            ConfigError: one message with every problem: dotted key, file and line, expected, found, nearest name.
        """
        tree, problems = self._interpolate(facts)
        problems += config_check.names(tree, self.trust)
        # First what the sources tell in a moment; the imports behind the full look take seconds.
        config_check.raise_all(problems + config_check.parameters(tree, config_check.quick_look_up(self.trust)))
        config_check.raise_all(config_check.parameters(tree, config_check.full_look_up(self.trust)))

    def resolved(self, facts: Mapping[str, object] | None = None) -> dict[str, Any]:
        """The tree as plain containers with every `${...}` replaced.

        Args:
            facts: what `${data:...}` stands for; None leaves these as they are.

        Raises:
            ConfigError: something refers to a key, fact or run that does not exist.
        """
        tree, problems = self._interpolate(facts)
        config_check.raise_all(problems)
        plain: dict[str, Any] = tree.plain()
        return plain

    def _interpolate(self, facts: Mapping[str, object] | None) -> tuple[Node, list[str]]:
        work = _Interpolation(self.root, facts, self._newest)
        return work.node(self.root, ""), work.problems


# ---- ${...} ---------------------------------------------------------------------------------------------------

_EXPRESSION = re.compile(r"\$\{([^${}]*)\}")


class _Interpolation:
    """One pass over the tree; collects problems instead of stopping at the first."""

    def __init__(self, root: Node, facts: Mapping[str, object] | None, newest: dict[str, str]) -> None:
        self.root = root
        self.facts = facts
        self.newest = newest
        self.problems: list[str] = []
        self.chain: list[str] = []  # the keys whose values are being looked up, to find circles

    def node(self, node: Node, key: str) -> Node:
        if isinstance(node.value, dict):
            return Node({name: self.node(child, dotted(key, name)) for name, child in node.value.items()}, node.origin)
        if isinstance(node.value, list):
            return Node([self.node(child, dotted(key, i)) for i, child in enumerate(node.value)], node.origin)
        if not isinstance(node.value, str) or "${" not in node.value:
            return node
        try:
            return Node(self._text(node.value, key), node.origin)
        except ConfigError as error:
            # A key that is referred to is visited more than once.
            if (problem := f"{key} ({node.origin}): '{node.value}': {error}") not in self.problems:
                self.problems.append(problem)
            return Node("${data:}", node.origin)  # like a fact not known yet: nothing more is said about it

    def _text(self, text: str, key: str) -> Any:
        if "${" in _EXPRESSION.sub("", text):
            raise ConfigError("expected ${a.b}, ${data:fact} or ${newest:glob}, not nested and with its closing }")
        if whole := _EXPRESSION.fullmatch(text):
            return self._value(whole[1].strip(), key).value
        pieces = []
        for match in _EXPRESSION.finditer(text):
            piece = self._value(match[1].strip(), key)
            if isinstance(piece.value, dict | list):
                raise ConfigError(f"{match[0]} is {show(piece)}, which cannot stand inside a text")
            pieces.append(str(piece.value))
        return _EXPRESSION.sub(lambda _: pieces.pop(0), text)

    def _value(self, expression: str, key: str) -> Node:
        resolver, colon, argument = expression.partition(":")
        if not colon:
            return self._reference(expression)
        if resolver == "data":
            return self._fact(argument, key)
        if resolver == "newest":
            if argument not in self.newest:
                self.newest[argument] = newest_run(argument)
            return Node(self.newest[argument], "")
        raise ConfigError(
            f"'{resolver}:' is refused (a configuration is saved and logged, so it takes no secrets from the "
            "environment); expected ${a.b}, ${data:fact} or ${newest:glob}"
        )

    def _reference(self, other: str) -> Node:
        if other in self.chain:
            raise ConfigError(f"refers to itself: {' -> '.join([*self.chain, other])}")
        self.chain.append(other)
        try:
            found = _find(self.root, other)
            count = len(self.problems)
            value = self.node(found, other)
            if len(self.problems) > count:
                raise ConfigError(f"{other} ({found.origin}) cannot be resolved")
            return value
        finally:
            self.chain.pop()

    def _fact(self, name: str, key: str) -> Node:
        if key.split(".")[0] == "data" or any(other.split(".")[0] == "data" for other in self.chain):
            raise ConfigError("the data cannot refer to its own facts; write the value here")
        if self.facts is None:
            return Node(f"${{data:{name}}}", "")
        if name not in self.facts:
            raise ConfigError(f"the data states no fact '{name}'; {nearest(name, self.facts)}")
        return from_plain(self.facts[name], "the data's facts", name)


def _find(root: Node, key: str) -> Node:
    node, seen = root, ""
    for name in key.split("."):
        children: dict[str, Node] = {}
        if isinstance(node.value, dict):
            children = node.value
        elif isinstance(node.value, list):
            children = {str(i): child for i, child in enumerate(node.value)}
        if name not in children:
            raise ConfigError(f"there is no key '{dotted(seen, name)}'; {nearest(name, children)}")
        node, seen = children[name], dotted(seen, name)
    return node


def newest_run(pattern: str) -> str:
    """The folder `<time>_<name>` with the latest time among those that match a glob such as `logs/*_emoji`.

    The time is read from the name: copying or touching a folder changes nothing. ConfigError if there is none.
    """
    path = Path(pattern)
    base = Path(path.anchor) if path.is_absolute() else Path()
    runs = []
    for folder in base.glob(str(path.relative_to(base))) if pattern.strip() else ():
        time = re.match(r"\d{4}-?\d{2}-?\d{2}[^_]*(?=_)", folder.name)
        if time and folder.is_dir():
            runs.append((re.sub(r"\D", "", time[0]), folder.name, str(folder)))
    if not runs:
        name = path.name.lstrip("*_") or "that name"
        raise ConfigError(
            f"no run folder <time>_<name> matches '{pattern}' (looked in {base.absolute()}); train '{name}' first: "
            f"python main.py --base <the configuration named {name}>, or write the path of a run here"
        )
    return max(runs)[2]
