"""A run's checkpoints: each one sealed, self-describing file, verified by its checksum before it is used.

A checkpoint is a dict: Lightning's keys (`state_dict`, `optimizer_states`, `loops`, ...) plus "ldm", which holds
{"format", "kind", "config", "data", "step", "images_seen", "versions", "latents", "metrics"}. Only tensors and plain
containers go in, so `weights_only=True` always loads what was saved.

If every rank saves its own shard, the file is small and names its shards ({"shards": {"folder", "files"}}, see
ldm/checkpoints/shards.py); loading it makes no difference.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm.checkpoints import former_keys, sealed_file, shards, state_tree
from ldm.errors import CheckpointError, ResourceError

SUFFIX = ".ckpt"
_QUARANTINE = ".corrupt"

log = logging.getLogger(__name__)


def save(path: Path, state: dict[str, Any]) -> None:
    """Publish `state` at `path`: at any moment either the old or the new file exists, and the new one is durable.

    With `state["shard"]` (see ldm/checkpoints/shards.py) every rank calls this, and only rank 0 publishes the file,
    after all shards. Ranks communicate only through the disk.

    Args:
        path: the file; missing folders are created.
        state: tensors and plain containers. `state["ldm"]["step"]`, else `state["global_step"]`, is its step.

    Raises:
        CheckpointError: a value that `weights_only=True` could not load again, named by its key.
        NumericError: a weight under `state["state_dict"]` is not finite.
        ResourceError: no space, no permission, a broken disk; the old file is intact.
        PeerError: another rank did not write its shard in time; the old file is intact.
    """
    path = Path(path)
    shard = state.get("shard")
    if shard is None:
        _seal(path, state)
        return
    folder = shards.folder_of(path, shard["folder"])
    if shard["rank"] != 0:
        shards.publish(folder, shard)
        return
    before = _shards_of(path)
    rest = {key: value for key, value in state.items() if key != "shard"}
    try:
        shards.publish(folder, shard)
        files = shards.await_all(folder, shard["world"], shard["timeout"])
        _seal(path, rest | {"shards": {"folder": folder.name, "files": files}})
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if before is not None:
        shutil.rmtree(before, ignore_errors=True)


def load(path: Path, map_location: Any = "cpu", assemble: bool = True) -> dict[str, Any]:
    """The checkpoint at `path`, after verifying its checksum; never runs code from the file.

    Args:
        path: a file that `save` wrote.
        map_location: as in `torch.load`.
        assemble: insert the shards' tensors, whole; False: None in their place, and the key "shards" is kept.

    Raises:
        CheckpointError: missing, truncated, damaged, of another program, or holding more than plain data.
    """
    path = Path(path)
    if (reason := fault(path)) is not None:
        raise CheckpointError(f"{path}: {reason}. Choose another checkpoint of the run, or its folder for the newest.")
    state = sealed_file.read(path, map_location)
    if "shards" not in state:
        return former_keys.current(state)
    if not assemble:
        return state  # under the keys that its shards have
    named = state.pop("shards")
    tensors = shards.assembled(shards.folder_of(path, named["folder"]), named["files"], str(map_location))
    whole: dict[str, Any] = state_tree.replaced(state, lambda key, leaf: tensors.get(key, leaf))
    return former_keys.current(whole)


def fault(path: Path) -> str | None:
    """Why the checkpoint cannot be trusted, or None; reads every byte of it, its shards included."""
    reason = sealed_file.fault(path)
    if reason is not None:
        return reason
    named = sealed_file.read(path, mapped=True).get("shards")
    return shards.fault(shards.folder_of(path, named["folder"]), named["files"]) if named else None


def newest(folder: Path) -> Path | None:
    """The valid checkpoint with the highest step inside, or None if the folder has none at all.

    Names and times are ignored. A bad file is renamed to `<name>.corrupt` with a warning, and the one before it
    is used.

    Raises:
        CheckpointError: there are checkpoints, but every one is damaged.
    """
    folder = Path(folder)
    files = sorted(folder.glob(f"*{SUFFIX}"), key=lambda file: (sealed_file.step(file), file.name), reverse=True)
    for file in files:
        reason = fault(file)
        if reason is None:
            return file
        _quarantine(file, reason)
    damaged = sorted(folder.glob(f"*{SUFFIX}{_QUARANTINE}"))
    if damaged:
        listing = "\n".join(f"  {file.name}: {fault(file) or 'set aside earlier'}" for file in damaged)
        raise CheckpointError(
            f"{folder}: every checkpoint is damaged:\n{listing}\n"
            f"Nothing is started from step 0 in their place: put a good copy there, or remove them to start afresh."
        )
    return None


def find(path: Path) -> Path:
    """The checkpoint meant by `path` (`~` is home): a file, a folder of checkpoints, or a run folder that has one.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder; expected a checkpoint or a run folder.")
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = newest(folder)
    if found is None:
        raise CheckpointError(f"{folder}: no checkpoint (*{SUFFIX}) in it; expected one of a run that has saved.")
    return found


def remove(path: Path) -> None:
    """Remove a checkpoint, and then its shards; for a link to one, only the link."""
    folder = None if path.is_symlink() else _shards_of(path)
    path.unlink(missing_ok=True)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(folder: Path) -> list[Path]:
    """Remove leftovers of killed saves: temporary files, shards that no checkpoint names; returns them.

    A running save of a single file holds a lock on it. Shards have none: call this only if no other process saves.
    """
    folder = Path(folder)
    swept = [file for file in sorted(folder.glob(f"*{SUFFIX}.tmp.*")) if sealed_file.abandoned(file)]
    for left in sorted(folder.glob(f"*{SUFFIX}.*{shards.SUFFIX}")):
        owner = f"{left.name.partition(SUFFIX)[0]}{SUFFIX}"
        # A checkpoint that was set aside keeps its shards, too; so does an unreadable one, in case it is repaired.
        files = [file for file in folder.glob(f"{owner}*") if file.is_file()]
        if not any(sealed_file.fault(file) or _shards_of(file) == left for file in files):
            shutil.rmtree(left, ignore_errors=True)
            swept.append(left)
    return swept


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


def _seal(path: Path, state: dict[str, Any]) -> None:
    state_tree.check_plain(state)
    state_tree.check_finite({f"state_dict.{name}": value for name, value in state.get("state_dict", {}).items()})
    step = int(state.get("ldm", {}).get("step", state.get("global_step", 0)))
    needed = state_tree.size(state)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError("not enough space")
        sealed_file.write(path, state, step)
    except OSError as error:
        raise ResourceError(_cannot_save(path, error, needed)) from error


def _shards_of(path: Path) -> Path | None:
    """The folder of shards that the file at `path` names, if it can be read."""
    try:
        named = sealed_file.read(path, mapped=True).get("shards")
        return shards.folder_of(path, named["folder"]) if named else None
    except (OSError, CheckpointError):
        return None


def _quarantine(file: Path, reason: str) -> None:
    aside = file.with_name(file.name + _QUARANTINE)
    try:
        file.rename(aside)
        outcome = f"kept aside as {aside.name}"
    except OSError as error:
        outcome = f"left in place ({error.strerror})"
    log.warning("checkpoint %s: %s; %s, the one before it is used", file, reason, outcome)


def _cannot_save(path: Path, error: OSError, needed: int) -> str:
    text = f"{path}: cannot save the checkpoint: {error.strerror or error}"
    if path.parent.is_dir():
        free = shutil.disk_usage(path.parent).free
        text += f"; free {free} bytes, needed about {needed} bytes"
    return f"{text}. An older file there is intact. Make room or permit writing in {path.parent}, then resume."
