"""What the documents say of the code is so: the table of rows, every path and function, every example, every link."""

import ast
import importlib
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import main
from ldm.cli import sample
from ldm.config.load import to_yaml
from ldm.training.metrics_table import read_metrics
from scripts.faults import __main__ as faults
from tests.test_layering import ROWS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
CHANGELOG = ROOT / "CHANGELOG.md"  # names what there was
MADE = (".git", "logs", "cache", "data", "wandb")  # by git and by runs, none of it part of the repository
TOP = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.is_dir() and path.name not in MADE)
FILE = r"[A-Z]{4,}\.(?:md|cff)|main\.py|pyproject\.toml|environment\.yaml|requirements\.lock"
PATH = re.compile(rf"(?<![\w/<.*-])((?:{TOP})/[\w./{{}},*-]*|{FILE})")
PLACE = re.compile(r"`([\w./]+\.py)::([\w.]+)`")


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def braces(name: str) -> list[str]:
    """`a/{b,c}.py` -> a/b.py, a/c.py."""
    found = re.search(r"\{([^{}]*)\}", name)
    if found is None:
        return [name]
    return [f"{name[: found.start()]}{one}{name[found.end() :]}" for one in found[1].split(",")]


def missing(text: str) -> list[str]:
    """The paths of the repository that a text names and that are not there."""
    named = [one for match in PATH.finditer(text) for one in braces(match[1].rstrip(".,"))]
    return [name for name in named if not (any(ROOT.glob(name)) if "*" in name else (ROOT / name).exists())]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_named_paths_exist(page):
    if page != CHANGELOG:
        assert missing(page.read_text()) == []


def test_a_path_that_is_not_there_is_found():
    text = "see `ldm/nothing.py`, `ldm/files.py`, ldm/data/{dataset,nowhere}.py and NOTHING.md, but not logs/x/y.ckpt"
    assert missing(text) == ["ldm/nothing.py", "ldm/data/nowhere.py", "NOTHING.md"]


def defines(file: Path, name: str) -> bool:
    """Whether a module defines `Class.method`, a function, a class or a variable."""
    body: list[Any] = ast.parse(file.read_text()).body
    for part in name.split("."):
        for node in body:
            own = [
                getattr(node, "name", None),
                *(getattr(target, "id", None) for target in getattr(node, "targets", [])),
            ]
            if part in [*own, getattr(getattr(node, "target", None), "id", None)]:
                body = getattr(node, "body", [])
                break
        else:
            return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_named_functions_exist(page):
    for file, name in PLACE.findall(page.read_text()):
        assert (ROOT / file).is_file(), file
        assert defines(ROOT / file, name), f"{file} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file) if file else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, target


# ---- LICENSE, NOTICE, CITATION.cff ----


def test_license_version_and_authors_are_stated_alike():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert project["license"] == citation["license"] == "MIT"
    assert project["authors"] == citation["authors"]
    assert project["version"] == citation["version"]
    (holder,) = project["authors"]
    for name in project["license-files"]:
        assert f"Copyright (c) 2026 {holder['name']}" in (ROOT / name).read_text()
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n")


def test_every_picture_of_the_repository_has_a_notice():
    notice = (ROOT / "NOTICE").read_text()
    pictures = [*ROOT.glob(".readme/*"), *ROOT.glob("docs/**/*.png")]
    assert pictures
    assert [name for path in pictures if (name := str(path.relative_to(ROOT))) not in notice] == []


# ---- README.md ----


