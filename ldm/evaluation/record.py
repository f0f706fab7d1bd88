"""What was measured, and all that decided it, as a JSON file that travels: numbers without it cannot be compared.

{"format": 1,
 "subject": {"name", "kind", "training": {"checkpoint", "step", "images_seen", "hours"},
             "pictures": a hash of all that decides their pixels, the model's weights among it},
 "protocol": {...},               what has to be equal before two numbers may be compared
 "versions", "machine", "date",   what should not matter
 "values": [{"metric", "value", "error", "unbiased", "features", "better", "settings"}],
 "notes": [...], "sheets": {name: file beside the record}}
"""

import datetime
import importlib.metadata
import json
import platform
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ldm.errors import DataError
from ldm.evaluation.features.base import Features
from ldm.evaluation.pictures.base import digest
from ldm.evaluation.values import Value
from ldm.files import write_text

FORMAT = 1
_PACKAGES = ("ldm", "torch", "torchvision", "torchmetrics", "numpy", "scipy", "timm", "torch-fidelity", "transformers")


@dataclass(frozen=True)
class Record:
    """One evaluation.

    Attributes:
        subject: {"name", "kind", "pictures"} of what was measured, and the "training" behind it.
        protocol: what decides the numbers beside the subject itself, in JSON's types.
        values: the numbers.
        notes: what was left out, or is to be read with care.
        sheets: picture files beside the record, by what they show.
        versions: of the libraries.
        machine: the type of device, and the precision.
        date: when, UTC.
    """

    subject: Mapping[str, Any]
    protocol: Mapping[str, Any]
    values: Sequence[Value]
    notes: Sequence[str] = ()
    sheets: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)
    date: str = ""

    @property
    def name(self) -> str:
        return str(self.subject["name"])

    def value(self, metric: str, features: str | None = None) -> Value | None:
        """The value of a metric in a feature space (None: in the first that has it); None: it was not measured."""
        return next((one for one in self.values if one.metric == metric and features in (None, one.features)), None)

    def beside(self, earlier: "Record", asked: Collection[str]) -> "Record | None":
        """This record, with those values of an earlier one that it does not have itself.

        Args:
            earlier: of the same command, perhaps with other metrics.
            asked: the metrics that were asked for now, as the command line names them. Notes of the earlier record on
                these are dropped, since this one says again what it left out.

        Returns:
            None if its pictures, protocol, libraries or machine differ, so that the values do not belong together.
        """
        ours, theirs = (
            json.dumps([one.subject.get("pictures"), one.protocol, one.versions, one.machine], sort_keys=True)
            for one in (self, earlier)
        )
        if ours != theirs or "pictures" not in self.subject:
            return None
        here = [(one.metric, one.features, one.fixed) for one in self.values]
        values = [one for one in earlier.values if (one.metric, one.features, one.fixed) not in here]
        notes = [note for note in earlier.notes if not {*note.partition(": left out")[0].split(", ")} & {*asked}]
        return replace(
            self,
            values=[*values, *self.values],
            notes=[*dict.fromkeys([*notes, *self.notes])],
            sheets={**earlier.sheets, **self.sheets},
        )

    def write(self, path: Path) -> None:
        """Replace the file, whole or not at all."""
        values = [one.to_dict() for one in self.values]
        tree = {"format": FORMAT, **vars(self), "values": values}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(tree, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Record":
        """DataError if it is no record."""
        try:
            tree = json.loads(path.read_text())
            found = tree.pop("format")
            if found != FORMAT:
                raise ValueError(f"of format {found}, this version reads {FORMAT}")
            return cls(**{**tree, "values": [Value.from_dict(one) for one in tree["values"]]})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: is not a record of `ldm evaluate` ({error})") from error


def spaces_of(spaces: Sequence[Features]) -> list[dict[str, str]]:
    """Names and weights of feature spaces."""
    return [{"name": space.name, "weights": space.weights} for space in spaces]


def versions() -> dict[str, str]:
    """Of python and the libraries that a number may depend on, where they are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def rounding(words: Sequence[str] | None) -> str:
    """How float32 was rounded, by torch's words for (convolutions, matrix products); empty: it was not."""
    if words is None or {*words} <= {"none", "ieee"}:
        return ""
    return f"{words[0]} in convolutions, {words[1]} in matrix products"


def machine(device: torch.device, samples: str = "") -> dict[str, str]:
    """The type of the device, its name, and the precision that everything is computed in.

    Args:
        device: that everything is computed on.
        samples: what the pictures were made in, where it was not float32. Their features are always computed so.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    precision = f"float32 (of samples {samples})" if samples else "float32"
    return {"device": device.type, "name": name, "precision": precision, "threads": str(torch.get_num_threads())}


def now() -> str:
    """The time, UTC, in ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def file_name(words: Sequence[str], protocol: Mapping[str, Any]) -> str:
    """A record's name without its ending: words for people, and a hash of the protocol."""
    text = re.sub(r"[^\w.=+-]+", "_", "-".join(words))[:160]
    return f"{text}-{digest(protocol)[:8]}"
