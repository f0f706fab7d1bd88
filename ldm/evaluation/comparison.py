"""Two or more records compared: how their protocols differ, and which differences of their numbers exceed the noise.

A winner is named where the difference is more than noise: also of samples that were made differently (sampler, steps,
guidance), which is said, but not where they were measured differently (features, reference, number of images, labels).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.errors import ConfigError, DataError
from ldm.evaluation.distances.spread import distinguishable
from ldm.evaluation.record import Record
from ldm.evaluation.values import Value, markdown, spelled, titles
from ldm.files import published
from ldm.images import picture

HARMLESS = ("reference.name", "device", "weights", "average")
"""What two protocols may differ in, and their numbers still be compared: names, and what belongs to the model."""

SAMPLING = (
    "sampler",
    "schedule",
    "steps",
    "precision",
    "guidance",
    "rescale",
    "guidance_channels",
    "interval",
    "guide",
)
"""How samples are made: what is compared, as often as the models are. A winner is named, and the difference as well."""

LEVEL = 0.95
"""How surely two numbers have to differ before one is called the better one."""


@dataclass(frozen=True)
class Entry:
    """A record, and all records of the run that it belongs to (only itself for pictures)."""

    name: str
    file: Path
    record: Record
    all: Sequence[Record]


def entries(paths: Sequence[Path]) -> list[Entry]:
    """Of each record file, or run folder, the record to compare.

    Of a run the newest one, preferably with the protocol of the first record.

    Raises:
        DataError: a file is no record, or a run has none.
    """
    found: list[Entry] = []
    for path in paths:
        own = [path] if path.is_file() else sorted((path / "evaluation").glob("*.json"))
        records = {file: Record.read(file) for file in own}
        if not records:
            raise DataError(f"{path}: has no records to compare; make one: ldm evaluate -r {path}")
        if found:
            first = found[0].record
            fits = {file: one for file, one in records.items() if not unlike(first.protocol, one.protocol)}
            chosen = fits or records
        else:
            chosen = records
        file = max(chosen, key=lambda file: (chosen[file].subject["training"].get("step", 0), chosen[file].date))
        siblings = [*records.values()] if path.is_dir() else [Record.read(one) for one in _of_same_run(path)]
        found.append(
            Entry(path.resolve().stem if path.is_file() else path.resolve().name, file, records[file], siblings)
        )
    return found


def _of_same_run(file: Path) -> list[Path]:
    """All records beside one of a run; of pictures the record alone."""
    return sorted(file.parent.glob("*.json")) if file.absolute().parent.name == "evaluation" else [file]


def flat(tree: Mapping[str, Any], key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, leaf) of nested mappings."""
    for name, value in tree.items():
        dotted = f"{key}.{name}" if key else name
        if isinstance(value, Mapping):
            yield from flat(value, dotted)
        else:
            yield dotted, value


