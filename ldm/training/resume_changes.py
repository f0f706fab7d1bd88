"""What a resumed run may change, and the configuration that it resumes with.

What is written now is compared with what was written then. A reference stands for what it led to: where it is written
out now, or where a value is now a reference that leads to it, nothing has changed. (`${newest:...}` stands for any run
that its pattern matches; `${data:...}` for the data's own description then.)

A run resumes with the values that it ran with, so that a newer autoencoder or a longer `max_steps` changes nothing
elsewhere. Three things differ from that:

- a key that is changed has its new value;
- a reference that leads to a changed key, directly or through others, follows it; but what is bound to the run (model,
  data, seed, ...) follows only a change that is itself bound, and thus was allowed by name: a batch size that was
  changed reaches all that refers to it, a longer `max_steps` does not stretch a schedule;
- `${data:...}` is filled in anew where changes under `data` are allowed.
"""

import fnmatch
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.config.load import REFERENCE
from ldm.config.tree import Node, from_plain
from ldm.errors import ConfigError
from ldm.files import expanded

# A key is bound to the run when it is, or lies under, one of these; all others may change freely.
_BOUND = (
    *("seed", "randomness", "model", "data", "init_from"),
    *(
        "lightning.trainer.precision",
        "lightning.trainer.gradient_clip_val",
        "lightning.trainer.gradient_clip_algorithm",
    ),
    *("lightning.trainer.limit_train_batches", "lightning.trainer.overfit_batches"),
)
# Exceptions to the above: how the same batch is loaded and cut to pieces, and what is measured.
_FREE = ("data.params.num_workers", "data.params.micro_batch_size", "model.params.metrics")
# Of a converted model that nobody has trained yet, only what its weights were made for is bound. It has weights.
_CONVERTED = (
    "init_from",
    *(f"model.params.{name}" for name in ("encoder", "decoder", "quantizer", "network", "conditioner", "objective")),
    *(f"data.params.{name}" for name in ("autoencoder", "resolution", "statistics")),
)
# Chosen at a run's start, so that a resumed run keeps the choice.
_CHOSEN_AT_START = {"lightning.trainer.precision": "auto"}

Keys = tuple[str, ...]


@dataclass(frozen=True)
class Written:
    """A run's configuration then and now.

    Attributes:
        source: what was written then; the same as `filled` where that is not known.
        filled: what ran, with every reference filled in.
        wanted: what is written now.
        facts: the data's own description then, if known.
        is_trained: whether it has begun; a converted model has not.
    """

    source: Node
    filled: Node
    wanted: Node
    facts: Mapping[str, Any] | None = None
    is_trained: bool = True


def changes(written: Written) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (old, new)} of what is written differently now, and meant so."""
    ran, wanted = written.filled.plain(), written.wanted.plain()
    found = differences(written.source.plain(), wanted)
    same = _Meaning((ran, wanted), written.facts)
    return {
        key: change
        for key, change in found.items()
        if change[1] != _CHOSEN_AT_START.get(key, ...) and not same.of(change[1], at(ran, key.split(".")))
    }


def going_on(written: Written, changed: Mapping[str, Any], allowed: Sequence[str]) -> Node:
    """The configuration to resume with.

    Args:
        changed: by dotted key, as `changes` gives it.
        allowed: keys that may differ, by name.
    """
    tree = written.filled
    for key in changed:
        tree = _put(tree, tuple(key.split(".")), _find(written.wanted, key.split(".")))
    references = dict(_references(written.wanted, ()))
    follows = _Follows(references, changed, any(_under(name, "data") for name in allowed))
    for keys, text in references.items():
        old = _find(written.source, keys)
        ran = _find(written.filled, keys)
        if old is None or old.value != text.value or ran is None:
            # Not what was written then, so either a change, which is in its place, or a value that stays what it was.
            continue
        tree = _put(tree, keys, text if follows.at(keys) else ran)
    return tree


def refuse(changed: Mapping[str, tuple[Any, Any]], origin: Path, allowed: Sequence[str]) -> None:
    """Raises ConfigError, naming each, where a change is not allowed by name."""
    refused = {key: change for key, change in changed.items() if not any(_under(key, name) for name in allowed)}
    if refused:
        lines = [f"  {key}: the run has {brief(old)}, requested is {brief(new)}" for key, (old, new) in refused.items()]
        flags = " ".join(dict.fromkeys(f"--allow-change {key.split(' ')[0]}" for key in refused))
        raise ConfigError(
            f"{origin}: resuming with these changes would be another run:\n" + "\n".join(lines) + "\n"
            f"Start a new run, undo the changes, or accept them with {flags}."
        )


def differences(old: Any, new: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """{dotted key: (old, new)} of what differs; lists, and nodes of another target, are compared whole."""
    if not isinstance(old, dict) or not isinstance(new, dict) or old.get("target") != new.get("target"):
        return {} if old == new and type(old) is type(new) else {key: (old, new)}
    found: dict[str, tuple[Any, Any]] = {}
    for name in [*old, *(name for name in new if name not in old)]:
        found |= differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    return found


def bound(key: str, is_trained: bool = True) -> bool:
    """Whether a change of this key would make it another run; `is_trained` is False of a converted model at first."""
    names = _BOUND if is_trained else _CONVERTED
    return any(_under(key, name) or _under(name, key) for name in names) and not any(_under(key, n) for n in _FREE)


def brief(value: Any) -> str:
    """The value as JSON, cut to 60 characters, for a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def at(tree: Any, keys: Sequence[str]) -> Any:
    """The value in plain containers; None where there is none."""
    for name in keys:
        if isinstance(tree, list):
            tree = tree[int(name)] if name.isdecimal() and int(name) < len(tree) else None
        else:
            tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


