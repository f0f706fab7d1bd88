"""Which files of a folder are pictures, and what is said about the others."""

import errno
import os

import pytest
from PIL import Image, features

from ldm.data.sources.listing import EXTENSIONS, describe, find, natural
from ldm.errors import DataError

OLD = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}


def test_every_spelling_of_a_picture_s_extension_is_known():
    assert OLD | {".jpe", ".jfif", ".apng", ".dib", ".pbm", ".pnm", ".tga", ".qoi"} <= EXTENSIONS
    assert (".avif" in EXTENSIONS) == features.check("avif")
    assert (".jp2" in EXTENSIONS) == features.check("jpg_2000")
    assert not EXTENSIONS & {".pdf", ".eps", ".mpg", ".h5", ".ico", ".pfm", ".npy", ".txt"}


@pytest.mark.parametrize("extension", sorted(EXTENSIONS - {".pnm", ".mpo", ".avifs", ".icb", ".vda", ".vst"}))
def test_files_with_these_extensions_are_listed_and_can_be_read(tmp_path, extension):
    picture = Image.new("1" if extension == ".pbm" else "RGB", (8, 8))
    for name in (f"a{extension}", f"b{extension.upper()}"):
        picture.save(tmp_path / name, format=Image.registered_extensions()[extension])
        with Image.open(tmp_path / name) as image:
            image.load()
    assert find(tmp_path).pictures == [f"a{extension}", f"b{extension.upper()}"]


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    """At any depth; not by its permissions, since tests may run as root."""
    for name in ("cats", "dogs/deep"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("L", (2, 2)).save(tmp_path / name / "a.png")
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == refused:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for refused in ("dogs", "deep", tmp_path.name):
        with pytest.raises(DataError, match=rf"{refused}: this folder cannot be read \(Permission denied\)"):
            find(tmp_path)
    refused = "lost+found"
    (tmp_path / refused).mkdir()
    assert find(tmp_path).pictures == ["cats/a.png", "dogs/deep/a.png"]


def test_a_class_folder_on_a_disk_that_is_not_there(tmp_path):
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "dogs").symlink_to(tmp_path / "gone" / "dogs")
    with pytest.raises(DataError, match=r"dogs: this link is dangling \(.*gone/dogs\)"):
        find(tmp_path)


def test_what_is_left_out_is_counted_by_kind(tmp_path):
    for name in ("a.json", "b.JSON", "c", ".d", "e.txt", "f.txt", "sub/g.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    left_out = find(tmp_path).left_out(used={"e.txt"})
    expected = "2 .json, 1 .md, 1 .txt, 1 hidden, 1 without extension"
    assert left_out == f"{expected}, 1 links to a folder that contains them (sub/up)"
    assert describe([]) == ""


def test_the_order_is_that_of_the_whole_names(tmp_path):
    """Though each folder is sorted on its own: also where folders differ in case or zeros alone, beside files."""
    names = ["a2", "a10", "A2", "a02", "b", "B.x", "b.x.y", "1", "01", "c d"]
    for number, outer in enumerate(names):
        for inner in names[: number + 1]:
            (tmp_path / outer / inner).mkdir(parents=True)
            for end in ("x10.png", "x9.png", "X9.png", "x09.png"):
                (tmp_path / outer / inner / end).write_bytes(b"")
        (tmp_path / outer / f"{names[-number]}.png").write_bytes(b"")
        (tmp_path / f"{outer}.png").write_bytes(b"")
    found = find(tmp_path).pictures
    there = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")]
    assert found == sorted(there, key=natural)
