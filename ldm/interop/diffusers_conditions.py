"""Our conditioners in the terms of diffusers: rows of a class table that its networks hold, and a text encoder."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.conditioners.base import Unconditional
from ldm.diffusion.conditioners.classes import ClassToken, ClassVector
from ldm.diffusion.conditioners.joint import Joint
from ldm.diffusion.conditioners.text import FrozenText
from ldm.errors import ConfigError

WHERE = "--to diffusers: model.params.conditioner"


@dataclass(frozen=True)
class Conditions:
    """What a denoiser is conditioned on.

    Attributes:
        vectors: (K + 1, E) float32: what each class, and last no class, adds to the noise level's embedding; None:
            nothing.
        tokens: (K + 1, D) float32: the token of each class, and last of no class; None: it is no token.
        text: the text encoder, whose tokens the network attends to; None: there are no texts.
    """

    vectors: Tensor | None = None
    tokens: Tensor | None = None
    text: FrozenText | None = None

    @property
    def num_classes(self) -> int | None:
        """0: the network was trained with the row of no class alone; None: with no row at all."""
        rows = self.tokens if self.vectors is None else self.vectors
        return None if rows is None else len(rows) - 1


def conditions(conditioner: nn.Module, network: nn.Module) -> Conditions:
    """A conditioner, taken apart.

    Args:
        network: that it conditions, which may have a layer for the vector.

    Raises:
        ConfigError: names what the library's networks do not take.
    """
    found: dict[str, Any] = {}
    for part in _parts(conditioner):
        slot, value = _slot(part)
        if slot in found or {slot, *found} >= {"tokens", "text"}:
            raise ConfigError(f"{WHERE}: Joint of two parts for one slot ({type(part).__name__}) has no counterpart")
        found[slot] = value
    if (rows := found.get("vectors")) is not None:
        layer = getattr(network, "embed_vector", None)
        found["vectors"] = rows if layer is None else _through(layer, rows)
    return Conditions(**found)


def _parts(conditioner: nn.Module) -> Iterator[nn.Module]:
    if isinstance(conditioner, Joint):
        for part in conditioner.conditioners.values():
            yield from _parts(part)
    elif not isinstance(conditioner, Unconditional):
        yield conditioner


def _slot(part: nn.Module) -> tuple[str, Any]:
    if isinstance(part, ClassVector):
        return "vectors", part.table.weight.detach()
    if isinstance(part, ClassToken):
        return "tokens", part.table.weight.detach()
    if isinstance(part, FrozenText):
        return "text", part
    raise ConfigError(
        f"{WHERE}: {type(part).__name__} has no counterpart; expected ClassVector, ClassToken, FrozenText or "
        f"Unconditional. --to safetensors takes every model"
    )


def _through(layer: nn.Linear, rows: Tensor) -> Tensor:
    """What a linear layer makes of the rows, summed in float64: the library adds it without a layer."""
    return (rows.double() @ layer.weight.detach().double().T + layer.bias.detach().double()).float()


def as_layer(tokens: Tensor) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Config and tensors of a UNet2DConditionModel's first layer for tokens, of which one-hot rows select (K + 1, D)."""
    number, width = tokens.shape
    config = {"encoder_hid_dim": number, "encoder_hid_dim_type": "text_proj"}
    return config, {
        "encoder_hid_proj.weight": tokens.T.contiguous(),
        "encoder_hid_proj.bias": torch.zeros(width),
    }