def differences(protocols: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """{dotted key: its value in each} of what is not the same in all."""
    leaves = [dict(flat(protocol)) for protocol in protocols]
    keys = dict.fromkeys(key for one in leaves for key in one)
    found = {key: [one.get(key) for one in leaves] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def unlike(*protocols: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The differences in how pictures are made or measured."""
    return {key: values for key, values in differences(protocols).items() if not _is_in(key, HARMLESS)}


def deciding(*protocols: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The differences that forbid a comparison of numbers: those in how pictures are measured."""
    return {key: values for key, values in unlike(*protocols).items() if not _is_in(key, SAMPLING)}


def _is_in(key: str, sections: Sequence[str]) -> bool:
    return any(f"{key}.".startswith(f"{section}.") for section in sections)


def verdict(values: Sequence[Value | None], names: Sequence[str], comparable: bool) -> str:
    """Who is better, if anybody can say."""
    known = [(value, name) for value, name in zip(values, names, strict=True) if value is not None]
    if len(known) < 2 or not known[0][0].better:
        return ""
    if not comparable or any(value.fixed != known[0][0].fixed for value, _ in known):
        return "not comparable"
    estimates = [(value.estimate, name) for value, name in known]
    if any(estimate is None for estimate, _ in estimates):
        return "no error bars"
    sure = [(estimate, name) for estimate, name in estimates if estimate is not None]
    sure.sort(key=lambda one: one[0].value, reverse=known[0][0].better == "higher")
    # The best of several is ahead by chance more often than one of two.
    level = 1 - (1 - LEVEL) / (len(sure) - 1)
    (best, name), (second, _) = sure[:2]
    return f"{name} is better" if distinguishable(best, second, level) else "within noise"


def report(found: Sequence[Entry]) -> str:
    """The table, what differs, and what that means."""
    if len(found) < 2:
        raise ConfigError("compare: expected two or more records or runs")
    names = _letters(len(found))
    records = [entry.record for entry in found]
    hindering = deciding(*(record.protocol for record in records))
    keys = dict.fromkeys((value.metric, value.features) for record in records for value in record.values)
    rows = []
    for key, title in zip(keys, titles(keys), strict=True):
        values = [record.value(*key) for record in records]
        cells = ["" if value is None else spelled(value.value, value.error) for value in values]
        rows.append([title, *cells, verdict(values, names, not hindering)])
    lines = [markdown(["metric", *names, "which is better"], rows), ""]
    lines += [f"{names[place]}: {entry.file}" for place, entry in enumerate(found)]
    lines += ["", *_explained(records, names, hindering)]
    return "\n".join(lines)


def _explained(records: Sequence[Record], names: Sequence[str], hindering: Mapping[str, Any]) -> list[str]:
    """What differs between the protocols, and between the machines."""
    every = differences([record.protocol for record in records])
    made = [key for key in every if _is_in(key, SAMPLING)]
    every |= {f"versions.{key}": values for key, values in differences([record.versions for record in records]).items()}
    every = differences([{"precision": record.machine.get("precision")} for record in records]) | every
    if not every:
        return ["The protocols are the same."]
    rows = [[key, *map(_short, values), "yes" if key in hindering else ""] for key, values in every.items()]
    lines = [markdown(["differs", *names, "forbids comparison"], rows)]
    if hindering:
        lines += ["", f"No winner is named: the numbers were made with different {', '.join(hindering)}."]
    elif made:
        lines += ["", f"The samples were made differently ({', '.join(made)}): that may be why one is better."]
    return lines


def _letters(number: int) -> list[str]:
    """Short names of columns: A, B, ... Z, then numbers."""
    return [chr(ord("A") + place) if place < 26 else str(place + 1) for place in range(number)]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def draw(found: Sequence[Entry], output: Path) -> bool:
    """Write a figure: the first distance of all against images seen and hours, from all records of each run.

    Returns whether there was anything to draw.
    """
    shown = next((value for value in found[0].record.values if value.better), None)
    if shown is None:
        return False
    key = shown.metric, shown.features
    curves = {}
    for letter, entry in zip(_letters(len(found)), found, strict=True):
        name = f"{letter}: {_short(entry.name)}"
        points = [one for one in entry.all if one.value(*key) and one.subject["training"]]
        curves[name] = [one for one in points if not unlike(entry.record.protocol, one.protocol)]
    if not any(curves.values()):
        return False
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for panel, axis, label in zip(panels, ("images_seen", "hours"), ("thousand images seen", "hours"), strict=True):
        for name, points in curves.items():
            _draw_curve(panel, name, points, key, axis, 1000 if axis == "images_seen" else 1)
        panel.set(xlabel=label, ylabel=shown.metric)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    with published(output, durable=False) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    return True


def _draw_curve(
    panel: Any, name: str, points: Sequence[Record], key: tuple[str, str | None], axis: str, unit: float
) -> None:
    rows = []
    for one in points:
        value, place = one.value(*key), one.subject["training"].get(axis)
        if value is not None and place is not None:
            rows.append((place / unit, value.value, value.error or 0.0))
    rows.sort()
    x, y, error = zip(*rows, strict=True) if rows else ((), (), ())
    panel.errorbar(x, y, yerr=error, marker=".", capsize=2, label=name)


def sheet(found: Sequence[Entry], output: Path) -> bool:
    """Write the sheets of all records side by side, whose pictures have the same seeds; whether there are any."""
    files = [entry.file.parent / entry.record.sheets.get("pictures", "") for entry in found]
    if not all(file.is_file() for file in files):
        return False
    images = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    height = max(len(image) for image in images)
    padded = [np.pad(image, ((0, height - len(image)), (0, 8), (0, 0)), constant_values=255) for image in images]
    with published(output, durable=False) as file:
        picture(np.concatenate(padded, axis=1)).save(file, format="png")
    return True
