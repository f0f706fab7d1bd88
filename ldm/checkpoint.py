"""One self-describing file per checkpoint: written aside and synced, proven by a checksum before it is used.

A file is what `torch.save` writes, plus a seal of 35 bytes behind the zip archive (zip readers skip it):

    newline "ldm" space step (20 digits) space crc32 (8 hex digits) newline

The CRC covers every byte before itself, so any single flipped byte and any truncation is found, headers and padding
included; torch checks none of it on reading. The step in the seal lets the newest file of a folder be found without
unpickling anything. Only tensors and plain containers go in, so `weights_only=True` always loads what was saved.

A checkpoint is a dict: Lightning's keys (`state_dict`, `optimizer_states`, `loops`, ...) plus "ldm", which holds
{"format", "kind", "config", "step", "images_seen", "versions", "latents", "metrics"}.
"""

import fcntl
import logging
import os
import pickle
import re
import shutil
import socket
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from ldm.errors import CheckpointError, NumericError, ResourceError

SUFFIX = ".ckpt"
_QUARANTINE = ".corrupt"
_SEAL = re.compile(rb"\nldm (\d{20}) ([0-9a-f]{8})\n")
_SEAL_BYTES = 35
_CRC_BYTES = 9  # the seal's end, which the CRC cannot cover: eight digits and a newline
_CHUNK = 1 << 20
_UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_LEAVES = (type(None), bool, int, float, complex, str, bytes, Tensor, torch.nn.Parameter, torch.dtype, torch.device)
_CONTAINERS = (dict, OrderedDict, list, tuple, set, torch.Size)

log = logging.getLogger(__name__)


