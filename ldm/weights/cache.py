"""Where files of trained weights lie: found, verified, or reported as missing with all that it takes to get them."""

import os
from pathlib import Path

import torch

from ldm.errors import CheckpointError
from ldm.weights.catalog import FILES, WeightFile


def folder() -> Path:
    """ldm's own cache of weights: $LDM_WEIGHTS, or ldm/weights in the user's cache folder."""
    if own := os.environ.get("LDM_WEIGHTS"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm" / "weights"


def places(entry: WeightFile) -> list[Path]:
    """Where a file is looked for, in order."""
    return [folder() / entry.file, Path(torch.hub.get_dir()) / "checkpoints" / entry.file]


def find(name: str, given: Path | str | None = None) -> Path:
    """The file of a name in the catalog, or `given`.

    Raises:
        CheckpointError: there is none; names the file, its source, its hash and its place.
    """
    entry = FILES[name]
    for path in [Path(given)] if given is not None else places(entry):
        if path.is_file():
            return path
    where = given if given is not None else places(entry)[0]
    raise CheckpointError(
        f"{where}: no such file. It holds the weights of {entry.name} ({entry.use}), which are not downloaded "
        f"automatically: get {entry.source} (sha256 {entry.sha256}...) and put it there; `ldm weights` lists all files."
    )
