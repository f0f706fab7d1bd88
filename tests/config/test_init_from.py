"""The section `init_from`: a run, or a mapping with near names and types like every other part of a configuration."""

import pytest

from ldm.config.init_from import InitFrom, parsed
from ldm.config.load import from_tree
from ldm.errors import ConfigError


def check(section):
    optimizer = {"target": "torch.optim.Adam", "partial": True, "params": {"lr": 1e-3}}
    tree = {"seed": 1, "model": optimizer, "data": optimizer, "init_from": section}
    from_tree(tree, "run.yaml").check()


@pytest.mark.parametrize(
    "section",
    [
        None,
        "logs/a",
        {"run": "logs/a"},
        {"run": "a", "parts": ["x.y"], "strict": False, "average": False, "resize": []},
    ],
)
def test_what_may_be_written(section):
    check(section)
    found = parsed(section)
    assert (found is None) == (section is None)
    assert isinstance(found, InitFrom | None)


@pytest.mark.parametrize(
    ("section", "text"),
    [
        (3, "expected a run, or a mapping with 'run', found int 3"),
        ({"run": 3}, "init_from.run .*: expected str, found int 3"),
        ({"run": "a", "resise": ["classes"]}, "has no parameter 'resise'; did you mean 'resize'"),
        (
            {"run": "a", "resize": ["sizes"]},
            "init_from.resize.0 .*: expected one of 'classes', 'channels', 'resolution'",
        ),
        ({"strict": False}, "init_from.run .*: missing"),
    ],
)
def test_what_is_refused(section, text):
    with pytest.raises(ConfigError, match=text):
        check(section)


def test_references_are_filled_in():
    assert from_tree({"name": "x", "init_from": "logs/${name}"}, "run.yaml").resolved()["init_from"] == "logs/x"
