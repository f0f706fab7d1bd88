"""A foreign checkpoint as it lies on disk: its tensors and what else it says, read without running any code of it.

A file of `.safetensors`; one that torch wrote (`.ckpt`, `.pt`, `.pth`, `.bin`); a folder of diffusers, either one model
(`config.json` beside its weights) or a pipeline of several (`model_index.json`); two files, `X_encoder` and
`X_decoder`, by either or by their folder. Nested dictionaries become dotted keys, without a `state_dict.` that all of
the model is under (Lightning); the parts of a pipeline and of a pair are the first word of their keys:
`unet.conv_in.weight`. One file of weights: ldm/interop/weight_files.py.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ldm.errors import CheckpointError, ConfigError
from ldm.interop import weight_files
from ldm.interop.tables import renamed
from ldm.interop.weight_files import SUFFIXES, first_line
from ldm.weights.cache import sha256

WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)
"""What diffusers and transformers call the weights in a folder, in the order in which they prefer them."""

# Lightning's, and that of DiT's and SiT's training script.
_OPTIMIZERS = ("optimizer_states.", "opt.")
_HALVES = ("encoder", "decoder")


@dataclass(frozen=True)
class Source:
    """What was read.

    Attributes:
        path: the file or folder.
        tensors: by dotted key.
        rest: everything else by dotted key: numbers, texts, None.
        config: what the YAML or JSON that describes the model says; of a pipeline {part: its config.json}; {}: none.
        sha256: {file: hash} of every file of weights.
        optimizer_tensors: how many tensors of the optimizers' states there were, which are not among `tensors`.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    rest: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)
    optimizer_tensors: int = 0

    @property
    def name(self) -> str:
        """Of the folder, or of the file without its suffix."""
        path = self.path.resolve()
        return path.name if path.is_dir() else path.stem

    def described(self, *keys: str) -> Any:
        """What the description says under these keys, one within the other; None: nothing."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose keys begin with `prefix`, without it."""
        return {name.removeprefix(prefix): one for name, one in self.tensors.items() if name.startswith(prefix)}


def read(path: Path, config: Path | None = None) -> Source:
    """Open a file or a folder.

    Args:
        path: of the weights.
        config: YAML or JSON that describes the model; None: that of a folder, or the one beside a file with its name.
            A `target:` in it is text like any other.

    Raises:
        CheckpointError: it is missing, cannot be read, or holds more than data.
        ConfigError: the description cannot be read.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _folder(path, config)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder; expected weights ({', '.join(SUFFIXES)}) or a folder")
    if pair := _pair(path):
        return _pair_source(path, pair, config)
    beside = next((one for one in map(path.with_suffix, (".yaml", ".yml", ".json")) if one.is_file()), None)
    found = config or beside
    tensors, rest = weight_files.read(path)
    model = {name: one for name, one in tensors.items() if not name.startswith(_OPTIMIZERS)}
    model = renamed(model, lambda name: name.removeprefix("state_dict."), str(path))
    description = {} if found is None else _description(found)
    return Source(path, model, rest, description, {path.name: sha256(path)}, len(tensors) - len(model))


def number(value: Any, origin: str, least: float = -math.inf) -> float:
    """A finite number of a description; a text too, since YAML reads 1e-4, without a point, as one.

    Args:
        origin: file and key, for the message.
        least: what it must be above.

    Raises:
        ConfigError: it is none.
    """
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        found = math.nan
    if not (math.isfinite(found) and found > least):
        above = "" if least == -math.inf else f" above {least:g}"
        raise ConfigError(f"{origin}: expected a number{above}, found {value!r}")
    return found


def whole(value: Any, origin: str) -> int:
    """The same of a whole number from 1 on."""
    if (found := number(value, origin, 0)) != int(found):
        raise ConfigError(f"{origin}: expected a whole number, found {value!r}")
    return int(found)


def _folder(path: Path, config: Path | None) -> Source:
    if (path / "model_index.json").is_file():
        index = _description(path / "model_index.json")
        parts = [name for name in index if Path(name).name == name and (path / name / "config.json").is_file()]
        found = {part: read(path / part) for part in parts}
        return Source(
            path,
            {f"{part}.{name}": one for part, source in found.items() for name, one in source.tensors.items()},
            {"model_index": index},
            {part: source.config for part, source in found.items()} | _schedulers(path, index),
            {f"{part}/{file}": one for part, source in found.items() for file, one in source.sha256.items()},
        )
    description = config or path / "config.json"
    if not description.is_file() and (pair := _pair_of_folder(path)):
        return _pair_source(path, pair, config)
    if not description.is_file():
        raise CheckpointError(
            f"{path}: nothing in this folder says what it holds: expected model_index.json (a pipeline of diffusers), "
            f"config.json (one model), or files X_encoder and X_decoder. Name the file of weights itself"
        )
    files = _weight_files(path)
    tensors: dict[str, Tensor] = {}
    for file in files:
        part = weight_files.read(file)[0]
        if twice := sorted(tensors.keys() & part.keys()):
            raise CheckpointError(f"{file}: {twice[0]} is in another file of the folder, too. Get the files again.")
        tensors |= part
    return Source(path, tensors, {}, _description(description), {file.name: sha256(file) for file in files})


def _pair(path: Path) -> dict[str, Path] | None:
    """{encoder, decoder: file} where a file is one half of a model and the other half is beside it."""
    stem = next((path.stem.removesuffix(half) for half in _HALVES if path.stem.endswith(f"_{half}")), None)
    files = {} if stem is None else {half: path.with_name(f"{stem}{half}{path.suffix}") for half in _HALVES}
    return files if files and all(file.is_file() for file in files.values()) else None


def _pair_of_folder(folder: Path) -> dict[str, Path] | None:
    pairs = [pair for file in sorted(folder.glob("*_encoder.*")) if file.suffix in SUFFIXES and (pair := _pair(file))]
    if len(pairs) > 1:
        names = ", ".join(pair["encoder"].name for pair in pairs)
        raise CheckpointError(f"{folder}: holds several models ({names}); name one of these files")
    return pairs[0] if pairs else None


def _pair_source(path: Path, pair: Mapping[str, Path], config: Path | None) -> Source:
    tensors = {f"{half}.{name}": one for half, file in pair.items() for name, one in weight_files.read(file)[0].items()}
    description = {} if config is None else _description(config)
    return Source(path, tensors, {}, description, {file.name: sha256(file) for file in pair.values()})


def _schedulers(path: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    file = path / "scheduler" / "scheduler_config.json"
    return {"scheduler": _description(file)} if "scheduler" in index and file.is_file() else {}


def _weight_files(folder: Path) -> list[Path]:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            listed = _description(index).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(one, str) for one in listed.values()):
                raise CheckpointError(
                    f"{index}: expected `weight_map`, which says the file of each tensor. Get it again."
                )
            names = sorted({*listed.values()})
            missing = [one for one in names if not (folder / Path(one).name).is_file()]
            if missing:
                raise CheckpointError(f"{index}: names {', '.join(missing)}, which is not there; get all of the files")
            return [folder / Path(one).name for one in names]
    raise CheckpointError(f"{folder}: no weights in this folder; expected one of {', '.join(WEIGHTS)}")


def _description(file: Path) -> dict[str, Any]:
    """A YAML or JSON file as plain containers; `target:` in it is text like any other and names nothing to build."""
    try:
        text = file.read_text(encoding="utf-8")
        tree = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read as a model's description: {first_line(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: expected a mapping that describes a model, found {type(tree).__name__}")
    return tree
