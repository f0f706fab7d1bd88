"""The house's rules, read from the source: who may import whom, who may import which library, which targets exist."""

import ast
import importlib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]

# A file imports only from levels below its own; within level 1 a package's files may import each other.
LEVELS = {
    0: [
        *(
            "errors",
            "distributed",
            "randomness",
            "layers",
            "ema",
            "schedule",
            "optimizers",
            "checkpoint",
            "run",
            "signals",
        ),
        *("plain", "sealed", "shards", "sharding", "snapshot", "ranks", "slurm", "process", "threads", "step_mean"),
        *("precision", "ranges", "durations", "float64", "files"),
        *("config", "config_read", "config_target", "config_types", "config_signature", "config_check", "commandline"),
    ],
    1: [
        *("resume_changes", "dry_run", "data.arrays", "data.pixels"),
        *("data.captions", "data.fingerprint", "data.listing", "data.value_range"),
        *("data.images", "data.openmoji", "data.latents", "data.sampler"),
        *("data.latent_files", "data.latent_build", "data.latent_reader"),
        *("autoencoder.networks", "autoencoder.posterior", "autoencoder.lpips", "autoencoder.discriminator"),
        *("autoencoder.losses", "autoencoder.codec", "autoencoder.quantiser"),
        *("diffusion.unet", "diffusion.objectives", "diffusion.guidance", "diffusion.samplers"),
        *("diffusion.paths", "diffusion.predictions", "diffusion.weightings", "diffusion.noise_levels"),
        *("diffusion.noise_schedules", "diffusion.grids", "diffusion.dit", "diffusion.edm2"),
        "diffusion.conditioning",
    ],
    2: ["resume", "data.datamodules", "data.latent_datamodule", "autoencoder.module", "diffusion.module"],
    3: [
        "evaluation.generate",
        "evaluation.sample_folder",
        "evaluation.sheets",
        "evaluation.steering",
        "evaluation.features",
        "evaluation.metrics",
        "evaluation.quality",
    ],
    4: ["averages", "callbacks", "loggers", "safety", "saving", "finite", "strategies"],
    5: ["rehearsal"],
    6: ["trainer", "outcome"],
}
LEVEL_OF = {f"ldm.{name}": level for level, names in LEVELS.items() for name in names}

# Libraries that only the named files may import.
FENCED = {
    "pytorch_lightning": {
        *("ldm.autoencoder.module", "ldm.diffusion.module", "ldm.data.datamodule"),
        *(
            "ldm.training.callbacks.ema_snapshots",
            "ldm.training.callbacks.previews",
            "ldm.training.loggers",
            "ldm.training.callbacks.provenance",
            "ldm.training.callbacks.checkpoints",
            "ldm.training.callbacks.skip_nonfinite",
            "ldm.training.trainer",
            "main",
        ),
        *("ldm.training.fit", "ldm.training.strategies", "ldm.training.rehearsal"),
    },
    "omegaconf": {"ldm.config.load"},
    "torch.distributed": {"ldm.runtime.distributed", "ldm.runtime.fsdp"},
    "diffusers": {"scripts.bench"},
    "wandb": {"ldm.training.loggers"},
}

SOURCES = sorted([*(ROOT / "ldm").rglob("*.py"), *(ROOT / "scripts").glob("*.py"), ROOT / "main.py"])
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


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_down(path):
    name = module_name(path)
    if path.name == "__init__.py":
        assert not path.read_text().strip(), "the dotted path in a YAML is the file to open: no re-exports"
        return
    level = LEVEL_OF.get(name, 7 if not name.startswith("ldm.") else None)
    assert level is not None, f"{name} has no level: add it to LEVELS"
    for other in imported(path):
        if other not in LEVEL_OF:
            continue
        same_package = name.rsplit(".", 1)[0] == other.rsplit(".", 1)[0]
        allowed = LEVEL_OF[other] < level or (LEVEL_OF[other] == level and same_package)
        assert allowed, f"{name} (level {level}) imports {other} (level {LEVEL_OF[other]})"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_libraries_stay_behind_their_fences(path):
    for other in imported(path):
        for library, allowed in FENCED.items():
            if other == library or other.startswith(library + "."):
                assert module_name(path) in allowed, f"{module_name(path)} imports {other}"


def test_stages_meet_only_on_disk():
    for path in SOURCES:
        name = module_name(path)
        crossing = {"ldm.autoencoder": "ldm.diffusion", "ldm.diffusion": "ldm.autoencoder"}
        for package, other in crossing.items():
            if name.startswith(package):
                assert not any(target.startswith(other) for target in imported(path)), name


def test_levels_name_only_existing_files():
    missing = set(LEVEL_OF) - {module_name(path) for path in SOURCES}
    assert not missing, f"LEVELS names files that are gone: {missing}"


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
