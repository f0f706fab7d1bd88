"""A folder of samples: one PNG each, and samples.json, which records how they were made and lists all of them.

Several calls may fill a folder, one after another or at once, and any of them may be interrupted: each file is written
whole or not at all, and the list describes the folder itself, not one call.
"""

import fcntl
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from ldm.data.decoding import read_array
from ldm.errors import ConfigError
from ldm.files import published, write_text
from ldm.images import FILED, grid, picture
from ldm.sampling.conditions import Condition
from ldm.sampling.dense_files import is_file
from ldm.sampling.generate import Sample
from ldm.sampling.shown import beside

SHOWN = 16
"""The maximum number of rows and columns of the sheet."""


class Order(NamedTuple):
    """One image to generate; `condition` None: unconditional. Its values are those of JSON."""

    condition: Condition | None
    seed: int

    @property
    def file(self) -> str:
        return f"{self.seed:06d}.png" if self.condition is None else f"{prefix(self.condition)}-{self.seed:06d}.png"

    @classmethod
    def of(cls, file: str, conditions: Mapping[str, Condition]) -> "Order | None":
        """Parsed from a file name, with the `conditions` by their prefix; None if it is not that of a sample."""
        found = re.fullmatch(r"(?:(.+)-)?(\d+)\.png", file)
        if found is None:
            return None
        condition: Condition | None = None
        if found[1] is not None:
            known = {"class_label": int(found[1])} if found[1].isdecimal() else conditions.get(found[1])
            if known is None:
                return None
            condition = known
        order = cls(condition, int(found[2]))
        return order if order.file == file else None

    def name(self, names: Sequence[str] | None) -> str | None:
        """The name of the class."""
        label = (self.condition or {}).get("class_label")
        return None if names is None or label is None else names[label]


def prefix(condition: Condition) -> str:
    """How the names of a condition's files begin: its class, or else its words and a hash of it."""
    if condition.keys() == {"class_label"} and isinstance(label := condition["class_label"], int):
        return f"{label:03d}"
    said = (_said(key, condition[key]) for key in sorted(condition))
    words = re.sub(r"\W+", "-", "-".join(map(str, said))).strip("-").lower()[:40]
    return f"{words or 'condition'}-{sha256(json.dumps(condition, sort_keys=True).encode()).hexdigest()[:8]}"


def _said(key: str, value: Any) -> Any:
    """A value in a few words: of a file its name, of a layout how many boxes."""
    if is_file(value):
        return Path(value["file"]).stem
    return f"{len(value)} boxes" if key == "boxes" and isinstance(value, Sized) else value


def title(condition: Condition | None, names: Sequence[str] | None) -> str:
    """A condition as people read it: its caption, the name of its class, other keys with their values; "" for none.

    Of arrays nothing is said.
    """
    words = []
    for key, value in (condition or {}).items():
        if isinstance(value, np.ndarray | Tensor) and value.ndim:
            continue
        if key == "class_label":
            words.append(f"class {value}" if names is None else names[value])
        else:
            words.append(str(value) if key == "caption" else f"{key} {_said(key, value)}")
    return ", ".join(words)


def claim(folder: Path, settings: Mapping[str, Any], names: Sequence[str] | None, orders: Sequence[Order]) -> None:
    """Create `folder`, or make sure that the images in it were made with these settings; starts its samples.json.

    Args:
        settings: how the images are made, in plain values.
        names: of the classes.
        orders: the images that are about to be made, whose conditions are recorded.

    Raises:
        ConfigError: it holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check(folder, settings)  # before anything is written into a folder that may not be ours
    with _locked(folder):
        _check(folder, settings)
        _list(folder, settings, names, [order.condition for order in orders if order.condition is not None])


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
        found = _current(json.loads(there.read_text())["settings"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{there}: is not a record of sample.py. Name another folder with --out.") from None
    keys = dict.fromkeys([*settings, *found])
    different = [
        f"{key}: {found.get(key)} there, {settings.get(key)} now" for key in keys if found.get(key) != settings.get(key)
    ]
    if different:
        differences = "; ".join(different)
        raise ConfigError(f"--out {folder}: holds pictures of other settings ({differences}). Name another folder.")


def _list(
    folder: Path, settings: Mapping[str, Any], names: Sequence[str] | None, more: Sequence[Condition] = ()
) -> None:
    """Write samples.json, which keeps the conditions that are known and adds `more`."""
    there = folder / "samples.json"
    known = json.loads(there.read_text()).get("conditions", {}) if there.is_file() else {}
    conditions = known | {prefix(condition): condition for condition in more if condition.keys() != {"class_label"}}
    found = (Order.of(path.name, conditions) for path in folder.iterdir())
    orders = sorted((order for order in found if order is not None), key=_place)
    images = [{"file": order.file, **order._asdict(), "name": order.name(names)} for order in orders]
    content = {"settings": settings, "conditions": conditions, "images": images}
    write_text(there, json.dumps(content, indent=1) + "\n")


def _place(order: Order) -> tuple[int, str]:
    return (order.condition or {}).get("class_label", 0), order.file


_LOCK = ".lock"
_FORMER = {"grid": "schedule", "worse": "guide"}
_FORMER_SAMPLERS = {"dpm": "dpmpp_2m", "dpm-sde": "dpmpp_2m_sde"}


def _current(former: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a samples.json under the names of today: former ones had settings of the sampler beside it."""
    settings = {_FORMER.get(key, key): value for key, value in former.items()}
    settings["sampler"] = _FORMER_SAMPLERS.get(settings["sampler"], settings["sampler"])
    if eta := settings.pop("eta", 0):
        settings["sampler"] += f" eta={eta:.12g}"
    if shift := settings.pop("shift", 0):
        settings["schedule"] += f" shift={shift:.12g}"
    return settings


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
    path, image = folder / Order(sample.condition, sample.seed).file, sample.image
    if image.shape[2] not in FILED:
        with published(path.with_suffix(".npy"), durable=False) as file, file.open("wb") as handle:
            np.save(handle, image)
    with published(path, durable=False) as file:
        picture(image).save(file, format="png")


