"""The shard files of a checkpoint: every rank's share of the tensors, written and read without communication.

    checkpoints/
        step=00001000.ckpt                    sealed, small: everything but the sharded tensors, and {"shards": ...}
        step=00001000.ckpt.1f0c9a3e.shards/
            rank-00000-of-00002.safetensors   rows of each tensor, and where they belong
            rank-00000-of-00002.json          its CRC-32: the sign that the file is complete and durable
            rank-00001-of-00002...

A rank publishes its file, then the note beside it; rank 0 waits for all notes on disk and seals the `.ckpt` last. So a
sealed file means that all its shards are durable, and a save that was killed leaves a folder that no `.ckpt` names.
The safetensors files store for each tensor where its rows begin, in the format of torch.distributed.checkpoint, whose
HuggingFaceStorageReader reads them on any number of ranks. Nothing here is ever unpickled.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoints import state_tree
from ldm.errors import CheckpointError, LdmError, NumericError, PeerError, ResourceError
from ldm.files import crc32, published, write_text

SUFFIX = ".shards"
OFFSETS = "DCP_SHARDING_INFO"
"""The key under which torch.distributed.checkpoint looks for the places of a file's tensors."""

_POLL = 0.02  # seconds

Shard = Mapping[str, Any]
"""A rank's share of a save, in plain containers: {"folder": name, "rank", "world", "timeout": seconds to wait for the
others, "tensors": {key: rows}, "offsets": {key: [first row, 0, ...]}}."""


def folder_of(path: Path, name: str) -> Path:
    """The folder of shards `name` of the checkpoint at `path`.

    Raises:
        CheckpointError: the name, which was read from a file, points elsewhere.
    """
    if Path(name).name != name or not name.endswith(SUFFIX) or (path.parent / name).is_symlink():
        raise CheckpointError(f"{path}: names {name!r} as its folder of shards, which is none beside it.")
    return path.parent / name


def publish(folder: Path, shard: Shard) -> None:
    """Write this rank's file, make it durable, and note that it is there; the note names the error if that fails.

    Raises:
        NumericError: a weight is not finite.
        ResourceError: no space, no permission, a broken disk.
    """
    path = folder / _name(shard["rank"], shard["world"])
    tensors = {key: tensor.contiguous() for key, tensor in shard["tensors"].items() if tensor.numel()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state_tree.check_finite({key: tensor for key, tensor in tensors.items() if key.startswith("state_dict.")})
        needed = state_tree.size(tensors)
        if (free := shutil.disk_usage(folder).free) < needed:
            raise ResourceError(f"{path}: cannot be written: free {free} bytes, needed about {needed} bytes")
        record = {"crc32": _write(path, tensors, shard["offsets"])}
        write_text(path.with_suffix(".json"), json.dumps(record))
    except (LdmError, OSError, SafetensorError) as error:
        failure = error if isinstance(error, LdmError) else ResourceError(f"{path}: cannot be written: {error}")
        record = {"error": str(failure), "kind": type(failure).__name__}
        with suppress(OSError):  # then the others time out
            write_text(path.with_suffix(".json"), json.dumps(record))
        raise failure from error


def await_all(folder: Path, world: int, timeout: float) -> dict[str, str]:
    """Wait until every rank has published; returns {file name: CRC-32 in hexadecimal}.

    Raises:
        NumericError, ResourceError: a rank could not write its file.
        PeerError: a rank did not publish within `timeout` seconds.
    """
    names = [_name(rank, world) for rank in range(world)]
    notes: dict[str, dict[str, str]] = {}
    end = time.monotonic() + timeout
    for name in names:  # one after another, so that waiting for many ranks asks for one file at a time
        file = (folder / name).with_suffix(".json")
        while not file.exists():
            if time.monotonic() > end:
                missing = ", ".join(one for one in names if not (folder / one).with_suffix(".json").exists())
                raise PeerError(f"{folder}: not written within {timeout:g} s: {missing}. Was a rank lost?")
            time.sleep(_POLL)
        notes[name] = json.loads(file.read_text())
    for name, note in notes.items():
        if "error" in note:
            kind = NumericError if note["kind"] == NumericError.__name__ else ResourceError
            raise kind(f"{name}: {note['error']}")
    return {name: notes[name]["crc32"] for name in names}


def fault(folder: Path, files: Mapping[str, str]) -> str | None:
    """Why the shards cannot be trusted, or None; reads all of them."""
    for name, expected in files.items():
        try:
            found = crc32(folder / Path(name).name)
        except OSError as error:
            return f"its shard {folder.name}/{name} cannot be read ({error.strerror})"
        if found != expected:
            return f"its shard {folder.name}/{name} is damaged: its bytes sum to {found}, expected {expected}"
    return None


def assembled(folder: Path, files: Sequence[str]) -> dict[str, Tensor]:
    """The whole tensors, on the CPU; {key: tensor}."""
    pieces: dict[str, dict[int, Tensor]] = {}  # of each key: {first row: rows}
    for name in files:
        with safe_open(folder / Path(name).name, framework="pt") as file:
            places = json.loads(file.metadata()[OFFSETS])
            for key in places:
                pieces.setdefault(key, {})[places[key]["saved_offsets"][0]] = file.get_tensor(key)
    return {key: torch.cat([rows[first] for first in sorted(rows)]) for key, rows in pieces.items()}


def _name(rank: int, world: int) -> str:
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"


def _write(path: Path, tensors: dict[str, Tensor], offsets: Mapping[str, list[int]]) -> str:
    """Returns the CRC-32 of the file's bytes."""
    places = {key: {"saved_offsets": list(offsets[key])} for key in tensors}
    with published(path) as aside:
        save_file(tensors, aside, {"format": "pt", OFFSETS: json.dumps(places)})
        return crc32(aside)
