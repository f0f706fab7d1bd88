"""A run's checkpoints: each one sealed, self-describing file, verified by its checksum before it is used.

A checkpoint is a dict: Lightning's keys (`state_dict`, `optimizer_states`, `loops`, ...) plus "ldm", which holds
{"format", "kind", "config", "data", "step", "images_seen", "versions", "latents", "metrics"}. Only tensors and plain
containers go in, so `weights_only=True` always loads what was saved.

If every rank saves its own shard, the file is small and names its shards ({"shards": {"folder", "files"}}, see
ldm/checkpoints/shards.py); loading it makes no difference.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm.checkpoints import former_keys, sealed_file, shards, state_tree
from ldm.errors import CheckpointError, ResourceError

FORMAT = 1
"""Of the "ldm" key of a checkpoint."""
SUFFIX = ".ckpt"
_QUARANTINE = ".corrupt"

ReadShards = Callable[[Path], Mapping[str, Tensor]]

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
    before = shards_of(path)
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


@dataclass(frozen=True)
class Verified:
    """A checkpoint whose every byte has matched its checksum. One rank verifies, and all ranks load what it found.

    Attributes:
        path: the file.
        seal: its last bytes, which tell it from every other checkpoint.
        stamps: of the file and of each of its shards, taken before they were read: (bytes, time of the last change in
            nanoseconds).
    """

    path: Path
    seal: bytes
    stamps: Mapping[Path, tuple[int, int]]

    def is_unchanged(self) -> bool:
        """Whether the files are still the ones that were verified; reads none of them."""
        return all(_stamp(file) == stamp for file, stamp in self.stamps.items())


def verify(path: Path) -> Verified:
    """Find the checkpoint meant by `path` (`~` is home), and read every byte of it, its shards included, once.

    Args:
        path: a file; or a run folder or a folder of checkpoints, for the newest good one (see `newest`).

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = Path(path).expanduser()
    if path.is_file():
        found = _verify(path)
        if isinstance(found, str):
            raise CheckpointError(
                f"{path}: {found}. Choose another checkpoint of the run, or its folder for the newest."
            )
        return found
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder; expected a checkpoint or a run folder.")
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    newest = _newest(folder)
    if newest is None:
        raise CheckpointError(f"{folder}: no checkpoint (*{SUFFIX}) in it; expected one of a run that has saved.")
    return newest


def load(checkpoint: Path | Verified, read_shards: ReadShards | None = None, mapped: bool = False) -> dict[str, Any]:
    """The state that a checkpoint holds, on the CPU; never runs code from the file.

    It is verified first. If that was done before, by whichever rank, it is done again only where the files have
    changed since, or are this machine's own copies.

    Args:
        checkpoint: as in `verify`, or what that returned.
        read_shards: reads the tensors of a folder of shards, {key: tensor}, of which the caller takes its rows, as it
            does of those of a file without shards; None: all of them, whole.
        mapped: memory-map the file, for a caller that copies what it needs.

    Raises:
        CheckpointError: missing, truncated, damaged, replaced while it was read, of another program, or holding more
            than plain data.
    """
    verified = checkpoint if isinstance(checkpoint, Verified) else verify(checkpoint)
    if not verified.is_unchanged():
        own = verify(verified.path)
        if own.seal != verified.seal:
            raise CheckpointError(f"{verified.path}: was replaced after it had been verified. Start again.")
        verified = own
    # A rank that takes its rows of each tensor needs no copy of all of them: the file is mapped, once a machine.
    state = sealed_file.read(verified.path, mapped=mapped or read_shards is not None)
    if (named := state.pop("shards", None)) is not None:
        folder = shards.folder_of(verified.path, named["folder"])
        tensors = read_shards(folder) if read_shards else shards.assembled(folder, [*named["files"]])
        state = state_tree.replaced(state, lambda key, leaf: tensors.get(key, leaf))
    if not verified.is_unchanged():
        # A new mode or a hard link changes the stamps, too.
        again = _verify(verified.path)
        if isinstance(again, str) or again.seal != verified.seal:
            raise CheckpointError(f"{verified.path}: was replaced while it was read. Start again.")
    return former_keys.current(state)