def save(path: Path, state: dict[str, Any]) -> None:
    """Publish `state` at `path`: the old file or the new one is there at any moment, and the new one is durable.

    Args:
        path: the file; missing folders are made.
        state: tensors and plain containers. `state["ldm"]["step"]`, else `state["global_step"]`, is its step.

    Raises:
        CheckpointError: a value that `weights_only=True` could not load again, named by its key.
        NumericError: a weight under `state["state_dict"]` is not finite.
        ResourceError: no space, no permission, a broken disk; the old file is intact.
    """
    path = Path(path)
    _check_plain(state)
    _check_finite(state.get("state_dict", {}))
    step = int(state.get("ldm", {}).get("step", state.get("global_step", 0)))
    needed = _size(state)
    temporary = path.with_name(f"{path.name}.tmp.{socket.gethostname()}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < needed:
            raise OSError("not enough space")
        _write(temporary, state, step)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise ResourceError(_cannot_save(path, error, needed)) from error
    finally:
        with suppress(OSError):  # after the rename there is none
            temporary.unlink()


def load(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The checkpoint at `path`, after its checksum was verified; never runs code from the file.

    Args:
        path: a file that `save` wrote.
        map_location: as in `torch.load`.

    Raises:
        CheckpointError: missing, truncated, damaged, of another program, or holding more than plain data.
    """
    path = Path(path)
    if os.environ.get(_UNSAFE):
        raise CheckpointError(f"{path}: not loaded while {_UNSAFE} is set: it lets a checkpoint run code. Unset it.")
    reason = _fault(path)
    if reason is not None:
        raise CheckpointError(f"{path}: {reason}. Choose another checkpoint of the run, or its folder for the newest.")
    with path.open("rb") as file:
        try:
            state: dict[str, Any] = torch.load(file, map_location=map_location, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{path}: not a checkpoint that can be loaded safely: {first_line}") from error
    return state


def newest(folder: Path) -> Path | None:
    """The good checkpoint with the highest step inside, or None where the folder has none at all.

    Names and times are not looked at. A bad file is renamed to `<name>.corrupt` with a warning, and the one before it
    is used.

    Raises:
        CheckpointError: there are checkpoints, but every one is damaged.
    """
    folder = Path(folder)
    files = sorted(folder.glob(f"*{SUFFIX}"), key=lambda file: (_sealed_step(file), file.name), reverse=True)
    for file in files:
        reason = _fault(file)
        if reason is None:
            return file
        _quarantine(file, reason)
    damaged = sorted(folder.glob(f"*{SUFFIX}{_QUARANTINE}"))
    if damaged:
        listing = "\n".join(f"  {file.name}: {_fault(file) or 'set aside earlier'}" for file in damaged)
        raise CheckpointError(
            f"{folder}: every checkpoint is damaged:\n{listing}\n"
            f"Nothing is started from step 0 in their place: put a good copy there, or remove them to start afresh."
        )
    return None


def find(path: Path) -> Path:
    """The checkpoint meant by `path`: a file, a folder of checkpoints, or a run folder that has one.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder; expected a checkpoint or a run folder.")
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = newest(folder)
    if found is None:
        raise CheckpointError(f"{folder}: no checkpoint (*{SUFFIX}) in it; expected one of a run that has saved.")
    return found


def sweep(folder: Path) -> list[Path]:
    """Remove the temporary files of savers that died; returns them. A living saver holds a lock on its own."""
    swept = []
    for file in sorted(Path(folder).glob(f"*{SUFFIX}.tmp.*")):
        try:
            with file.open("rb") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.unlink()
        except OSError:
            continue  # its owner lives, or another rank was faster
        swept.append(file)
    return swept


class _Summing:
    """A binary file that keeps the CRC-32 of what passes through it, and the error that stopped it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.crc = 0
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        self.crc = zlib.crc32(data, self.crc)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _write(temporary: Path, state: dict[str, Any], step: int) -> None:
    with temporary.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells `sweep` that the owner lives
        summing = _Summing(file)
        try:
            torch.save(state, cast(IO[bytes], summing))  # it needs no more than write and flush
        except RuntimeError as error:  # what torch makes of a full disk
            raise summing.error or error from error
        summing.write(b"\nldm %020d " % step)
        summing.write(b"%08x\n" % summing.crc)
        file.flush()
        os.fsync(file.fileno())


def _fault(path: Path) -> str | None:
    """Why the file cannot be trusted, or None; reads all of it (about 2 GB/s where it is cached)."""
    try:
        with path.open("rb", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            seal = _read_seal(file)
            if size == 0:
                return "empty file"
            if seal is None:
                return "truncated, damaged, or not saved by ldm (no seal at its end)"
            file.seek(0)
            crc, left = 0, size - _CRC_BYTES
            while left and (data := file.read(min(_CHUNK, left))):
                crc, left = zlib.crc32(data, crc), left - len(data)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if crc == int(seal[2], 16) else f"damaged: its bytes sum to {crc:08x}, expected {seal[2].decode()}"


def _read_seal(file: Any) -> re.Match[bytes] | None:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _SEAL_BYTES))
    return _SEAL.fullmatch(file.read(_SEAL_BYTES))


def _sealed_step(path: Path) -> int:
    """The step in the seal, unproven; higher than any step where there is no seal, so that it is looked at first."""
    try:
        with path.open("rb", buffering=0) as file:
            seal = _read_seal(file)
    except OSError:
        seal = None
    return int(seal[1]) if seal else 10**20


def _quarantine(file: Path, reason: str) -> None:
    aside = file.with_name(file.name + _QUARANTINE)
    try:
        file.rename(aside)
        outcome = f"kept aside as {aside.name}"
    except OSError as error:
        outcome = f"left in place ({error.strerror})"
    log.warning("checkpoint %s: %s; %s, the one before it is used", file, reason, outcome)


def _walk(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every leaf with its dotted key; a container of a foreign type counts as a leaf."""
    if type(value) not in _CONTAINERS:
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield f"{key}: a key", name
            yield from _walk(item, f"{key}.{name}" if key else str(name))
    else:
        for index, item in enumerate(value):
            yield from _walk(item, f"{key}[{index}]")


def _check_plain(state: dict[str, Any]) -> None:
    for key, value in _walk(state, ""):
        if type(value) not in _LEAVES and type(value) not in _CONTAINERS:
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise CheckpointError(
                f"checkpoint key {key}: {kind} cannot be saved; expected a tensor, number, string or a plain "
                f"container of them, which load without running code. Convert it (float(x), str(x), dict(x), ...)."
            )


def _check_finite(weights: dict[str, Any]) -> None:
    for name, value in weights.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise NumericError(
                f"checkpoint key state_dict.{name}: not finite, so nothing was saved; the last checkpoint stands."
            )


def _size(state: dict[str, Any]) -> int:
    """About how many bytes `state` will take: the storages, each once, and a margin for keys and headers."""
    storages, leaves = {}, 0
    for _, value in _walk(state, ""):
        leaves += 1
        if isinstance(value, Tensor) and value.device.type != "meta":
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()) + 256 * leaves + _CHUNK


def _cannot_save(path: Path, error: OSError, needed: int) -> str:
    text = f"{path}: cannot save the checkpoint: {error.strerror or error}"
    if path.parent.is_dir():
        free = shutil.disk_usage(path.parent).free
        text += f"; free {free} bytes, needed about {needed} bytes"
    return f"{text}. An older file there is intact. Make room or permit writing in {path.parent}, then resume."


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fill(module: nn.Module, state_dict: Mapping[str, Tensor], name: str, file: Path) -> None:
    """Load the checkpoint's weights `name`.*, all of them, into `module`.

    Raises:
        CheckpointError: they do not fit; names `file`.
    """
    prefix = f"{name}."
    own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    try:
        module.load_state_dict(own)
    except RuntimeError as error:
        raise CheckpointError(
            f"{file}: the weights of the {name} do not fit the configuration stored beside them: {error}. "
            f"The file was put together by hand, or by another version of ldm."
        ) from error
