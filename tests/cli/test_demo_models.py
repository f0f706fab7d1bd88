"""What the page of `ldm demo` knows of its runs."""

import pytest

from ldm.cli import demo_models
from ldm.cli.demo_models import named, prompts


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ({"prompts": ["red heart", "pizza"]}, ["red heart", "pizza"]),
        ({"conditions": [{"caption": "a cat", "class_label": 1}, {"class_label": 2}]}, ["a cat"]),
        ({"prompts": None, "conditions": None}, []),
        (None, []),
    ],
)
def test_examples_are_the_captions_of_the_previews(monkeypatch, images, expected):
    config = {"lightning": {"callbacks": {"images": {"params": images}}}}
    monkeypatch.setattr(demo_models.store, "record", lambda path: {"config": config})
    assert prompts("step=1.ckpt") == expected
    monkeypatch.setattr(demo_models.store, "record", lambda path: {})
    assert prompts("step=1.ckpt") == []


def test_runs_of_one_name_are_told_apart_by_their_paths():
    assert named(["logs/a", "logs/b", "logs/a"]) == {"a": "logs/a", "b": "logs/b"}
    assert named(["one/a", "two/a", "b/"]) == {"one/a": "one/a", "two/a": "two/a", "b": "b/"}