def test_the_python_of_the_readme_runs(make_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    run = make_runs(classes=["cat", "dog", "hat", "boot"]).diffusion
    found: dict[str, Any] = {}
    exec(code.replace("logs/<run>", str(run)), found)
    assert [image.size for image in found["images"]] == [(16, 16)] * 8
    assert (tmp_path / "first.png").is_file()


# ---- docs/robustness.md ----


def test_the_table_has_a_row_for_every_fault():
    """By number and name; what was done and seen is that of its date."""
    for part in faults.PARTS:
        importlib.import_module(f"scripts.faults.{part}")
    rows = re.findall(r"^\| (\d+) \| ([^|]*) \|", (ROOT / "docs" / "robustness.md").read_text(), re.MULTILINE)
    assert {int(number): name for number, name in rows} == {
        number: fault.name for number, fault in faults.CATALOGUE.items()
    }


# ---- docs/architecture.md ---------------------------------------------------------------------------------------

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def test_the_table_of_imports_is_the_one_that_is_tested():
    rows = re.findall(r"^\| (\d+) \| ([^|]*) \|", ARCHITECTURE, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(len(ROWS)))
    assert [set(re.findall(r"`(\w+)`", entries)) for _, entries in rows] == ROWS


def test_the_tree_has_a_line_for_every_folder():
    (tree,) = re.findall(r"## The tree\n\n```\n(.*?)```", ARCHITECTURE, re.DOTALL)
    listed = set(re.findall(r"^ *(\w+)/", tree, re.MULTILINE))
    there = {path.parent.name for path in (ROOT / "ldm").rglob("__init__.py")}
    assert there | {"configs", "scripts", "tests", "docs"} == listed
    loose = {path.stem for path in (ROOT / "ldm").glob("*.py")} - {"__init__"}
    assert loose == set(re.findall(r"^  (errors[\w ]*?)   ", tree, re.MULTILINE)[0].split())


def test_twenty_questions_are_answered_with_a_file():
    answers = re.split(r"^\*\*", ARCHITECTURE.partition("## Where is ...?")[2], flags=re.MULTILINE)[1:]
    assert len(answers) == 20
    assert all("?** " in answer and re.search(r"`[\w./]+\.py", answer) for answer in answers)


# ---- docs/extending.md ------------------------------------------------------------------------------------------

SECTIONS = re.split(r"^## ", (ROOT / "docs" / "extending.md").read_text(), flags=re.MULTILINE)[1:]


def named_files(section: str) -> dict[str, str]:
    """{name: text} of the code blocks that follow a line which begins with the name of a file."""
    return dict(re.findall(r"^`([\w./]+)`[^\n]*:\n\n```(?:python|yaml)\n(.*?)^```", section, re.DOTALL | re.MULTILINE))


def commands(section: str) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


@pytest.fixture
def place(tmp_path, monkeypatch, autoencoder_tree, diffusion_tree, runs, image_folder):
    """A folder with small configurations in the quickstart's places, runs to sample from, and a ZIP of pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    params = diffusion_tree["model"]["params"]
    params["conditioner"]["params"]["channels"] = "${model.params.network.params.vector_channels}"
    diffusion_tree["data"]["params"] |= {"autoencoder": str(runs.autoencoder), "resolution": 16}
    configs = tmp_path / "configs" / "quickstart"
    configs.mkdir(parents=True)
    for stage, tree in (("autoencoder", autoencoder_tree), ("diffusion", diffusion_tree)):
        tree["name"] = f"emoji_{stage}"
        tree["lightning"]["trainer"] |= {"max_steps": 2, "val_check_interval": 2, "log_every_n_steps": 1}
        (configs / f"{stage}.yaml").write_text(to_yaml(tree))
    with zipfile.ZipFile("pictures.zip", "w") as archive:
        for file in image_folder.rglob("*.png"):
            archive.write(file, file.relative_to(image_folder))
    yield tmp_path
    for name in [name for name in sys.modules if name == "house" or name.startswith("house.")]:
        sys.modules.pop(name)


def perform(command: str) -> int:
    if not command.startswith("python "):
        return subprocess.run(["bash", "-c", command]).returncode
    program, *words = shlex.split(command)[1:]
    if program == "main.py":
        return main.main(words)
    assert program == "scripts/sample.py"
    return sample.main([*words, "--steps", "2", "-n", "1"])


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.partition("\n")[0])
def test_the_example_of_the_page_runs(section, place, runs, capsys):
    files = named_files(section)
    assert any(name.startswith("house/") for name in files)
    assert len(files) == len(re.findall(r"^```(?:python|yaml)", section, re.MULTILINE)), "a block without a name"
    for name, text in files.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text.replace("logs/<run>", str(runs.diffusion)))
    for command in commands(section):
        assert perform(command) == 0, f"{command}\n{capsys.readouterr().err}"
    for name in files:
        if name.endswith(".py") and "/" not in name:
            runpy.run_path(name)
            assert [*place.glob("*.png")]
    if section.startswith("A validation metric"):
        (run,) = place.glob("logs/*_emoji_autoencoder")
        assert float(read_metrics(run / "metrics.csv")[-1]["val/edges"]) > 0
        assert (run / "checkpoints" / "best.ckpt").is_file()
        (run,) = place.glob("logs/*_emoji_diffusion")
        assert float(read_metrics(run / "metrics.csv")[-1]["val/fd"]) > 0


def test_every_page_of_extending_is_listed_and_has_an_example():
    assert [section.partition("\n")[0] for section in SECTIONS] == [
        "A sampler",
        "A network",
        "A conditioner",
        "A first stage",
        "A validation metric",
        "A data source",
        "A mask or a degradation",
    ]


# ---- CONTRIBUTING.md --------------------------------------------------------------------------------------------


def test_the_comparison_of_two_runs_finds_them_equal_or_not(place, monkeypatch, capsys):
    (script,) = named_files((ROOT / "CONTRIBUTING.md").read_text()).values()
    Path("same.py").write_text(script)
    line = "main.py --base configs/quickstart/autoencoder.yaml -l"
    for folder, change in (("before", ""), ("after", ""), ("changed", "seed=24")):
        assert perform(f"python {line} {folder} {change}") == 0
    monkeypatch.setattr(sys, "argv", ["same.py", "before", "after"])
    runpy.run_path("same.py")
    assert "equal: " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["same.py", "before", "changed"])
    with pytest.raises(AssertionError, match="the metrics differ"):
        runpy.run_path("same.py")
