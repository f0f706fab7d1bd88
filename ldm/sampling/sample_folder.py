"""A folder of samples: one PNG each, and samples.json, which records how they were made and lists all of them.

Several calls may fill a folder, one after another or at once, and any of them may be interrupted: each file is written
whole or not at all, and the list describes the folder itself, not one call.
"""

import fcntl
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ldm.data.decoding import read_array
from ldm.errors import ConfigError
from ldm.files import published, write_text
from ldm.images import FILED, grid, picture, visible
from ldm.sampling.generate import Sample

SHOWN = 16
"""The maximum number of rows and columns of the sheet."""


class Order(NamedTuple):
    """One image to generate: `label` None for a model without classes."""

    label: int | None
    seed: int

    @property
    def file(self) -> str:
        return f"{self.seed:06d}.png" if self.label is None else f"{self.label:03d}-{self.seed:06d}.png"

    @classmethod
    def of(cls, file: str) -> "Order | None":
        """Parsed from a file name; None if it is not that of a sample."""
        found = re.fullmatch(r"(?:(\d+)-)?(\d+)\.png", file)
        if found is None:
            return None
        order = cls(None if found[1] is None else int(found[1]), int(found[2]))
        return order if order.file == file else None

    def name(self, names: Sequence[str] | None) -> str | None:
        """The name of the class."""
        return None if names is None or self.label is None else names[self.label]


def claim(folder: Path, settings: Mapping[str, Any], names: Sequence[str] | None) -> None:
    """Create `folder`, or make sure that the images in it were made with these settings; starts its samples.json.

    Args:
        settings: how the images are made, in plain values.
        names: of the classes.

    Raises:
        ConfigError: it holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check(folder, settings)  # before anything is written into a folder that may not be ours
    with _locked(folder):
        _check(folder, settings)
        _list(folder, settings, names)


def record(folder: Path, settings: Mapping[str, Any], names: Sequence[str] | None) -> None:
    """Bring samples.json up to date: every image in the folder, class by class, whichever call made it."""
    with _locked(folder):
        _list(folder, settings, names)


def _check(folder: Path, settings: Mapping[str, Any]) -> None:
    there = folder / "samples.json"
    if not there.is_file():
        if any(path.name != _LOCK and ".tmp." not in path.name for path in folder.iterdir()):
            raise ConfigError(f"--out {folder}: holds files that are not samples. Name an empty or a new folder.")
        return
    try:
        found = {_FORMER.get(key, key): value for key, value in json.loads(there.read_text())["settings"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{there}: is not a record of sample.py. Name another folder with --out.") from None
    keys = dict.fromkeys([*settings, *found])
    different = [
        f"{key}: {found.get(key)} there, {settings.get(key)} now" for key in keys if found.get(key) != settings.get(key)
    ]
    if different:
        differences = "; ".join(different)
        raise ConfigError(f"--out {folder}: holds pictures of other settings ({differences}). Name another folder.")


def _list(folder: Path, settings: Mapping[str, Any], names: Sequence[str] | None) -> None:
    found = (Order.of(path.name) for path in folder.iterdir())
    orders = sorted((order for order in found if order is not None), key=lambda order: (order.label or 0, order.seed))
    images = [{"file": order.file, **order._asdict(), "name": order.name(names)} for order in orders]
    write_text(folder / "samples.json", json.dumps({"settings": settings, "images": images}, indent=1) + "\n")


_LOCK = ".lock"
_FORMER = {"grid": "schedule", "worse": "guide"}
"""Former names of settings in samples.json -> their present names."""


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Within the block no other call lists the folder; the kernel releases the lock, however a call ends."""
    with (folder / _LOCK).open("a") as handle:
        with suppress(OSError):  # a file system without locks: concurrent calls may miss each other's last images
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def save(folder: Path, sample: Sample) -> None:
    """Write one picture, whole or not at all: gray, RGB or RGBA; with another number of channels, also as an array.

    Then the PNG shows the channels (ldm/images.py), and a .npy of its name, written first, holds them: (H,W,C) uint8.
    """
    path, image = folder / Order(sample.label, sample.seed).file, sample.image
    if image.shape[2] not in FILED:
        with published(path.with_suffix(".npy"), durable=False) as file, file.open("wb") as handle:
            np.save(handle, image)
        image = visible(image)
    with published(path, durable=False) as file:
        picture(image).save(file, format="png")


