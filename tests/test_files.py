"""ldm.files: a file is there whole, or as it was before."""

import os
import zlib
from pathlib import Path

import pytest

from ldm import files
from ldm.errors import ResourceError


@pytest.mark.parametrize("durable", [True, False])
def test_what_is_written_whole_is_there_at_once(tmp_path, durable):
    path = tmp_path / "list.json"
    for text in ("first", "second"):
        before = path.read_text() if path.exists() else None
        with files.published(path, durable=durable) as aside:
            aside.write_text(text)
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == text
    assert os.listdir(tmp_path) == ["list.json"]


@pytest.mark.parametrize("durable", [True, False])
def test_what_fails_leaves_what_was_there(tmp_path, durable):
    path = tmp_path / "list.json"
    path.write_text("old")

    def fail() -> None:
        with files.published(path, durable=durable) as aside:
            aside.write_text("half")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["list.json"]


def test_what_is_durable_is_synced_before_and_after_its_name_is(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    files.write_text(tmp_path / "state.json", "{}")
    assert (tmp_path / "state.json").read_text() == "{}"
    assert synced == [str(files.temporary(tmp_path / "state.json")), str(tmp_path)]
    with files.published(tmp_path / "grid.png", durable=False) as aside:
        aside.write_bytes(b"1")
    assert len(synced) == 2


def test_processes_write_under_names_of_their_own(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    mine = files.temporary(path)
    assert mine.parent == tmp_path
    assert mine.name.startswith("a.png.tmp.")
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert files.temporary(path) != mine


def test_unwritable_and_full_folders(tmp_path):
    files.check_writable(tmp_path / "new" / "logs")
    assert not list((tmp_path / "new" / "logs").iterdir())
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "logs", Path("/proc/logs")):
        with pytest.raises(ResourceError, match="--logdir"):
            files.check_writable(folder)
    files.check_space(tmp_path, 1)
    with pytest.raises(ResourceError, match="MB are needed"):
        files.check_space(tmp_path, 2**62)


def test_the_checksum_is_of_the_first_bytes(tmp_path, monkeypatch):
    data = bytes(range(256)) * 10
    (tmp_path / "file").write_bytes(data)
    monkeypatch.setattr(files, "_CHUNK", 100)  # several pieces, the last one short
    for length in (None, 0, 1, 100, 250, 2560):
        assert files.crc32(tmp_path / "file", length) == f"{zlib.crc32(data[:length]):08x}"
