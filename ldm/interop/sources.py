"""A foreign checkpoint as it lies on disk: its tensors and what else it says, read without running any code of it.

A file of `.safetensors`; one that torch wrote (`.ckpt`, `.pt`, `.pth`, `.bin`); a folder of diffusers, either one model
(`config.json` beside its weights) or a pipeline of several (`model_index.json`). Nested dictionaries become dotted
keys, without a `state_dict.` that all of the model is under (Lightning); the parts of a pipeline are the first word of
their keys: `unet.conv_in.weight`.
"""

import json
import pickle
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.errors import CheckpointError, ConfigError
from ldm.weights.cache import sha256

WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)
"""What diffusers and transformers call the weights in a folder, in the order in which they prefer them."""
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")

# Lightning's, and that of DiT's and SiT's training script.
_OPTIMIZERS = ("optimizer_states.", "opt.")
_HEADER_BYTES = 100_000_000
"""The longest header of a safetensors file: the format's own limit."""


class Inert:
    """Stands for an object of another program that is not data, such as a callback: holds nothing and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class Recorded(dict[str, Any]):
    """Stands for an object that is nothing but named values, such as a program's arguments: keeps those."""

    def __setstate__(self, state: object) -> None:
        self.update(state if isinstance(state, dict) else {})


# Classes that Lightning, OmegaConf and argparse leave in checkpoints of this lineage. Nothing of theirs is run: each
# name stands for `Inert`, or for `Recorded`. Any other name in a pickle, but torch's own rebuilding of tensors, is
# refused by torch.
_HARMLESS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
)
_RECORDS = ("argparse.Namespace",)


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

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose keys begin with `prefix`, without it."""
        return {name.removeprefix(prefix): one for name, one in self.tensors.items() if name.startswith(prefix)}


def read(path: Path, config: Path | None = None) -> Source:
    """Open a file or a folder.

    Args:
        path: of the weights.
        config: YAML or JSON that describes the model; None: that of a folder, or the one beside a file with its name.

    Raises:
        CheckpointError: it is missing, cannot be read, or holds more than data.
        ConfigError: the description cannot be read.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _folder(path, config)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder; expected weights ({', '.join(SUFFIXES)}) or a folder")
    beside = next((one for one in map(path.with_suffix, (".yaml", ".yml", ".json")) if one.is_file()), None)
    found = config or beside
    tensors, rest = _read_file(path)
    model = {name.removeprefix("state_dict."): one for name, one in tensors.items() if not name.startswith(_OPTIMIZERS)}
    description = {} if found is None else _description(found)
    return Source(path, model, rest, description, {path.name: sha256(path)}, len(tensors) - len(model))


def _folder(path: Path, config: Path | None) -> Source:
    if (path / "model_index.json").is_file():
        index = _description(path / "model_index.json")
        parts = [name for name in index if (path / name / "config.json").is_file()]
        found = {part: read(path / part) for part in parts}
        return Source(
            path,
            {f"{part}.{name}": one for part, source in found.items() for name, one in source.tensors.items()},
            {"model_index": index},
            {part: source.config for part, source in found.items()} | _schedulers(path, index),
            {f"{part}/{file}": one for part, source in found.items() for file, one in source.sha256.items()},
        )
    description = config or path / "config.json"
    if not description.is_file():
        raise CheckpointError(
            f"{path}: neither model_index.json (a pipeline of diffusers) nor config.json (one model) is in this "
            f"folder; name the file of weights itself, or the folder that holds one of them"
        )
    files = _weight_files(path)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read_file(file)[0]
    return Source(path, tensors, {}, _description(description), {file.name: sha256(file) for file in files})


def _schedulers(path: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    file = path / "scheduler" / "scheduler_config.json"
    return {"scheduler": _description(file)} if "scheduler" in index and file.is_file() else {}


def _weight_files(folder: Path) -> list[Path]:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            names = sorted({*_description(index)["weight_map"].values()})
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
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read as a model's description: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: expected a mapping that describes a model, found {type(tree).__name__}")
    return tree


def _read_file(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if file.suffix == ".pkl":
        raise CheckpointError(
            f"{file}: a pickle, which may carry code and is not opened. EDM2's networks (NVlabs/edm2): run "
            f"scripts/edm2_to_safetensors.py on it where their code is, and convert the file that it writes"
        )
    if file.suffix not in SUFFIXES:
        raise CheckpointError(f"{file}: expected a file of weights ({', '.join(SUFFIXES)})")
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    return _read_torch(file)


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with file.open("rb") as handle:
        header = int.from_bytes(handle.read(8), "little")
    if header > min(_HEADER_BYTES, file.stat().st_size):
        raise CheckpointError(
            f"{file}: not a safetensors file: its header claims {header} bytes of {file.stat().st_size}. Get it again."
        )
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors ({error}). Get the file again.") from error


def _read_torch(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    harmless: list[Any] = [(Inert, name) for name in _HARMLESS] + [(Recorded, name) for name in _RECORDS]
    try:
        with torch.serialization.safe_globals(harmless), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file}: holds more than tensors and plain data, and is not opened: {_first_line(error)} Nothing of it "
            f"was run. Save its state_dict alone, as safetensors, where its own code is."
        ) from error
    except Exception as error:  # torch.load raises half a dozen unrelated classes for a broken file
        raise CheckpointError(
            f"{file}: cannot be read as PyTorch weights: {_first_line(error)} Get it again."
        ) from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{file}: expected a dictionary of tensors, found {type(loaded).__name__}")
    tensors, rest = {}, {}
    for name, leaf in _leaves(loaded):
        if isinstance(leaf, Tensor):
            tensors[name] = leaf.detach()
        else:
            rest[name] = leaf
    return tensors, rest


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{key}.{index}")
    else:
        yield key, value


def _first_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if text.endswith(".") else f"{text}."