class _Meaning:
    """Whether what is written may stand for a value.

    Args:
        trees: the configurations in which a reference to a key may be looked up.
        facts: of the data; None: any value may be one.
    """

    def __init__(self, trees: Sequence[Any], facts: Mapping[str, Any] | None) -> None:
        self._trees = trees
        self._facts = facts

    def of(self, text: Any, value: Any, depth: int = 0) -> bool:
        if isinstance(text, dict) and isinstance(value, dict):
            return text.keys() == value.keys() and all(self.of(text[name], value[name], depth) for name in text)
        if isinstance(text, list) and isinstance(value, list):
            return len(text) == len(value) and all(self.of(*pair, depth) for pair in zip(text, value, strict=True))
        if not isinstance(text, str) or "${" not in text:
            return type(text) is type(value) and expanded(text) == value
        if whole := REFERENCE.fullmatch(text):
            return self._reference(whole, value, depth)
        return isinstance(value, str) and re.fullmatch(self._pattern(text), value, re.DOTALL) is not None

    def _reference(self, match: re.Match[str], value: Any, depth: int) -> bool:
        if name := match["key"]:
            found = [at(tree, name.split(".")) for tree in self._trees]
            return depth < len(found) * 8 and any(self.of(one, value, depth + 1) for one in found)
        if match["resolver"] == "newest":
            return isinstance(value, str) and fnmatch.fnmatchcase(value, expanded(match["argument"]))
        return self._facts is None or self._facts.get(match["argument"], ...) == value

    def _pattern(self, text: str) -> str:
        """A regular expression of what a text with references inside may have become."""
        pattern, end = "", 0
        for match in REFERENCE.finditer(text):
            inside = ".*"
            if name := match["key"]:
                found = [str(at(tree, name.split("."))) for tree in self._trees]
                inside = "|".join(".*" if "${" in one else re.escape(one) for one in found)
            elif match["resolver"] == "newest":
                inside = fnmatch.translate(expanded(match["argument"])).removesuffix(r"\Z")
            elif self._facts is not None:
                inside = re.escape(str(self._facts.get(match["argument"])))
            pattern += f"{re.escape(text[end : match.start()])}(?:{inside})"
            end = match.end()
        return pattern + re.escape(text[end:])


class _Follows:
    """Which references lead to a change that they have to follow."""

    def __init__(self, references: Mapping[Keys, Node], changed: Mapping[str, Any], data: bool) -> None:
        self._references = references
        self._changed = changed
        self._data = data

    def at(self, keys: Keys) -> bool:
        """Of the reference at `keys`."""
        key = ".".join(keys)
        reached = [change for change in self._changed if self._leads(keys, change, set())]
        data = self._data and any(match["resolver"] == "data" for match in self._matches(keys))
        return data or any(bound(change) or not bound(key) for change in reached)

    def _matches(self, keys: Keys) -> list[re.Match[str]]:
        return [*REFERENCE.finditer(str(self._references[keys].value))]

    def _leads(self, keys: Keys, change: str, seen: set[Keys]) -> bool:
        if keys in seen:
            return False
        seen.add(keys)
        for match in self._matches(keys):
            name = match["key"]
            if name and (
                _meet(name, change)
                or any(_meet(name, ".".join(other)) and self._leads(other, change, seen) for other in self._references)
            ):
                return True
        return False


def _meet(key: str, other: str) -> bool:
    return _under(key, other) or _under(other, key)


def _under(key: str, name: str) -> bool:
    """True when `key` is `name` or lies below it."""
    return key == name or key.startswith((f"{name}.", f"{name} "))


def _references(node: Node, keys: Keys) -> Iterator[tuple[Keys, Node]]:
    """Every text that holds a reference, by the names and indices that lead to it."""
    if isinstance(node.value, str) and "${" in node.value:
        yield keys, node
    for name, child in node.children.items():
        yield from _references(child, (*keys, name))


def _find(node: Node | None, keys: Sequence[str]) -> Node | None:
    for name in keys:
        node = None if node is None else node.children.get(name)
    return node


def _put(node: Node, keys: Keys, value: Node | None) -> Node:
    """The tree with `value` at `keys`, mappings made where there are none."""
    if not keys:
        return value or from_plain(None, node.origin)
    name, rest = keys[0], keys[1:]
    child = node.children.get(name, Node({}, node.origin))
    if isinstance(node.value, list):
        items = list(node.value)
        items[int(name)] = _put(child, rest, value)
        return Node(items, node.origin)
    return Node({**node.children, name: _put(child, rest, value)}, node.origin)
