"""Reading and writing: YAML without its traps."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from ldm.config.yaml_text import parse, read, to_yaml
from ldm.errors import ConfigError
from tests.config.trees import TREES


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", (":1", "empty")),
        (b"# nothing\n", (":1", "empty")),
        (b"- a\n- b\n", (":1", "expected a mapping", "a list of 2")),
        (b"just text\n", (":1", "expected a mapping", "'just text'")),
        (b"\x89PNG\xff\xfe", ("not a YAML file",)),
        (b"a: 1\n---\nb: 2\n", (":2", "single document")),
        (b"a: \x00\n", ("not valid YAML", "not allowed")),
        (b"a: " + b"[" * 600, ("nested too deeply",)),
    ],
)
def test_a_file_that_is_no_configuration_is_named(content: bytes, words: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read(path)
    for part in (str(path), *words):
        assert part in str(caught.value)


def test_a_missing_file_is_named_with_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "kl_f8.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"kl_f9.yaml: no such file; did you mean '.*kl_f8.yaml'"):
        read(tmp_path / "kl_f9.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path)


def test_a_bomb_of_aliases_is_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(ConfigError, match=r"base.yaml:2: .*alias"):
        parse("\n".join(lines), "base.yaml")


@settings(deadline=None, max_examples=25)
@given(TREES)
def test_yaml_comes_back_as_it_was(tree: dict[str, Any]) -> None:
    node = parse(to_yaml(tree), "file")
    assert node is not None
    assert node.plain() == tree
    assert repr(node.plain()) == repr(tree)  # 1, 1.0 and True are equal only to Python
