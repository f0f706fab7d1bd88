"""pyproject.toml, requirements.lock and environment.yaml name the same packages at the same versions."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def locked() -> list[Requirement]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [Requirement(line.removesuffix("\\").strip()) for line in lines if re.match(r"[a-z0-9._-]+==", line)]


def declared() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(text) for text in project["dependencies"] + [text for extra in extras for text in extra]]


def test_every_declared_requirement_is_locked_within_its_range():
    versions = {(canonicalize_name(pin.name), str(pin.specifier).removeprefix("==")) for pin in locked()}
    for requirement in declared():
        name = canonicalize_name(requirement.name)
        found = [version for locked_name, version in versions if locked_name == name]
        assert found, f"{name} is declared in pyproject.toml and missing from requirements.lock: run `make lock`"
        assert all(requirement.specifier.contains(version, prereleases=True) for version in found), requirement


def test_every_locked_package_has_hashes_and_no_registry_address():
    text = (ROOT / "requirements.lock").read_text()
    blocks = re.split(r"\n(?=[a-z0-9._-]+==)", text)
    assert all("--hash=sha256:" in block for block in blocks)
    assert not re.search(r"https?://|--(extra-)?index-url|--find-links|file:", text)


def test_conda_environment_lists_the_locked_pins():
    environment = yaml.safe_load((ROOT / "environment.yaml").read_text())
    pip_section = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip_section[-1] == "--editable ."
    assert [str(Requirement(text)) for text in pip_section[:-1]] == [str(pin) for pin in locked()]


def test_conda_environment_meets_the_required_python():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((ROOT / "environment.yaml").read_text())
    python = next(entry for entry in environment["dependencies"] if str(entry).startswith("python="))
    assert Requirement(f"python{project['requires-python']}").specifier.contains(python.removeprefix("python="))


def test_make_lock_writes_the_conda_file_with_what_every_sed_has(tmp_path):
    """`-i` takes another argument on macOS than on Linux."""
    names = {"Makefile", "environment.yaml", "requirements.lock", "pyproject.toml"}
    for name in names:
        shutil.copy(ROOT / name, tmp_path)
    said = subprocess.run(
        ["make", "--no-print-directory", "-n", "lock"], cwd=tmp_path, capture_output=True, text=True
    ).stdout
    recipe = said[said.index("\nsed ") :]
    assert not re.search(r"sed -[a-zA-Z]*i", recipe)
    subprocess.run(["sh", "-ec", recipe], cwd=tmp_path, check=True)
    assert (tmp_path / "environment.yaml").read_text() == (ROOT / "environment.yaml").read_text()
    assert {path.name for path in tmp_path.iterdir()} == names
