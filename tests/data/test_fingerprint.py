"""Samples of files' bytes: the same for a copy, another for any replaced file, and not read twice where times agree."""

import os
import shutil

import numpy as np
import pytest

from ldm.data import fingerprint
from ldm.data.fingerprint import comparable, contents, join, parts, remembered_array, stats
from ldm.errors import DataError


@pytest.fixture
def files(tmp_path, monkeypatch):
    """(folder, names): small and large files; every folder is large enough for an index, and every time is settled."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fingerprint, "INDEX_FROM", 1)
    monkeypatch.setattr(fingerprint, "_SETTLED", -(10**9))
    folder = tmp_path / "data"
    folder.mkdir()
    sizes = {"0": 0, "a": 1, "b": 4096, "c": 32768, "d": 32769, "e": 1_000_003}
    for name, size in sizes.items():
        (folder / name).write_bytes(np.random.default_rng(size).bytes(size))
    return folder, list(sizes)


@pytest.fixture
def opened(monkeypatch):
    """The names of the files that are read."""
    seen, sample = [], fingerprint._sample

    def count(root, name, size):
        seen.append(name)
        return sample(root, name, size)

    monkeypatch.setattr(fingerprint, "_sample", count)
    return seen


def of(folder, names) -> str:
    return contents(folder, names, stats(folder, names))


def test_any_replaced_file_is_noticed_and_a_copy_is_not(files, tmp_path):
    folder, names = files
    first = of(folder, names)
    assert of(shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile), names) == first
    assert of(shutil.copytree(folder, tmp_path / "twin", copy_function=shutil.copy2), names) == first
    for name in names[1:]:
        path = folder / name
        old = path.read_bytes()
        path.write_bytes(np.random.default_rng(99).bytes(len(old)))
        assert of(folder, names) != first
        path.write_bytes(old)
        assert of(folder, names) == first


@pytest.mark.parametrize("place", [0, 1 / 7, 3 / 7, 6 / 7, 1])
def test_places_from_the_first_to_the_last_byte_are_sampled(files, place):
    folder, names = files
    first = of(folder, names)
    data = bytearray((folder / "e").read_bytes())
    data[int(place * (len(data) - 4096)) + 2000] ^= 1
    (folder / "e").write_bytes(data)
    assert of(folder, names) != first


def test_two_files_that_change_places_are_noticed(files):
    folder, names = files
    (folder / "f").write_bytes(bytes(4096))
    names.append("f")
    first = of(folder, names)
    os.rename(folder / "b", folder / "x")
    os.rename(folder / "f", folder / "b")
    os.rename(folder / "x", folder / "f")
    assert of(folder, names) != first


def test_the_index_spares_reading_and_nothing_else(files, opened):
    folder, names = files
    first = of(folder, names)
    assert sorted(opened) == names
    opened.clear()
    assert of(folder, names) == first
    assert not opened
    # Another order, a new file and a touched one: only these are read.
    (folder / "new").write_bytes(b"x")
    os.utime(folder / "c")
    more = of(folder, ["new", *reversed(names)])
    assert sorted(opened) == ["c", "new"]
    shutil.rmtree("cache")
    assert of(folder, ["new", *reversed(names)]) == more


def test_the_index_does_not_trust_a_kept_time(files, opened):
    """Replaced by a rename, with size and time of the original, as `cp -p` and `mv` do."""
    folder, names = files
    first, state = of(folder, names), (folder / "b").stat()
    opened.clear()
    (folder / "other").write_bytes(bytes(state.st_size))
    os.utime(folder / "other", ns=(state.st_atime_ns, state.st_mtime_ns))
    os.replace(folder / "other", folder / "b")
    assert of(folder, names) != first
    assert opened == ["b"]


def test_young_files_are_not_trusted(files, opened, monkeypatch):
    monkeypatch.setattr(fingerprint, "_SETTLED", 2_000_000_000)
    folder, names = files
    of(folder, names)
    of(folder, names)
    assert sorted(opened) == sorted([*names, *names])


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 nonsense", None])
def test_a_damaged_index_is_read_anew(files, damage):
    folder, names = files
    first = of(folder, names)
    (index,) = fingerprint.INDEX.iterdir()
    data = bytearray(index.read_bytes())
    data[len(data) // 2] ^= 1
    index.write_bytes(bytes(data) if damage is None else damage)
    assert of(folder, names) == first


def test_an_index_that_cannot_be_written_is_none(files):
    folder, names = files
    fingerprint.INDEX.parent.write_text("in the way")
    assert of(folder, names) == of(folder, names)


def test_small_folders_leave_nothing_behind(files, monkeypatch):
    monkeypatch.setattr(fingerprint, "INDEX_FROM", 10_000)
    of(*files)
    assert not fingerprint.INDEX.exists()


def test_what_cannot_be_read_has_a_fingerprint_too(files):
    folder, names = files
    (folder / "dangling").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    name = os.fsdecode(b"caf\xe9")
    (folder / name).write_bytes(b"x")
    names += ["dangling", "pipe", name]
    assert of(folder, names) == of(folder, names)
    assert stats(folder, names)[6].tolist() == [-1] * 4


def test_names_may_be_absolute(files):
    folder, names = files
    absolute = [str(folder / name) for name in names]
    assert np.array_equal(stats(folder, absolute), stats(folder, names))
    assert contents(folder, absolute, stats(folder, names)) == of(folder, names)


def test_an_array_is_made_again_only_if_a_file_changes(files):
    folder, names = files
    made = []

    def array() -> np.ndarray:
        made.append(1)
        return np.arange(3) + len(made)

    paths = [str(folder / name) for name in names]
    before = {*fingerprint.INDEX.glob("*.npz")}
    assert remembered_array(paths, ".kind", array).tolist() == remembered_array(paths, ".kind", array).tolist()
    assert len(made) == 1
    (index,) = {*fingerprint.INDEX.glob("*.npz")} - before
    remembered_array(paths, ".other", array)
    index.write_bytes(b"damaged")
    remembered_array(paths, ".kind", array)
    (folder / "b").write_bytes(b"changed")
    remembered_array(paths, ".kind", array)
    assert len(made) == 4


def test_a_file_out_of_reach_for_a_moment_is_read_again(files, monkeypatch):
    folder, names = files
    first = of(folder, names)
    shutil.rmtree("cache")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", lambda *args: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        assert of(folder, names) != first
    assert of(folder, names) == first


def test_a_machine_without_file_handles_is_no_other_data_set(files, monkeypatch):
    def full(*args):
        raise OSError(24, "Too many open files")

    states = stats(*files)
    monkeypatch.setattr(os, "open", full)
    with pytest.raises(DataError, match="Too many open files"):
        contents(*files, states)


def test_fingerprints_of_names_alone_agree_with_those_of_contents():
    assert parts(join("ab", "12")) == ("ab", ":contents:12")
    assert parts("ab") == ("ab", "")
    assert comparable("ab", join("ab", "12")) == ("", "")
    assert comparable(join("ab", "12"), "ab") == ("", "")
    ours, theirs = comparable(join("ab", "12"), join("ab", "12"))
    assert ours == theirs
    assert comparable(join("ab", "12"), join("ab", "13")) == (":contents:12", ":contents:13")
    assert comparable("ac", join("ab", "12")) == ("ac", "ab:contents:12")
