"""The configuration of a run: YAML files and overrides, merged, checked, resolved and built. The only reader of YAML.

    name: emoji_autoencoder
    seed: 23
    model: {target: ldm.autoencoder.module.AutoencoderKL, params: {...}}
    data: {target: ldm.data.datamodule.ImageDataModule, params: {seed: "${seed}", ...}}
    lightning: {trainer: {max_steps: 1000}, logger: ..., callbacks: ..., strategy: ...}

Every object is a node `{target: dotted.Class, params: {...}}`; `partial: true` makes it a factory with some
arguments filled in. A fact is stated once and referred to: `${a.b}` is another key, `${data:channels}` what the
data says about itself, `${newest:logs/*_name}` the newest run folder that matches. OmegaConf looks up the keys, and
sees nothing else: none of its resolvers can be reached, and what the data says of itself is never read as `${...}`.
A text that begins with `~/` is a path in the home folder, and resolved as one.

    config = load([Path("a.yaml")], ["data.params.batch_size=64"])
    config.check()                                        # before anything is built
    data = build(config.resolved()["data"], config.trust)
    model = build(config.resolved(data.facts())["model"], config.trust)
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.config import check
from ldm.config.merging import apply, merge
from ldm.config.targets import build
from ldm.config.tree import Node, dotted, from_plain, nearest
from ldm.config.yaml_text import read, to_yaml
from ldm.errors import ConfigError
from ldm.files import expanded
from ldm.run_folder import newest_run
from ldm.runtime import imports

__all__ = ["Config", "build", "from_tree", "load", "to_yaml"]

# The names and indices that lead to a value.
Keys = tuple[str | int, ...]


def load(files: Sequence[Path], overrides: Sequence[str] = (), trust: Sequence[str] = ()) -> "Config":
    """Merge YAML files from left to right, then `a.b=value` overrides.

    Raises:
        ConfigError: a file is missing or not a YAML mapping, or an override is malformed; names file and line.
    """
    root = reduce(merge, [read(Path(file)) for file in files], Node({}, "command line"))
    return Config(apply(root, overrides), trust)


def from_tree(tree: Mapping[str, Any], origin: str, trust: Sequence[str] = ()) -> "Config":
    """A configuration from plain containers, such as those in a checkpoint; messages name `origin`."""
    return Config(from_plain(dict(tree), origin), trust)


class Config:
    """A merged configuration that knows where each of its values was written."""

    def __init__(self, root: Node, trust: Sequence[str] = ()) -> None:
        self.root = root
        self.trust = tuple(trust)
        # A new run may appear at any time; one Config always means the same one.
        self._newest: dict[str, str] = {}

    def origin(self, key: str) -> str:
        """Where a dotted key was written: `file:line` or `command line: a.b=1`."""
        return _find(self.root, key).origin

    def check(self, facts: Mapping[str, object] | None = None) -> None:
        """Check everything that can be checked before anything is built.

        Args:
            facts: the data's facts, once they are known; the values they fill in are then checked as well.

        Raises:
            ConfigError: one message with every problem: dotted key, file and line, expected, found, nearest name.
        """
        tree, problems = self._interpolate(facts)
        problems += check.names(tree, self.trust)
        # First against the sources, which takes a moment; the imports of the full check take seconds.
        check.raise_all(problems + check.parameters(tree, check.quick_look_up(self.trust)))
        with imports.uncollected():
            check.raise_all(check.parameters(tree, check.full_look_up(self.trust)))

    def resolved(self, facts: Mapping[str, object] | None = None) -> dict[str, Any]:
        """The tree as plain containers with every `${...}` replaced.

        Args:
            facts: what `${data:...}` stands for; None leaves these as they are.

        Raises:
            ConfigError: something refers to a key, fact or run that does not exist.
        """
        tree, problems = self._interpolate(facts)
        check.raise_all(problems)
        plain: dict[str, Any] = tree.plain()
        return plain

    def _interpolate(self, facts: Mapping[str, object] | None) -> tuple[Node, list[str]]:
        problems: list[str] = []

        def each(root: Node, change: Callable[[str, Keys], Any]) -> Node:
            def safely(node: Node, keys: Keys) -> Node:
                key = dotted(*keys)
                try:
                    return from_plain(change(str(node.value), keys), node.origin, key)
                except ConfigError as error:
                    problems.append(f"{key} ({node.origin}): {error}")
                    return Node("\\${data:}", node.origin)  # like a fact not known yet: nothing more is said about it

            return _change_texts(root, safely)

        root = each(self.root, lambda text, keys: _escape(text))
        tree = OmegaConf.create(root.plain())
        root = each(root, lambda text, keys: self._look_up(tree, text, keys))
        return _at_home(each(root, lambda text, keys: self._fill(text, keys, facts))), problems

    def _look_up(self, tree: DictConfig, text: str, keys: Keys) -> Any:
        """What OmegaConf makes of the escaped `text` that stands at `keys`."""
        others = [match["key"] for match in REFERENCE.finditer(text) if match["key"]]
        try:
            value = reduce(getitem, keys, tree)
            if not REFERENCE.fullmatch(text):
                for other in others:
                    _as_text(OmegaConf.select(tree, other), other)
            return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except RecursionError as error:
            raise ConfigError(f"'{text}' refers to itself") from error
        except OmegaConfBaseException as error:
            for other in others:
                _find(self.root, other)  # knows the nearest name
            raise ConfigError(f"'{text}': {str(error).splitlines()[0]}") from error

    def _fill(self, text: str, keys: Keys, facts: Mapping[str, object] | None) -> Any:
        """`text` with its facts (if they are known) and runs."""

        def value(match: re.Match[str]) -> Any:
            name = match["argument"]
            if match["resolver"] == "newest":
                if name not in self._newest:
                    self._newest[name] = newest_run(name)
                return self._newest[name]
            if keys[0] == "data":
                raise ConfigError("the data cannot refer to its own facts; write the value here")
            if facts is None:
                return match[0]
            if name not in facts:
                raise ConfigError(f"the data states no fact '{name}'; {nearest(name, facts)}")
            return facts[name]

        if whole := REFERENCE.fullmatch(text):
            return value(whole)
        return REFERENCE.sub(lambda match: _as_text(value(match), match["argument"]), text)


def _change_texts(node: Node, change: Callable[[Node, Keys], Node], keys: Keys = ()) -> Node:
    """The tree with `change(text, its keys)` in place of each text that holds a `${`."""
    if isinstance(node.value, dict):
        return Node({name: _change_texts(of, change, (*keys, name)) for name, of in node.value.items()}, node.origin)
    if isinstance(node.value, list):
        return Node([_change_texts(of, change, (*keys, i)) for i, of in enumerate(node.value)], node.origin)
    return change(node, keys) if isinstance(node.value, str) and "${" in node.value else node


def _at_home(node: Node) -> Node:
    """The tree with every text that begins with `~/` made a path from the root on."""
    if isinstance(node.value, dict):
        return Node({name: _at_home(of) for name, of in node.value.items()}, node.origin)
    if isinstance(node.value, list):
        return Node([_at_home(of) for of in node.value], node.origin)
    return Node(expanded(node.value), node.origin) if isinstance(node.value, str) else node


REFERENCE = re.compile(r"\$\{\s*((?P<key>[\w-]+(\.[\w-]+)*)|(?P<resolver>data|newest):(?P<argument>[^${}]+?))\s*\}")
"""`${a.b}`, `${data:fact}` or `${newest:glob}`; nothing else is allowed."""


def _escape(text: str) -> str:
    """`text` as OmegaConf shall see it: only the references to keys are left for it to resolve."""
    if "${" in (rest := REFERENCE.sub("", text)):
        other = re.search(r"\$\{\s*(?!data:|newest:)([\w.]*:)", rest)
        why = "a configuration is saved and logged, so it takes no secrets from the environment"
        refused = f"'{other[1]}' is refused ({why}); " if other else ""
        allowed = "${a.b}, ${data:fact} or ${newest:glob}, not nested and with its closing }"
        raise ConfigError(f"'{text}': {refused}expected {allowed}")
    # A backslash before ${ escapes it, and so is doubled itself.
    return re.sub(rf"(\\*)({REFERENCE.pattern})", lambda m: m[1] * 2 + ("\\" if m["resolver"] else "") + m[2], text)


def _as_text(value: object, name: str) -> str:
    if isinstance(value, dict | list | tuple) or OmegaConf.is_config(value):
        raise ConfigError(f"'{name}' is a mapping or list, which cannot stand inside a text")
    return str(value)


def _find(root: Node, key: str) -> Node:
    node, seen = root, ""
    for name in key.split("."):
        if name not in node.children:
            raise ConfigError(f"there is no key '{dotted(seen, name)}'; {nearest(name, node.children)}")
        node, seen = node.children[name], dotted(seen, name)
    return node