def record(path: Path) -> dict[str, Any]:
    """A checkpoint's metadata, its key "ldm", empty where it has none; not verified, and read without the tensors.

    Raises:
        CheckpointError: it cannot be read, or holds more than plain data.
    """
    found = sealed_file.read(path, mapped=True).get("ldm")
    return found if isinstance(found, dict) else {}


def is_untrained(state: Mapping[str, Any]) -> bool:
    """Whether a loaded checkpoint is a converted one, from which training starts with a fresh optimizer."""
    facts = state.get("ldm")
    converted = isinstance(facts, dict) and "origin" in facts and facts.get("step") == 0
    return converted and not state.get("optimizer_states")


_STAGES = {"autoencoder": "an autoencoder (stage 1)", "diffusion": "a diffusion model (stage 2)"}


def facts(state: Mapping[str, Any], kind: str, file: Path) -> dict[str, Any]:
    """The metadata of a loaded checkpoint, which must be of `kind`: "autoencoder" or "diffusion".

    Raises:
        CheckpointError: it is of another kind, or was not saved by ldm; names `file`.
    """
    found = state.get("ldm")
    if isinstance(found, dict) and found.get("kind") == kind:
        return found
    other = f"one of kind {found.get('kind')!r}" if isinstance(found, dict) else "one that was not saved by ldm"
    raise CheckpointError(
        f"{file}: expected the checkpoint of {_STAGES[kind]}, found {other}. Name a run folder of that stage."
    )


def fault(path: Path) -> str | None:
    """Why the checkpoint cannot be trusted, or None; reads every byte of it, its shards included."""
    found = _verify(path)
    return found if isinstance(found, str) else None


def newest(folder: Path) -> Path | None:
    """The valid checkpoint with the highest step inside, or None if the folder has none at all.

    Names and times are ignored. A bad file is renamed to `<name>.corrupt` with a warning, and the one before it
    is used.

    Raises:
        CheckpointError: there are checkpoints, but every one is damaged.
    """
    found = _newest(Path(folder))
    return None if found is None else found.path


def has_any(folder: Path) -> bool:
    """Whether there are checkpoints in the folder, good or damaged; reads none of them."""
    return any(any(folder.glob(f"*{SUFFIX}{ending}")) for ending in ("", _QUARANTINE))


def remove(path: Path) -> None:
    """Remove a checkpoint, and then its shards; for a link to one, only the link."""
    folder = None if path.is_symlink() else shards_of(path)
    path.unlink(missing_ok=True)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def shards_of(path: Path) -> Path | None:
    """The folder of shards that the file at `path` names; None: it names none, or cannot be read."""
    try:
        named = sealed_file.read(path, mapped=True).get("shards")
        return shards.folder_of(path, named["folder"]) if named else None
    except (OSError, CheckpointError):
        return None


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


def _verify(path: Path) -> Verified | str:
    """The checkpoint, if every byte of it is as it was written; else why it cannot be trusted."""
    stamps, seal = {path: _stamp(path)}, sealed_file.seal(path)
    reason = sealed_file.fault(path)
    if reason is None and (named := sealed_file.read(path, mapped=True).get("shards")):
        folder = shards.folder_of(path, named["folder"])
        stamps |= {file: _stamp(file) for file in (folder / Path(name).name for name in named["files"])}
        reason = shards.fault(folder, named["files"])
    return Verified(path, seal, stamps) if reason is None else reason


def _stamp(file: Path) -> tuple[int, int]:
    """Changes with every write to the file, and when another is put in its place, whatever that one's dates."""
    try:
        status = file.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_ctime_ns


def _newest(folder: Path) -> Verified | None:
    files = sorted(folder.glob(f"*{SUFFIX}"), key=lambda file: (sealed_file.step(file), file.name), reverse=True)
    for file in files:
        found = _verify(file)
        if isinstance(found, Verified):
            return found
        _quarantine(file, found)
    damaged = sorted(folder.glob(f"*{SUFFIX}{_QUARANTINE}"))
    if damaged:
        listing = "\n".join(f"  {file.name}: {fault(file) or 'set aside earlier'}" for file in damaged)
        raise CheckpointError(
            f"{folder}: every checkpoint is damaged:\n{listing}\n"
            f"Nothing is started from step 0 in their place: put a good copy there, or remove them to start afresh."
        )
    return None


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
