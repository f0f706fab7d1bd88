"""The house's rules, read from the source: who may import whom, who may import which library, which targets exist."""

import ast
import importlib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]

# A file may import from the rows above its own and from its own folder, nothing else. A row's entries are folders and
# single files of ldm/.
ROWS = [
    {"errors", "ranges", "normals", "channels_last", "winograd"},
    {"randomness", "layers", "convolutions", "images", "files", "sizes"},
    {"runtime", "optim", "run_folder"},
    {"weights"},
    {"checkpoints", "config", "data"},
    {"autoencoder", "diffusion"},  # they meet on disk alone
    {"latents"},
    {"interop", "sampling"},
    {"evaluation"},
    {"training"},
    {"cli"},
]
ROW_OF = {entry: row for row, entries in enumerate(ROWS) for entry in entries}

# Libraries that only the named files, or all files of the named folders, may import.
FENCED = {
    "pytorch_lightning": {
        *("ldm.training", "ldm.autoencoder.module", "ldm.diffusion.module", "ldm.data.datamodule", "main"),
        "scripts.faults.interpreter",  # lets the launchers of both fork their ranks
        "scripts.bench.sides.ours",  # stops the loop after each step
    },
    "lightning_fabric": {"ldm.training.lightning_internals"},
    "omegaconf": {"ldm.config"},
    "torch.distributed": {"ldm.runtime", "ldm.checkpoints", "scripts.faults.interpreter", "scripts.bench"},
    "diffusers": {"ldm.interop", "scripts.bench", "scripts.roundtrip"},
    "wandb": {"ldm.training.loggers"},
    "pyarrow": {"ldm.data.sources"},
    "datasets": {"ldm.data.sources.arrow_rows"},
    "timm": {"ldm.evaluation.features"},
    "torch_fidelity": {"ldm.evaluation.features"},
    "transformers": {"ldm.evaluation.features", "ldm.diffusion.conditioners", "ldm.interop"},
    "tokenizers": {"ldm.diffusion.conditioners.tokenizer"},
    "peft": {"ldm.interop"},
    "fsspec": {"ldm.data.sources"},
    "gradio": {
        "ldm.cli.demo",
        "ldm.cli.demo_page",
        "ldm.cli.demo_controls",
        "ldm.cli.demo_style",
        "ldm.cli.demo_messages",
    },
    "huggingface_hub": {"ldm.interop", "ldm.weights"},
}

SOURCES = sorted([*(ROOT / "ldm").rglob("*.py"), *(ROOT / "scripts").rglob("*.py"), ROOT / "main.py"])
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> list[str]:
    """Every module that the file imports, anywhere in it; `from a import b` gives both a and a.b."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def entry(module: str) -> str:
    """`ldm.data.dataset` -> `data`: the folder or single file of ldm/ that a module belongs to; "" outside of it."""
    parts = module.split(".")
    return parts[1] if parts[0] == "ldm" and len(parts) > 1 else ""


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_up_the_table(path):
    name = module_name(path)
    if path.name == "__init__.py":
        assert not path.read_text().strip(), "the dotted path in a YAML is the file to open: no re-exports"
        return
    own = entry(name)
    if not own:
        return  # main.py and scripts/ may import everything
    for other in map(entry, imported(path)):
        if other and other != own:
            assert ROW_OF[other] < ROW_OF[own], f"{name} (row {ROW_OF[own]}) imports {other} (row {ROW_OF[other]})"


def test_the_table_has_a_row_for_everything_and_nothing_else():
    there = {path.stem for path in (ROOT / "ldm").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert there - {"__init__"} == set(ROW_OF)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_libraries_stay_behind_their_fences(path):
    for other in imported(path):
        for library, allowed in FENCED.items():
            if other == library or other.startswith(library + "."):
                name = module_name(path)
                assert any(f"{name}.".startswith(f"{one}.") for one in allowed), f"{name} imports {other}"


LIGHTNING = ("pytorch_lightning", "lightning_fabric")


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_parts(path: Path) -> list[str]:
    """Every use of a private attribute, but for an object's own and for those of imported modules, as `line: text`.

    Also what is imported from Lightning by a private name, and `vars(object)["_name"]`.
    """
    nodes = [*ast.walk(ast.parse(path.read_text()))]
    imports = [alias for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules = {alias.asname or alias.name.split(".")[0] for alias in imports if not alias.name.startswith(LIGHTNING)}
    found = []
    for node in nodes:
        names = []
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            names = [] if owner in ("self", "cls") or owner.split(".")[0] in modules else [node.attr]
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith(LIGHTNING):
            names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).startswith("vars("):
            names = [ast.unparse(node.slice).strip("'")]
        if any(map(private, names)):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


# Of torch.distributed, which that file alone may import; what a named tuple calls its public methods.
NOT_LIGHTNING = {"ldm.runtime.distributed": "group._", "ldm.sampling.sample_folder": "order._asdict"}


@pytest.mark.parametrize("path", sorted((ROOT / "ldm").rglob("*.py")), ids=module_name)
def test_private_parts_of_lightning_are_used_in_one_file(path):
    name = module_name(path)
    found = [one for one in private_parts(path) if NOT_LIGHTNING.get(name, "\n") not in one]
    assert bool(found) is (name == "ldm.training.lightning_internals"), found


def targets(node: object) -> list[str]:
    if isinstance(node, dict):
        own = [node["target"]] if isinstance(node.get("target"), str) else []
        return own + [target for value in node.values() for target in targets(value)]
    if isinstance(node, list):
        return [target for value in node for target in targets(value)]
    return []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_target_of_every_config_exists(path):
    found = targets(yaml.safe_load(path.read_text()))
    assert found
    for target in found:
        module, _, name = target.rpartition(".")
        assert hasattr(importlib.import_module(module), name), target
