"""Several conditioners as one, each with its own dropout rate."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
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
from ldm.ranges import Fraction


class Joint(nn.Module):
    """Fills the slots with those of its parts: vectors and images side by side, tokens one after another with masks.

    In training mode each part is replaced by its null conditioning in a fraction of the rows, drawn for each part on
    its own (as the embedders of Podell et al. 2023, "SDXL"). `label_dropout` of LatentDiffusion drops all of a row's
    parts together, on top of that, but for those that are `kept`: what belongs to the task, such as the picture to fill
    in. They stay where all others are dropped, so guidance leads away from the same picture without its text.

    Args:
        conditioners: by name; the names are those of the weights in a checkpoint.
        dropout: the fraction of rows by the conditioner's name; one that is not listed is never dropped on its own.
        kept: names of conditioners that are never dropped, and without which nothing is sampled.

    Raises:
        ConfigError: there are no conditioners, `dropout` or `kept` names one that does not exist, or both the same one.
    """

    def __init__(
        self,
        conditioners: Mapping[str, nn.Module],
        dropout: Mapping[str, Fraction] | None = None,
        kept: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not conditioners:
            raise ConfigError("Joint: expected one conditioner or more, found none; use Unconditional")
        for name, part in conditioners.items():
            require_conditioner(part, f"Joint: conditioners.{name}")
        self.conditioners = nn.ModuleDict(conditioners)
        self.dropout = dict.fromkeys(conditioners, 0.0) | dict(dropout or {})
        self.kept = tuple(kept)
        for parameter, names in (("dropout", self.dropout), ("kept", self.kept)):
            if unknown := [name for name in names if name not in conditioners]:
                raise ConfigError(
                    f"Joint: {parameter} names {', '.join(unknown)}, but the conditioners are {', '.join(conditioners)}"
                )
        if both := [name for name in self.kept if self.dropout[name] > 0]:
            raise ConfigError(f"Joint: {', '.join(both)}: is kept and has a dropout rate; leave one of them out")

    @property
    def keys(self) -> Sequence[str]:
        """Every key that a part reads, once."""
        return tuple(dict.fromkeys(key for _, part in self._parts() for key in part.keys))

    def forward(self, batch: Mapping[str, Any]) -> Conditioning:
        found = {}
        for name, part in self._parts():
            conditioning = part(batch)
            if self.training and (rate := self.dropout[name]) > 0:
                draws = batch["draws"]
                chosen = draws.uniform(f"dropout/{name}") < rate  # (N,)
                conditioning = dropped(part, batch, len(draws)).where(chosen, conditioning)
            found[name] = conditioning
        return _beside(found)

    def drops_all(self) -> bool:
        """Whether it happens in training that all of a row's conditions are dropped, but for what is kept."""
        droppable = [(name, part) for name, part in self._parts() if part.keys and name not in self.kept]
        return all(self.dropout[name] > 0 or drops_all(part) for name, part in droppable)

    def kept_keys(self) -> Sequence[str]:
        """The keys of what is kept, here and in its parts."""
        kept = (part.keys if name in self.kept else kept_keys(part) for name, part in self._parts())
        return tuple(dict.fromkeys(key for keys in kept for key in keys))

    def dropped(self, batch: Mapping[str, Any], n: int) -> Conditioning:
        """The null conditioning beside what is kept."""
        return _beside(
            {name: part(batch) if name in self.kept else dropped(part, batch, n) for name, part in self._parts()}
        )

    def defaults(self) -> Mapping[str, float]:
        return {key: value for _, part in self._parts() for key, value in defaults(part).items()}

    def null(self, n: int) -> Conditioning:
        return _beside({name: part.null(n) for name, part in self._parts()})

    def _parts(self) -> list[tuple[str, Conditioner]]:
        return [(name, cast(Conditioner, part)) for name, part in self.conditioners.items()]


def _beside(found: Mapping[str, Conditioning]) -> Conditioning:
    """The conditionings of the parts (N rows each) as one."""
    vectors = {name: part.vector for name, part in found.items() if part.vector is not None}
    tokens = {name: part.tokens for name, part in found.items() if part.tokens is not None}
    spatial = {name: part.spatial for name, part in found.items() if part.spatial is not None}
    masks = [part.masked() for part in found.values() if part.tokens is not None]
    masked = any(part.token_mask is not None for part in found.values())
    return Conditioning(
        vector=_joined("vector", vectors),  # (N, D1 + D2)
        tokens=_joined("tokens", tokens),  # (N, L1 + L2, D)
        spatial=_joined("spatial", spatial),  # (N, C1 + C2, H, W)
        token_mask=torch.cat(masks, dim=1) if masked else None,  # (N, L1 + L2)
    )


def _joined(slot: str, parts: Mapping[str, Tensor]) -> Tensor | None:
    if len(parts) < 2:
        return next(iter(parts.values()), None)
    if slot == "spatial":
        parts = _of_one_size(parts)
    if len({part.shape[2:] for part in parts.values()}) > 1:
        shapes = ", ".join(f"{name} (N, {', '.join(map(str, part.shape[1:]))})" for name, part in parts.items())
        fix = "; bring one to the width of the other by Projected" if slot == "tokens" else ""
        raise ConfigError(f"Joint: the {slot} of its conditioners do not fit together: {shapes}{fix}")
    return torch.cat([*parts.values()], dim=1)


def _of_one_size(images: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Images (N, C, H, W), with those of sides of 1, which stand for any, in the size of the others."""
    height, width = (max(image.shape[axis] for image in images.values()) for axis in (2, 3))
    fits = all(image.shape[2] in (1, height) and image.shape[3] in (1, width) for image in images.values())
    return {name: image.expand(-1, -1, height, width) if fits else image for name, image in images.items()}
