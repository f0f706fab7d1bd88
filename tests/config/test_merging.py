"""Files laid on one another, overrides, and what their values mean."""

import functools
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings

from ldm.config.merging import apply, merge
from ldm.config.tree import Node, dotted, from_plain
from ldm.config.yaml_text import parse, to_yaml
from ldm.errors import ConfigError
from tests.config.trees import TREES


@pytest.mark.parametrize("override", ["seed", "=1", "a b=1", "a..b=1", ".a=1", "a.=1", "seed=[1", "seed=1: 2: 3"])
def test_a_malformed_override_is_named(override: str) -> None:
    with pytest.raises(ConfigError, match=rf"command line: {re.escape(override)}"):
        apply(Node({}, ""), [override])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E+3", 1000.0),
        (".5", 0.5),
        ("-3", -3),
        ("1_000", 1000),
        ("0x10", 16),
        ("true", True),
        ("null", None),
        ("", None),
        ("~", None),
        ("[1, {a: b}]", [1, {"a": "b"}]),
        ("2026-01-01", "2026-01-01"),
        ("00:12:00:00", "00:12:00:00"),
        ("'012'", "012"),
        ("a=b", "a=b"),
        (".inf", float("inf")),
    ],
)
def test_values_are_read_as_people_mean_them(text: str, value: Any) -> None:
    got = apply(Node({}, ""), [f"a.x={text}"]).plain()["a"]["x"]
    assert got == value
    assert type(got) is type(value)


def test_another_target_drops_the_parameters_of_the_first() -> None:
    base = tree("a: 1\nb: {target: x.A, params: {size: 3}, partial: true}")
    assert merge(base, tree("b: {target: x.B}")).plain() == {"a": 1, "b": {"target": "x.B"}}
    assert merge(base, tree("b: {target: x.A, params: {n: 1}}")).plain()["b"]["params"] == {"size": 3, "n": 1}
    assert apply(base, ["b.target=x.A"]).plain() == base.plain()
    # In any order: the new target does not wipe out what the same command line says.
    overrides = ["b.params.c.params.n=1", "b.params.c.target=x.C", "b.target=x.B"]
    for order in (overrides, overrides[::-1], [overrides[1], overrides[2], overrides[0]]):
        wanted = {"target": "x.B", "params": {"c": {"target": "x.C", "params": {"n": 1}}}}
        assert apply(base, order).plain()["b"] == wanted


def test_overrides_reach_into_lists() -> None:
    base = tree("parts: [{target: x.A}, {target: x.B, params: {n: 1}}]")
    made = apply(base, ["parts.1.params.size=4", "parts.0=null"])
    assert made.plain() == {"parts": [None, {"target": "x.B", "params": {"n": 1, "size": 4}}]}
    for index in ("2", "-1", "x"):
        with pytest.raises(ConfigError, match=rf"parts.{index} \(command line.*index from 0 to 1, found '{index}'"):
            apply(base, [f"parts.{index}.params.size=4"])


def tree(text: str) -> Node:
    node = parse(text, "base.yaml")
    assert node is not None
    return node


@settings(deadline=None, max_examples=25)
@given(TREES, TREES, TREES)
def test_merging_is_associative_and_the_last_word_counts(
    a: dict[str, Any], b: dict[str, Any], c: dict[str, Any]
) -> None:
    one, two, three = (from_plain(tree, name) for tree, name in ((a, "a"), (b, "b"), (c, "c")))
    merged = merge(merge(one, two), three)
    assert merged.plain() == merge(one, merge(two, three)).plain()
    assert merge(merged, three).plain() == merged.plain()
    assert merge(three, from_plain({}, "")).plain() == c
    for key, value in _leaves(c):
        assert functools.reduce(lambda tree, name: tree[name], key.split("."), merged.plain()) == value


@settings(deadline=None, max_examples=25)
@given(TREES)
def test_a_tree_can_be_given_leaf_by_leaf(tree: dict[str, Any]) -> None:
    overrides = [f"{key}={to_yaml([value]).strip()[2:]}" for key, value in _leaves(tree)]
    root = apply(Node({}, ""), overrides)
    assert list(_leaves(root.plain())) == list(_leaves(tree))


def _leaves(tree: dict[str, Any], key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of scalars (lists are left out: YAML writes them over several lines)."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, dotted(key, name))
        elif not isinstance(value, list):
            yield dotted(key, name), value


def test_bytes_of_a_path_that_are_not_utf8_pass_through_an_override_and_back():
    path = os.fsdecode(b"/x/caf\xe9")
    for written in (path, f"'{path}'", f'"{path}"'):
        root = apply(Node({}, "test"), [f"data.root={written}"])
        assert root.plain() == {"data": {"root": path}}
        again = parse(to_yaml(root.plain()), "again")
        assert again is not None
        assert again.plain() == root.plain()
    with pytest.raises(ConfigError, match="special characters"):
        apply(Node({}, "test"), ["a=\x01"])
