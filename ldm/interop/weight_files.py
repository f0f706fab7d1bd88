"""One file of weights, as safetensors or as torch wrote it, read without running code of it.

A pickle is a program. torch's reader (`weights_only`) runs none of it but what rebuilds tensors and plain containers;
names of classes that checkpoints of this lineage carry besides are replaced by stand-ins that do nothing.
"""

import os
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.errors import CheckpointError

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")

_LFS = b"version https://git-lfs"
_HEADER_BYTES = 100_000_000
"""The longest header of a safetensors file: the format's own limit."""
_LEAVES = 1_000_000
"""The most values that a file may hold: no checkpoint comes near, and one that refers to itself over and over does."""
_CODE = re.compile(r"(?:GLOBAL|recognized function|allowlisted .* but got) (\S+)")
_REASON = re.compile(r"WeightsUnpickler error: (.*)")
"""What torch's refusals name; its advice, how to let code in, is left out."""
_UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class Inert:
    """Stands for an object of another program that is not data, such as a callback: holds nothing and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class Recorded(dict[str, Any]):
    """Stands for an object that is nothing but named values, such as a program's arguments: keeps those."""

    def __setstate__(self, state: object) -> None:
        self.update(state if isinstance(state, dict) else {})


def _empty(*_: object) -> dict[Any, Any]:
    """What a dictionary with a default begins as; the default is nobody's business here."""
    return {}


# What Lightning, OmegaConf, argparse and numpy leave in checkpoints of this lineage. Nothing of theirs is run: a name
# stands for `Inert`, or for a dictionary where one holds what others look for. Any other name in a pickle, but
# torch's own rebuilding of tensors, is refused by torch.
_HARMLESS = (
    *(f"pytorch_lightning.callbacks.{name}" for name in ("ModelCheckpoint", "EarlyStopping")),
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.lr_monitor.LearningRateMonitor",
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig")),
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean", "Enum", "Path")),
    "typing.Any",
    *(f"builtins.{name}" for name in ("dict", "list", "tuple", "str", "int", "float", "bool", "bytes")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray", "numpy.bool_", "numpy.float32", "numpy.float64", "numpy.int32", "numpy.int64"),
    *(f"pathlib.{name}" for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
)
_DICTIONARIES = {
    "pytorch_lightning.utilities.parsing.AttributeDict": dict,
    "collections.defaultdict": _empty,
    "argparse.Namespace": Recorded,
}


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """({dotted key: tensor}, {dotted key: anything else}) of a file.

    Raises:
        CheckpointError: it cannot be read, or holds more than data.
    """
    if file.suffix == ".pkl":
        raise CheckpointError(
            f"{file}: a pickle, which may carry code and is not opened. EDM2's networks (NVlabs/edm2): run "
            f"scripts/edm2_to_safetensors.py on it where their code is, and convert the file that it writes"
        )
    if file.suffix not in SUFFIXES:
        raise CheckpointError(f"{file}: expected a file of weights ({', '.join(SUFFIXES)})")
    try:
        with file.open("rb") as handle:
            start = handle.read(len(_LFS))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {first_line(error)}") from error
    if not start:
        raise CheckpointError(f"{file}: is empty. Get it again.")
    if start == _LFS:
        raise CheckpointError(f"{file}: is a pointer of git-lfs to the file, and not the file. Get it: git lfs pull")
    return _read_safetensors(file, start) if file.suffix == ".safetensors" else _read_torch(file)


def _read_safetensors(file: Path, start: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    header = int.from_bytes(start[:8], "little")
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
    if os.environ.get(_UNSAFE):
        raise CheckpointError(f"{file}: not opened while {_UNSAFE} is set: it lets a file run code. Unset it.")
    names = dict.fromkeys(_HARMLESS, Inert) | _DICTIONARIES
    harmless: list[Any] = [(stand_in, name) for name, stand_in in names.items()]
    try:
        with torch.serialization.safe_globals(harmless), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen unrelated classes for a broken file
        if isinstance(error, pickle.UnpicklingError) and (named := _CODE.search(str(error))):
            raise CheckpointError(
                f"{file}: holds more than tensors and plain data, and is not opened: it names {named[1]}, which is "
                f"code. Nothing of it was run. If you trust it, save its state_dict alone, as safetensors, where its "
                f"own code is."
            ) from error
        reason = _REASON.search(str(error))
        raise CheckpointError(
            f"{file}: cannot be read as PyTorch weights ({file.stat().st_size} bytes; it may be cut off, or something "
            f"else): {reason[1] if reason else first_line(error)} Get it again."
        ) from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{file}: expected a dictionary of tensors, found {type(loaded).__name__}")
    try:
        walked = [*islice(_leaves(loaded), _LEAVES + 1)]
    except RecursionError:
        walked = None
    if walked is None or len(walked) > _LEAVES:
        raise CheckpointError(f"{file}: holds itself, or more than {_LEAVES:,} values: not a checkpoint")
    leaves = dict(walked)
    if len(leaves) < len(walked):
        ((twice, _),) = Counter(key for key, _ in walked).most_common(1)
        raise CheckpointError(f"{file}: holds two values under one name, once in dictionaries and once flat: {twice}")
    tensors = {name: leaf.detach() for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    return tensors, {name: leaf for name, leaf in leaves.items() if name not in tensors}


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, what is there), empty containers too: whatever is walked through is counted."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, f"{key}.{index}")
    else:
        yield key, value


def first_line(error: Exception) -> str:
    """The first sentence of its message; its class where it says nothing."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    text = text.partition(". ")[0]
    return text if text.endswith(".") else f"{text}."