def save_arrays(folder: Path, orders: Sequence[Order]) -> Path:
    """Write samples.npz of these images: arr_0 (N,H,W,C) uint8, gray ones as C = 3, and their file names (N,)."""
    read = [_read(folder / order.file) for order in orders]
    arrays = [image.repeat(3, axis=2) if image.shape[2] == 1 else image for image in read]
    with published(folder / "samples.npz", durable=False) as file, file.open("wb") as handle:
        np.savez(handle, arr_0=np.stack(arrays), names=np.array([order.file for order in orders]))
    return folder / "samples.npz"


def sheet(folder: Path, labels: Sequence[int | None], seeds: Sequence[int]) -> np.ndarray:
    """The sheet: one row per class, or a square for a single class; the first SHOWN rows and columns."""
    if len(labels) == 1:
        columns = min(SHOWN, math.ceil(math.sqrt(len(seeds))))
        seeds = seeds[: SHOWN * columns]
    else:
        columns = min(SHOWN, len(seeds))
        seeds = seeds[:columns]
    shown = [Order(label, seed).file for label in labels[:SHOWN] for seed in seeds]
    return grid([_read(folder / file) for file in shown], columns)


def _read(path: Path) -> np.ndarray:
    """All channels of a saved picture: (H,W,C) uint8."""
    array = path.with_suffix(".npy")
    if array.is_file():
        return read_array(array)
    with Image.open(path) as image:
        return np.atleast_3d(np.asarray(image))


_LONGEST = 255  # bytes of a name
ALWAYS = ("checkpoint", "step", "weights", "sampler", "schedule", "steps", "eta", "guidance")
"""Settings that every folder's name covers; others are appended only if they were requested."""


def default_folder(settings: Mapping[str, Any]) -> Path:
    """<run>/samples/<settings>, one folder per settings; for a file outside checkpoints/, also named after the file."""
    file = Path(settings["checkpoint"])
    regular = file.parent.name == "checkpoints"
    run, which = (file.parent.parent, "") if regular else (file.parent, f"{file.stem}-")
    eta = f"-eta{settings['eta']:g}" if settings["eta"] else ""
    spacing = "" if settings["schedule"] == "default" else f"-{settings['schedule']}"
    name = f"{which}step{settings['step']}-{settings['weights']}-{settings['sampler']}{settings['steps']}{spacing}{eta}"
    more = "".join(f"-{key}{_worded(value)}" for key, value in settings.items() if key not in ALWAYS)
    return run / "samples" / _folder_name(f"{name}-guidance{settings['guidance']:g}{more}")


def _folder_name(text: str) -> str:
    """`text`, parts of which may be untrusted, without slashes and no longer than a file system allows."""
    name = re.sub(r"[/\0]", "_", text)
    if len(os.fsencode(name)) <= _LONGEST:
        return name
    kept = os.fsencode(name)[: _LONGEST - 17].decode(errors="ignore")
    return f"{kept}-{sha256(os.fsencode(name)).hexdigest()[:16]}"


def _worded(value: Any) -> str:
    """A setting as part of a folder's name: a file by its name and the start of its hash."""
    if isinstance(value, Mapping):
        return f"_{Path(value['file']).stem}_{value['sha256'][:6]}"
    if isinstance(value, str):
        return f"_{sha256(value.encode()).hexdigest()[:6]}"
    return "_".join(f"{one:g}" for one in value) if isinstance(value, list) else f"{value:g}"
