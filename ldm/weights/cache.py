"""Where files of trained weights lie: found, verified, or reported as missing with all that it takes to get them."""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ldm.errors import CheckpointError
from ldm.files import expanded, published
from ldm.weights.catalog import FILES, WeightFile

_MORE = "Nothing is downloaded while something runs; `ldm weights` lists all files."


def folder() -> Path:
    """ldm's own cache of weights: $LDM_WEIGHTS, or ldm/weights in the user's cache folder."""
    if own := os.environ.get("LDM_WEIGHTS"):
        return Path(expanded(own))
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm" / "weights"


def places(entry: WeightFile) -> list[Path]:
    """Where a file is looked for, in order: ldm's own cache, then that of the library that uses it as well."""
    return [folder() / entry.file, *entry.source.places(Path(entry.file).name)]


def find(name: str, given: Path | str | None = None) -> Path:
    """The file of a name in the catalog, verified by its hash; of Hugging Face's models `model.safetensors`.

    Args:
        name: in the catalog.
        given: a file, or a folder that holds it; None: the caches are searched.

    Raises:
        CheckpointError: there is none, or it is another file; names file, source, hash, place and how to get it.
    """
    entry = FILES[name]
    path = _located(entry, given)
    if path is None:
        raise CheckpointError(f"{_missing(entry, given)}\n{_MORE}")
    verify(entry, path)
    return path


def find_any(names: Sequence[str]) -> Path:
    """The first of several files that is there, any of which would do.

    Raises:
        CheckpointError: none is there, or the first one that is there is not what it should be.
    """
    there = [name for name in names if _located(FILES[name], None) is not None]
    if not there:
        raise CheckpointError("\nor ".join(_missing(FILES[name], None) for name in names) + f"\n{_MORE}")
    return find(there[0])


def verify(entry: WeightFile, path: Path) -> None:
    """Raises CheckpointError if it, or a file beside it, is not the one that the catalog knows.

    What has no hash there is taken as it is.
    """
    beside = [(path.parent / other.name, other.sha256) for other in entry.beside]
    for file, expected in [(path, entry.sha256), *beside]:
        if expected and not (found := sha256(file)).startswith(expected):
            raise CheckpointError(
                f"{file}: not {entry.name} from {entry.source}: expected sha256 {expected}, found {found}. Remove it, "
                f"and get the right one: {entry.source.command(entry.name, folder() / entry.file)}"
            )


def sha256(path: Path) -> str:
    """The SHA-256 of a file, hex. Remembered in ldm's cache, where that can be written to, until the file changes."""
    path, status = path.resolve(), path.stat()
    state = [status.st_size, status.st_mtime_ns, status.st_ino]
    index, known = folder() / "sha256.json", {}
    with suppress(OSError, ValueError):
        known = json.loads(index.read_text())
    with suppress(LookupError, TypeError, ValueError, AttributeError):  # whatever else may stand there
        *before, digest = known[str(path)]
        if before == state:
            return str(digest)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with suppress(OSError, TypeError):
        index.parent.mkdir(parents=True, exist_ok=True)
        with published(index, durable=False) as aside:
            aside.write_text(json.dumps({**known, str(path): [*state, digest]}, indent=0))
    return digest


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of one that torch wrote, by name, on the CPU; no code in it is run.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error}). Get the file again.") from error
    except Exception as error:  # torch.load raises half a dozen unrelated classes for a broken file
        raise CheckpointError(f"{path}: cannot be read as PyTorch weights ({error}). Get the file again.") from error


def _located(entry: WeightFile, given: Path | str | None) -> Path | None:
    if given is None:
        candidates = places(entry)
    else:
        path = Path(expanded(str(given)))
        candidates = [path / Path(entry.file).name if path.is_dir() else path]
    for path in candidates:
        if path.is_file() and all((path.parent / other.name).is_file() for other in entry.beside):
            return path
    return None


def _missing(entry: WeightFile, given: Path | str | None) -> str:
    place, *others = [Path(expanded(str(given)))] if given is not None else places(entry)
    files = " and ".join((Path(entry.file).name, *(other.name for other in entry.beside)))
    also = "".join(f" (nor {other})" for other in others)
    return (
        f"{place}: no such file{also}. Expected {files} of {entry.name} ({entry.use}), {entry.size / 1e6:,.0f} MB, "
        f"sha256 {entry.sha256 or 'not known'}, from {entry.source}; get it: "
        f"{entry.source.command(entry.name, folder() / entry.file)}"
    )
