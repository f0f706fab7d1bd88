"""The scale of latents: mean and standard deviation of each channel, by which a network's inputs are standardized."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ldm.config.tree import nearest
from ldm.errors import ConfigError

_KEY = "data.params.statistics"
_SAME = 1e-3


@dataclass(frozen=True)
class Statistics:
    """z = (latent - mean) / std, a number for each channel."""

    mean: list[float]
    std: list[float]

    @classmethod
    def written(cls, tree: Mapping[str, Sequence[float]]) -> "Statistics":
        """Of a configuration; ConfigError unless it holds both, nothing else, and no deviation of zero."""
        for name in ("mean", "std"):
            if name not in tree:
                raise ConfigError(f"{_KEY}.{name}: missing; write {{mean: [...], std: [...]}}, a number a channel")
        for name in tree:
            if name not in ("mean", "std"):
                raise ConfigError(f"{_KEY}.{name}: unknown key '{name}'; {nearest(name, ('mean', 'std'))}")
        if bad := [value for value in tree["std"] if value <= 0]:
            raise ConfigError(f"{_KEY}.std: expected numbers above 0, found {bad[0]:g}")
        return cls([float(value) for value in tree["mean"]], [float(value) for value in tree["std"]])

    def require(self, channels: int) -> None:
        """ConfigError unless there is a number for each of the latents' channels."""
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels:
                found = len(values)
                raise ConfigError(f"{_KEY}.{name}: expected {channels} numbers, one a channel, found {found}")

    def is_like(self, other: "Statistics") -> bool:
        """Whether both are the same up to a thousandth of a deviation, in the channels that both have.

        That is far below what a network notices, and far above what rounding does.
        """
        rows = zip(self.mean, self.std, other.mean, other.std, strict=False)
        return all(max(abs(mine - mean), abs(own - std)) <= _SAME * std for mine, own, mean, std in rows)

    def __str__(self) -> str:
        return f"{{mean: {self.mean}, std: {self.std}}}"
