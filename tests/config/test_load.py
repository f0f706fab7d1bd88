"""A run's configuration as a whole: files and overrides in order, references, where each value comes from."""

import os
import pwd
from pathlib import Path

import pytest

from ldm.cli.options import path
from ldm.config.load import from_tree
from ldm.config.load import load as load_files
from ldm.errors import ConfigError
from ldm.run_folder import newest_run
from tests.config.house import BASE, load, model, write


def test_later_files_and_overrides_win_and_origins_follow(tmp_path: Path) -> None:
    first = write(tmp_path, BASE)
    second = write(tmp_path, "seed: 5\nmodel:\n  params:\n    text: new\n", "second.yaml")
    made = load_files([first, second], ["data.params.num_workers=2", "seed=6", "seed=7"])
    tree = made.resolved()
    assert tree["seed"] == 7
    assert tree["model"]["params"] | {"part": 0} == {"channels": 8, "part": 0, "text": "new"}
    assert tree["data"]["params"] == {"batch_size": 16, "num_workers": 2}
    assert made.origin("seed") == "command line: seed=7"
    assert made.origin("model.params.text") == f"{second}:4"
    assert made.origin("model.params.part.params.size") == f"{first}:9"


def test_references_keep_types_and_fill_text(tmp_path: Path) -> None:
    lines = ["pair: ['${seed}', '${data.params.batch_size}']", "text: ${name}-${seed}", "table: ${data.params}"]
    made = load(tmp_path, BASE.replace(*model(*lines, "later: ${data:n}", "on: ${data:flag}")))
    params = made.resolved()["model"]["params"]
    assert params["pair"] == [23, 16]
    assert params["text"] == "house-23"
    assert params["table"] == {"batch_size": 16}
    assert params["later"] == "${data:n}"
    filled = made.resolved({"n": 5, "flag": True, "more": "x"})["model"]["params"]
    assert (filled["later"], filled["on"]) == (5, True)
    assert made.resolved()["model"]["params"]["later"] == "${data:n}"
    with pytest.raises(ConfigError, match=r"model.params.on \(.*yaml:11\).*no fact 'flag'; did you mean 'flags'"):
        made.resolved({"n": 5, "flags": True})


def test_a_reference_through_another_reference_is_followed(tmp_path: Path) -> None:
    made = load(tmp_path, BASE.replace("name: house", "name: x${model.params.text}").replace(*model("text: ${seed}")))
    assert made.resolved()["name"] == "x23"


def test_newest_run_goes_by_the_time_in_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [
        "2026-01-02T10-00-00_kl",
        "2026-01-10T09-00-00_kl",
        "2026-01-09T23-59-59_kl",
        "zzz_kl",
        "2027-01-01T00-00-00_no",
    ]
    for run in runs:
        (tmp_path / "logs" / run).mkdir(parents=True)
    (tmp_path / "logs" / "2028-01-01T00-00-00_kl").write_text("a file")
    made = load(tmp_path, BASE.replace(*model("path: ${newest:logs/*_kl}")))
    assert made.resolved()["model"]["params"]["path"] == "logs/2026-01-10T09-00-00_kl"
    (tmp_path / "logs" / "2026-02-01T00-00-00_kl").mkdir()
    assert made.resolved()["model"]["params"]["path"] == "logs/2026-01-10T09-00-00_kl"  # one Config, one run
    assert newest_run(str(tmp_path / "logs" / "*_kl")) == str(tmp_path / "logs" / "2026-02-01T00-00-00_kl")


def test_a_tree_from_elsewhere_is_plain_or_refused() -> None:
    tree = {"a": [1, 2.0, {"b": None}], "c": "x"}
    made = from_tree(tree, "last.ckpt")
    assert made.resolved() == tree
    assert made.resolved() is not tree
    assert made.origin("a.2.b") == "last.ckpt"
    with pytest.raises(ConfigError, match=r"last.ckpt: a.0: expected .*found PosixPath"):
        from_tree({"a": [Path("x")]}, "last.ckpt")


def test_no_resolver_of_omegaconf_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    secret = "${oc.env:SECRET}"
    for text in (secret, "x ${oc.env:SECRET}", "${oc.env:${a}}", "\\${oc.env:SECRET}", "${.a}", "${a[0]}", "${${a}}"):
        with pytest.raises(ConfigError, match=r"^b \(file\): .*expected \$\{a.b\}"):
            from_tree({"a": [1], "b": text}, "file").resolved()
    # Neither through what the data says of itself nor by putting an expression together.
    tree = {"a": "$", "b": "${a}{oc.env:SECRET}", "c": {"d": "${b}"}, "e": "${c}", "f": "${data:n}", "g": "x${f}"}
    made = from_tree(tree, "file").resolved({"n": secret})
    assert made == {"a": "$", "b": secret, "c": {"d": secret}, "e": {"d": secret}, "f": secret, "g": f"x{secret}"}
    assert type(made["e"]) is dict


def test_backslashes_stay_as_they_are() -> None:
    tree = {"n": 3, "a": r"c:\d\${n}\ ", "b": r"\\${n}${data:m}", "c": r"\${data:m}", "d": r"\n"}
    made = from_tree(tree, "file")
    assert made.resolved() == {"n": 3, "a": r"c:\d\3\ ", "b": r"\\3${data:m}", "c": r"\${data:m}", "d": r"\n"}
    assert made.resolved({"m": 4})["c"] == r"\4"


def test_home_is_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for run in ("2026-01-02T10-00-00_kl", "2026-01-03T10-00-00_kl"):
        (tmp_path / "logs" / run).mkdir(parents=True)
    tree = {"root": "~/data", "list": ["~/a", {"b": "${root}/b"}], "home": "~", "run": "${newest:~/logs/*_kl}/x"}
    untouched = {"text": "a ~/b", "user": "~no-such-user/x", "n": 1}
    made = from_tree(tree | untouched, "file").resolved()
    newest = f"{tmp_path}/logs/2026-01-03T10-00-00_kl/x"
    filled = {"root": f"{tmp_path}/data", "list": [f"{tmp_path}/a", {"b": f"{tmp_path}/data/b"}], "run": newest}
    assert made == filled | {"home": str(tmp_path)} | untouched
    # As a flag has it: another user's home, too.
    user = pwd.getpwuid(os.getuid())
    assert from_tree({"root": f"~{user.pw_name}/data"}, "file").resolved() == {
        "root": str(path(f"~{user.pw_name}/data"))
    }
    assert str(path(f"~{user.pw_name}/data")) == f"{user.pw_dir}/data"
    # What was resolved stays where it was, whoever resumes it.
    monkeypatch.setenv("HOME", "/elsewhere")
    assert from_tree(made, "file").resolved() == made


def test_a_start_that_was_killed_has_left_no_run(tmp_path: Path) -> None:
    (tmp_path / "2026-01-02T10-00-00_kl" / "configs").mkdir(parents=True)
    (tmp_path / "2026-01-02T10-00-00_kl" / "configs" / "config.yaml").touch()
    (tmp_path / "2026-01-03T10-00-00_kl" / "configs").mkdir(parents=True)
    (tmp_path / "2026-01-03T10-00-00_kl" / "checkpoints").mkdir()
    assert newest_run(str(tmp_path / "*_kl")) == str(tmp_path / "2026-01-02T10-00-00_kl")
