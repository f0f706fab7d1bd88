from pathlib import Path

import pytest

from ldm.cli.options import parse
from ldm.errors import ConfigError

LINES = [
    ["--base", "x.yaml", "a.b=1", "c=2"],
    ["a.b=1", "--base", "x.yaml", "c=2"],
    ["a.b=1", "c=2", "-b", "x.yaml"],
    ["a.b=1", "-d", "c=2", "--base", "x.yaml"],
    ["-t", "a.b=1", "-b", "x.yaml", "c=2"],
]


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_overrides_stand_anywhere(line):
    options = parse(line)
    assert options.base == (Path("x.yaml"),)
    assert options.overrides == ("a.b=1", "c=2")
    assert options.train


def test_several_files_in_order():
    assert parse(["-b", "x.yaml", "y.yaml", "k=v", "--base", "z.yaml"]).base == tuple(
        Path(name) for name in ("x.yaml", "y.yaml", "z.yaml")
    )


def test_the_seed_flag_wins():
    assert parse(["-b", "x.yaml", "-s", "3", "seed=1"]).overrides[-1] == "seed=3"


@pytest.mark.parametrize(
    ("words", "train"), [(["-t"], True), (["-t", "false"], False), (["--no-train"], False), (["--train=no"], False)]
)
def test_train_switch(words, train):
    assert parse(["-b", "x.yaml", *words]).train is train


def test_values_with_equals_signs_and_lists():
    assert parse(["-b", "x.yaml", "a.0.b=[1, 2]", "url=s3://a?b=c"]).overrides == ("a.0.b=[1, 2]", "url=s3://a?b=c")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--bose", "x.yaml"], ["--bose", "--base"]),
        (["-b", "x.yaml", "--dryrun"], ["--dry-run"]),
        (["-b", "x.yaml", "--resme=auto"], ["--resme", "--resume"]),
        (["x.yaml"], ["x.yaml", "--base"]),
        (["-b", "x.yaml", "-s", "one"], ["one", "int"]),
        (["-b", "x.yaml", "--name", "lr=1e-4"], ["--name lr=1e-4", "write --name=lr=1e-4"]),
        (["-b", "x.yaml", "-f", "bs=64", "a=1"], ["write --postfix=bs=64"]),
        (["-b", "x.yaml", "-t", "maybe"], ["maybe"]),
        ([], ["--base"]),
        (["a=1"], ["--base"]),
        (["-b"], ["--base"]),
    ],
)
def test_mistakes_are_named(line, words):
    with pytest.raises(ConfigError) as caught:
        parse(line)
    for word in words:
        assert word in str(caught.value)


def test_home_is_known_where_the_shell_left_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    options = parse(["--base", "~/x.yaml", "--logdir=~/logs", "--resume=~/logs/run"])
    assert options.base == (Path("/home/me/x.yaml"),)
    assert options.logdir == Path("/home/me/logs")
    assert options.resume == "/home/me/logs/run"


def test_a_name_may_have_an_equals_sign():
    options = parse(["-b", "x.yaml", "--name=lr=1e-4", "a=1"])
    assert (options.name, options.overrides) == ("lr=1e-4", ("a=1",))
