"""The vector and the tokens of a conditioner at other widths, by layers that are trained with the denoiser."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

from torch import Tensor, nn

from ldm.diffusion.conditioners.base import (
    Conditioner,
    Conditioning,
    defaults,
    dropped,
    drops_all,
    kept_keys,
    require_conditioner,
)
from ldm.errors import ConfigError
from ldm.ranges import Count

Widths = Sequence[Count]
"""[384, 512]: a linear layer. [384, 512, 512]: two with a SiLU in between, and so on."""


def layers(widths: Widths) -> nn.Sequential:
    """Linear layers (..., widths[0]) -> (..., widths[-1]), with a SiLU between two."""
    linear = [nn.Linear(before, after) for before, after in pairwise(widths)]
    return nn.Sequential(*[part for layer in linear for part in (nn.SiLU(), layer)][1:])


class Projected(nn.Module):
    """What a conditioner makes, through trained layers; so is its null.

    So that a pooled text or a picture becomes the vector of adaLN, and tokens of two encoders lie side by side (Joint).

    Args:
        conditioner: its weights, if it has some, are trained as well.
        vector: widths of the layers for the vector, the first of which is the conditioner's; None: it stays as it is.
        tokens: likewise for each token.

    Raises:
        ConfigError: neither is asked for, or the conditioner makes something else.
    """

    def __init__(self, conditioner: nn.Module, vector: Widths | None = None, tokens: Widths | None = None) -> None:
        super().__init__()
        require_conditioner(conditioner, "Projected: conditioner")
        for slot, widths in (("vector", vector), ("tokens", tokens)):
            if widths is not None and len(widths) < 2:
                raise ConfigError(f"Projected: {slot}: expected two widths or more, such as [384, 512], found {widths}")
        if vector is None and tokens is None:
            raise ConfigError("Projected: expected vector, tokens, or both, found neither; leave Projected out")
        self.conditioner = conditioner
        self.vector = None if vector is None else layers(vector)
        self.tokens = None if tokens is None else layers(tokens)

    @property
    def keys(self) -> Sequence[str]:
        return self._inner.keys

    def forward(self, batch: Mapping[str, Any]) -> Conditioning:
        return self._projected(self._inner(batch))

    def null(self, n: int) -> Conditioning:
        return self._projected(self._inner.null(n))

    def drops_all(self) -> bool:
        return drops_all(self.conditioner)

    def kept_keys(self) -> Sequence[str]:
        return kept_keys(self._inner)

    def dropped(self, batch: Mapping[str, Any], n: int) -> Conditioning:
        return self._projected(dropped(self._inner, batch, n))

    def defaults(self) -> Mapping[str, float]:
        return defaults(self._inner)

    @property
    def _inner(self) -> Conditioner:
        return cast(Conditioner, self.conditioner)

    def _projected(self, found: Conditioning) -> Conditioning:
        return replace(
            found,
            vector=_through(self.vector, found.vector, "vector"),
            tokens=_through(self.tokens, found.clean_tokens(), "tokens"),
        )


def _through(projection: nn.Sequential | None, given: Tensor | None, slot: str) -> Tensor | None:
    if projection is None:
        return given
    expected, found = cast(nn.Linear, projection[0]).in_features, None if given is None else given.shape[-1]
    if given is None or found != expected:
        raise ConfigError(f"Projected: {slot}: expected width {expected} from the conditioner, found {found}")
    projected: Tensor = projection(given)
    return projected
