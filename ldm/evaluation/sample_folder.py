"""A folder of pictures: a PNG each, a sheet of them all, and samples.json, which says how they were made."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm.data.images import read_image
from ldm.errors import ConfigError
from ldm.evaluation.generate import Sample
from ldm.evaluation.sheets import grid, picture

SHOWN = 16
"""The grid has at most so many rows and columns."""


class Order(NamedTuple):
    """One picture to be made: `label` None for a model without classes."""

    label: int | None
    seed: int

    @property
    def file(self) -> str:
        return f"{self.seed:06d}.png" if self.label is None else f"{self.label:03d}-{self.seed:06d}.png"

    def name(self, names: Sequence[str] | None) -> str | None:
        """Of the class."""
        return None if names is None or self.label is None else names[self.label]


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make `folder`, or make sure that the pictures in it were made with these settings.

    Raises:
        ConfigError: it holds something else.
    """
    record = folder / "samples.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        return
    if not record.is_file():
        raise ConfigError(f"--out {folder}: holds files, but none of sample.py. Name an empty or a new folder.")
    there = json.loads(record.read_text())["settings"]
    keys = dict.fromkeys([*settings, *there])
    different = [
        f"{key}: {there.get(key)} there, {settings.get(key)} now" for key in keys if there.get(key) != settings.get(key)
    ]
    if different:
        differences = "; ".join(different)
        raise ConfigError(f"--out {folder}: holds pictures of other settings ({differences}). Name another folder.")


def save(folder: Path, sample: Sample) -> None:
    """Write one picture, whole or not at all."""
    path = folder / Order(sample.label, sample.seed).file
    temporary = path.with_suffix(".tmp")
    picture(sample.image).save(temporary, format="png")
    os.replace(temporary, path)


def sheet(folder: Path, labels: Sequence[int | None], seeds: Sequence[int]) -> np.ndarray:
    """The grid: a row a class, or a square of a single one; the first SHOWN rows and columns."""
    if len(labels) == 1:
        columns = min(SHOWN, math.ceil(math.sqrt(len(seeds))))
        seeds = seeds[: SHOWN * columns]
    else:
        columns = min(SHOWN, len(seeds))
        seeds = seeds[:columns]
    shown = [Order(label, seed).file for label in labels[:SHOWN] for seed in seeds]
    return grid([_read(folder / file) for file in shown], columns)


def _read(path: Path) -> np.ndarray:
    return np.atleast_3d(np.asarray(read_image(path)))


_LONGEST = 255  # bytes of a name
ALWAYS = ("checkpoint", "step", "weights", "sampler", "grid", "steps", "eta", "guidance")
"""Settings of every folder; others are named where they were asked for."""


def default_folder(settings: Mapping[str, Any]) -> Path:
    """<run>/samples/<settings>: other settings, another folder; of an average, say, named after its file, too."""
    file = Path(settings["checkpoint"])
    regular = file.parent.name == "checkpoints"
    run, which = (file.parent.parent, "") if regular else (file.parent, f"{file.stem}-")
    eta = f"-eta{settings['eta']:g}" if settings["eta"] else ""
    spacing = "" if settings["grid"] == "default" else f"-{settings['grid']}"
    name = f"{which}step{settings['step']}-{settings['weights']}-{settings['sampler']}{settings['steps']}{spacing}{eta}"
    more = "".join(f"-{key}{_worded(value)}" for key, value in settings.items() if key not in ALWAYS)
    return run / "samples" / _folder_name(f"{name}-guidance{settings['guidance']:g}{more}")


def _folder_name(text: str) -> str:
    """`text`, of which some may be a stranger's, without slashes and no longer than a file system takes."""
    name = re.sub(r"[/\0]", "_", text)
    if len(os.fsencode(name)) <= _LONGEST:
        return name
    kept = os.fsencode(name)[: _LONGEST - 17].decode(errors="ignore")
    return f"{kept}-{sha256(os.fsencode(name)).hexdigest()[:16]}"


def _worded(value: Any) -> str:
    """A setting in a folder's name: of a file its own name and a bit of its hash."""
    if isinstance(value, Mapping):
        return f"_{Path(value['file']).stem}_{value['sha256'][:6]}"
    if isinstance(value, str):
        return f"_{sha256(value.encode()).hexdigest()[:6]}"
    return "_".join(f"{one:g}" for one in value) if isinstance(value, list) else f"{value:g}"
