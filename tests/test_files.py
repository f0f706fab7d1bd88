"""ldm.files: a file is there whole, or as it was before."""

import os

import pytest

from ldm import files


def test_what_is_written_whole_is_there_at_once(tmp_path):
    path = tmp_path / "list.json"
    for text in ("first", "second"):
        before = path.read_text() if path.exists() else None
        with files.whole(path) as aside:
            aside.write_text(text)
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == text
    assert os.listdir(tmp_path) == ["list.json"]


def test_what_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "list.json"
    path.write_text("old")

    def fail() -> None:
        with files.whole(path) as aside:
            aside.write_text("half")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["list.json"]


def test_processes_write_under_names_of_their_own(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    mine = files.temporary(path)
    assert mine.parent == tmp_path
    assert mine.name.startswith("a.png.tmp.")
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert files.temporary(path) != mine
