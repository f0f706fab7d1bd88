"""Measured numbers, each with all that tells it from another one of its name, and tables of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ldm.evaluation.distances.spread import Estimate

_NETWORKS = {"inception": "Inception", "alexnet": "AlexNet", "vgg16": "VGG16", "dinov2": "DINOv2", "clip": "CLIP"}
_PUBLISHED = {"inception-2015/tf1-299": "FID", "inception-2015/clean-299": "clean-FID"}


@dataclass(frozen=True)
class Value:
    """A number.

    Attributes:
        metric: its name, such as "FID" or "FD-AlexNet".
        value: the number.
        error: its standard error, over disjoint blocks of the images; None: not known.
        freedom: the degrees of freedom that the error was estimated with.
        unbiased: what it tends to with the number of images; None: not known.
        features: the name of the space that it is computed in; None: in none.
        better: "lower" or "higher"; "": neither is.
        settings: what else decides it.
    """

    metric: str
    value: float
    error: float | None = None
    freedom: float | None = None
    unbiased: float | None = None
    features: str | None = None
    better: str = "lower"
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def estimate(self) -> Estimate | None:
        """The estimate to compare with others, bias removed where it is known; None without an error bar."""
        if self.error is None or self.freedom is None:
            return None
        return Estimate(self.value if self.unbiased is None else self.unbiased, self.error, self.freedom)

    @property
    def fixed(self) -> dict[str, Any]:
        """The settings that were asked for, and not what was found beside the value."""
        return {key: one for key, one in self.settings.items() if isinstance(one, int)}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "Value":
        return cls(**tree)


def space(features: str) -> str:
    """What a feature space is called in the names of metrics: "AlexNet" of "alexnet-conv5/clean-128"."""
    network = features.partition("/")[0]
    for start, called in _NETWORKS.items():
        if network.startswith(start):
            return called
    return network


def frechet_name(features: str) -> str:
    """What the Fréchet distance in a space is called: FID in Inception's of 2015 alone, FD-<space> in any other."""
    return _PUBLISHED.get(features, f"FD-{space(features)}")


def in_space(metric: str, features: str) -> str:
    """Another metric's name with that of its space, which Inception's of 2015 goes without."""
    return metric if features == "inception-2015/tf1-299" else f"{metric}-{space(features)}"


def titles(keys: Iterable[tuple[str, str | None]]) -> list[str]:
    """What (metric, features) are called side by side: the metric, with its features where others share its name."""
    distinct = dict.fromkeys(keys)
    names = [metric for metric, _ in distinct]
    return [f"{metric} ({features})" if names.count(metric) > 1 else metric for metric, features in distinct]


def spelled(value: float, error: float | None = None) -> str:
    """`12.34`, or `12.34 ± 0.56`: to two digits of the error, else to four significant ones."""
    if error is None or not error > 0:
        return f"{value:.4g}"
    digits = max(0, 1 - _magnitude(error))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _magnitude(number: float) -> int:
    """The power of ten of the first digit."""
    return int(f"{number:e}".partition("e")[2])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned."""
    lines = [[*header], *([*row] for row in rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def table(values: Sequence[Value]) -> str:
    """One row a value."""
    arrows = {"lower": "↓", "higher": "↑", "": ""}
    rows = [
        [
            f"{one.metric} {arrows[one.better]}".strip(),
            spelled(one.value, one.error),
            "" if one.unbiased is None else f"{one.unbiased:.4g}",
            one.features or "",
        ]
        for one in values
    ]
    return markdown(["metric", "value", "with infinitely many", "features"], rows)