def save_arrays(folder: Path, orders: Sequence[Order]) -> Path:
    """Write samples.npz of these images, as ADM's evaluation reads it, and more.

    arr_0 (N,H,W,C) uint8, gray ones as C = 3; where all have a class, arr_1 (N,) int64; names (N,) of their files.
    """
    read = [_read(folder / order.file) for order in orders]
    images = np.stack([image.repeat(3, axis=2) if image.shape[2] == 1 else image for image in read])
    classes = [(order.condition or {}).get("class_label") for order in orders]
    arrays = {"arr_0": images} if None in classes else {"arr_0": images, "arr_1": np.array(classes, dtype=np.int64)}
    with published(folder / "samples.npz", durable=False) as file, file.open("wb") as handle:
        np.savez(handle, names=np.array([order.file for order in orders]), **arrays)  # type: ignore[arg-type]
    return folder / "samples.npz"


def sheet(
    folder: Path,
    conditions: Sequence[Condition | None],
    seeds: Sequence[int],
    names: Sequence[str] | None,
    pictures: Sequence[Sequence[np.ndarray]] = (),
) -> np.ndarray:
    """The sheet: one row per condition, under its title, or a square for a single one; the first SHOWN rows, columns.

    Args:
        names: of the classes.
        pictures: (H,W,3) uint8 of each condition, as many of each, which then stand in front of its row.
    """
    drawn = any(pictures)
    if len(conditions) == 1 and not drawn:
        columns = min(SHOWN, math.ceil(math.sqrt(len(seeds))))
        seeds = seeds[: SHOWN * columns]
    else:
        columns = min(SHOWN, len(seeds))
        seeds = seeds[:columns]
    rows = [[_read(folder / Order(condition, seed).file) for seed in seeds] for condition in conditions[:SHOWN]]
    titles = [title(condition, names) for condition in conditions[:SHOWN]]
    if drawn:
        columns += len(pictures[0])
        rows = [beside([*before, *row]) for before, row in zip(pictures, rows, strict=False)]
    return grid([image for row in rows for image in row], columns, titles=titles if any(titles) else ())


def _read(path: Path) -> np.ndarray:
    """All channels of a saved picture: (H,W,C) uint8."""
    array = path.with_suffix(".npy")
    if array.is_file():
        return read_array(array)
    with Image.open(path) as image:
        return np.atleast_3d(np.asarray(image))


_LONGEST = 255  # bytes of a name
NAMED = ("checkpoint", "step", "weights", "sampler", "schedule", "steps", "guidance", "precision")
"""Settings with a place in a folder's name; others are appended only if they were requested."""


def default_folder(settings: Mapping[str, Any]) -> Path:
    """<run>/samples/<settings>, one folder per settings; for a file outside checkpoints/, also named after the file."""
    file = Path(settings["checkpoint"])
    regular = file.parent.name == "checkpoints"
    run, which = (file.parent.parent, "") if regular else (file.parent, f"{file.stem}-")
    sampler, *tuned = settings["sampler"].split()
    schedule, *spaced = settings["schedule"].split()
    spacing = "" if schedule == "default" else f"-{schedule}"
    details = "".join(f"-{one.replace('=', '')}" for one in [*spaced, *tuned])
    name = f"{which}step{settings['step']}-{settings['weights']}-{sampler}{settings['steps']}{spacing}{details}"
    name += f"-{settings['precision']}" if "precision" in settings else ""
    more = "".join(f"-{key}{_worded(value)}" for key, value in settings.items() if key not in NAMED)
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
