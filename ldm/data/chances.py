"""What random columns share: spans that numbers are drawn from, choices by weight, and saying both in plain values."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from ldm.errors import ConfigError
from ldm.ranges import Count, NotNegative


def require_spans(owner: Any, **spans: Sequence[float]) -> None:
    """ConfigError, naming the first of these parameters of `owner` that is not [low, high] with low <= high."""
    for name, span in spans.items():
        if len(span) != 2 or not span[0] <= span[1]:
            raise ConfigError(
                f"{type(owner).__name__}.{name}: expected [low, high] with low <= high, found {list(span)}: "
                f"{'exchange them' if len(span) == 2 else 'write two numbers'}"
            )


def uniform(span: Sequence[float], random: np.random.Generator) -> float:
    """A number of [low, high)."""
    return span[0] + (span[1] - span[0]) * random.random()


def integer(span: Sequence[int], random: np.random.Generator) -> int:
    """A whole number of low .. high."""
    return int(random.integers(span[0], span[1], endpoint=True))


class Choice:
    """One of several, by weight.

    Args:
        number: of things to choose from.
        weights: of each, not negative; None: all alike.
        key: of the weights, for messages.

    Raises:
        ConfigError: another number of weights, one that is negative, or all of them are 0.
    """

    def __init__(self, number: Count, weights: Sequence[NotNegative] | None, key: str) -> None:
        given = [1.0] * number if weights is None else [float(weight) for weight in weights]
        if len(given) != number or not given:
            raise ConfigError(f"{key}: expected one weight for each of {number}, found {len(given)}: write as many")
        total = sum(given)
        if min(given) < 0 or not 0 < total < float("inf"):
            raise ConfigError(f"{key}: expected weights from 0 up of which one is above 0, found {given}")
        self.shares = [weight / total for weight in given]
        self._ends = np.cumsum(self.shares)
        self._ends[np.flatnonzero(given)[-1] :] = 1.0  # despite rounding, and without choosing a last one of weight 0

    def draw(self, random: np.random.Generator) -> int:
        """Which one."""
        return int(np.searchsorted(self._ends, random.random(), side="right"))


def plain(value: Any) -> Any:
    """A dataclass that a configuration made, its fields and lists of such, as plain values with their class."""
    if is_dataclass(value) and not isinstance(value, type):
        made = {field.name: plain(getattr(value, field.name)) for field in fields(value)}
        return {"target": f"{type(value).__module__}.{type(value).__qualname__}", **made}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value
