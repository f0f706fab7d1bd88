"""Tars that are cut, damaged, joined, compressed or empty: one message that names the place, nothing lost silently."""

import gzip
import logging

import pytest

from ldm.data.sources.webdataset import WebDataset
from ldm.errors import DataError
from tests.tars import png, write_tar


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tar(here):
    """Three items; headers at 0, 1024, 2048; the end at 3072."""
    path = write_tar(here / "a.tar", {f"{n}.png": png(n) for n in range(3)})
    assert all(len(png(n)) <= 512 for n in range(3))
    return path


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (0, r"a\.tar: is empty \(0 bytes\)"),
        (100, "byte 0 of 100: is damaged or cut there"),
        (600, r"byte 0 of 600: is cut: 0\.png should end at byte"),
        (1100, "byte 1024 of 1100: is no header of tar"),
        (1540, r"byte 1024 of 1540: is cut: 1\.png should end at byte"),
    ],
)
def test_a_cut_tar(tar, cut, message):
    tar.write_bytes(tar.read_bytes()[:cut])
    with pytest.raises(DataError, match=message):
        WebDataset("a.tar")


def test_a_tar_without_its_last_zeros(tar):
    tar.write_bytes(tar.read_bytes()[:2048])
    with pytest.raises(DataError, match=r"byte 2048 of 2048: is cut, or was never closed.*head -c 1024 /dev/zero >> "):
        WebDataset("a.tar")
    tar.write_bytes(tar.read_bytes() + bytes(1024))
    assert len(WebDataset("a.tar")) == 2


@pytest.mark.parametrize("place", [0, 1024, 2048])
def test_a_damaged_header(tar, place):
    whole = bytearray(tar.read_bytes())
    whole[place + 10] ^= 255
    tar.write_bytes(whole)
    with pytest.raises(DataError, match=f"a.tar: byte {place} of {len(whole)}: is .*what follows would be lost"):
        WebDataset("a.tar")


def test_joined_tars(tar):
    tar.write_bytes(tar.read_bytes() * 2)
    with pytest.raises(DataError, match="byte 10240 of 20480: is no header of tar"):
        WebDataset("a.tar")


@pytest.mark.parametrize(
    ("content", "kind"), [(gzip.compress(b"x" * 10), "gzip"), (b"BZh9" + b"x" * 10, "bzip2")], ids=["gzip", "bzip2"]
)
def test_a_compressed_tar(here, content, kind):
    (here / "a.tar.gz").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.tar\.gz: is compressed \({kind}\).*decompress it"):
        WebDataset("a.tar.gz")


def test_something_else_than_a_tar(here):
    (here / "a.tar").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(DataError, match="byte 0 of 2200: is damaged or cut there"):
        WebDataset("a.tar")


def test_a_tar_without_items_beside_others(tar, here):
    write_tar(here / "b.tar", {})
    assert len(WebDataset("*.tar")) == 3
    with pytest.raises(DataError, match=r"b\.tar: 0 items in 1 shards \(they are empty\)"):
        WebDataset("b.tar")


def test_names_with_dots_in_front_of_the_extension(here):
    write_tar(here / "a.tar", {f"2021.{n}.jpg": b"" for n in range(1100)})
    with pytest.raises(DataError, match="ends a stem at its first dot"):
        WebDataset("a.tar")


def test_a_text_that_is_too_long_is_counted(here, caplog):
    write_tar(here / "a.tar", {"1.png": png(), "1.txt": b"x" * (1 << 20) + b"x"})
    with caplog.at_level(logging.WARNING):
        assert not WebDataset("a.tar").has_captions()
    assert "1 .txt of more than 1048576 bytes" in caplog.text
