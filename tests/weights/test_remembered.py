"""Hashes that are remembered while files are unchanged."""

import os

import pytest

from ldm.weights import remembered as module
from ldm.weights.remembered import remembered


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "_SETTLED", -(10**12))  # files of this moment are old enough
    (tmp_path / "weights").mkdir()
    for name in ("a", "b"):
        (tmp_path / "weights" / name).write_text(name)
    return tmp_path / "weights"


def never():
    pytest.fail("read again")


def test_unchanged_files_are_not_read_again(folder):
    assert remembered(folder, "hash", lambda: "one") == "one"
    assert remembered(folder, "hash", never) == "one"
    assert remembered(folder, "other", lambda: "two") == "two"


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "a").write_text("A"),
        lambda folder: (folder / "c").write_text("c"),
        lambda folder: (folder / "a").unlink(),
        lambda folder: (folder / "a").rename(folder / "d"),
        lambda folder: os.utime(folder / "a", (1, 1)),
    ],
)
def test_a_change_is_noticed(folder, change):
    remembered(folder, "hash", lambda: "one")
    change(folder)
    assert remembered(folder, "hash", lambda: "two") == "two"


def test_recent_files_are_not_trusted(folder, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(folder.parent)
    remembered(folder, "hash", lambda: "one")
    assert not (folder.parent / "cache").exists()


def test_a_damaged_or_forbidden_note_is_none(folder):
    remembered(folder, "hash", lambda: "one")
    (note,) = (folder.parent / "cache" / ".contents").iterdir()
    note.write_text("[]")
    assert remembered(folder, "hash", lambda: "two") == "two"
    note.unlink()
    note.mkdir()
    assert remembered(folder, "hash", lambda: "three") == "three"
