"""Our conditioners in the terms of diffusers: rows of a class table that its networks hold, and a text encoder."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.conditioners.base import Unconditional
from ldm.diffusion.conditioners.classes import ClassToken, ClassVector
from ldm.diffusion.conditioners.joint import Joint
from ldm.diffusion.conditioners.text import FeatureText, FrozenText, TextEncoder
from ldm.diffusion.conditioners.text_models import opened
from ldm.diffusion.networks.dit import DiT
from ldm.diffusion.networks.unet import UNet
from ldm.errors import ConfigError
from ldm.interop.diffusers_models.config import OTHERWISE
from ldm.runtime.float64 import double

WHERE = "--to diffusers: model.params.conditioner"


@dataclass(frozen=True)
class Conditions:
    """What a denoiser is conditioned on.

    Attributes:
        num_classes: the label of no class, after those of the classes; None: the denoiser is given no labels.
        vectors: (num_classes + 1, E) float32: what each class adds to the noise level's embedding; None: nothing.
        tokens: (num_classes + 1, D) float32: each class as a token; None: it is none.
        text: the text encoder, whose tokens the network attends to; None: there are no texts.
    """

    num_classes: int | None = None
    vectors: Tensor | None = None
    tokens: Tensor | None = None
    text: FrozenText | None = None

    @property
    def is_clip(self) -> bool:
        """Whether texts are encoded as the library's pipelines of Stable Diffusion do it."""
        return self.text is not None and not opened(self.text.encoder).masked


def conditions(conditioner: nn.Module, network: nn.Module) -> Conditions:
    """A conditioner, taken apart.

    Raises:
        ConfigError: names what the library's networks do not take.
    """
    if not isinstance(network, UNet | DiT):
        raise ConfigError(
            f"--to diffusers: model.params.network: {type(network).__name__} has no counterpart; expected UNet or DiT. "
            f"{OTHERWISE}"
        )
    parts = [*_parts(conditioner)]
    for part in parts:
        if not isinstance(part, ClassVector | ClassToken | FrozenText):
            raise ConfigError(
                f"{WHERE}: {type(part).__name__} has no counterpart; expected ClassVector, ClassToken, FrozenText or "
                f"Unconditional. {OTHERWISE}"
            )
    vectors = [part for part in parts if isinstance(part, ClassVector)]
    tokens = [part for part in parts if isinstance(part, ClassToken)]
    texts = [part for part in parts if isinstance(part, FrozenText)]
    if len(parts) > 1 and (len(vectors), len(tokens), len(texts)) != (1, 0, 1):
        names = ", ".join(type(part).__name__ for part in parts)
        raise ConfigError(
            f"{WHERE}: Joint of {names} has no counterpart; expected one part, or ClassVector and FrozenText. "
            f"{OTHERWISE}"
        )
    text = texts[0] if texts else None
    if tokens:
        rows = tokens[0].table.weight.detach()
        return Conditions(len(rows) - 1, tokens=rows)
    if vectors:
        rows = vectors[0].table.weight.detach()
        rows = rows if network.embed_vector is None else _through(network.embed_vector, rows)
        return Conditions(len(rows) - 1, vectors=rows, text=text)
    # The library's DiT is always given a label.
    return Conditions(0 if isinstance(network, DiT) else None, text=text)


def texts_as_encoded(conditioner: nn.Module) -> nn.Module:
    """The same, with each FeatureText as the FrozenText that makes its tokens, as the library's pipelines make them.

    Those are the encoder's own, not rounded to the type in which a cache keeps them.

    Raises:
        ConfigError: a feature makes of captions what these pipelines do not.
    """
    if isinstance(conditioner, Joint):
        parts = {name: texts_as_encoded(part) for name, part in conditioner.conditioners.items()}
        return Joint(parts, conditioner.dropout).eval()
    return _frozen(conditioner.feature) if isinstance(conditioner, FeatureText) else conditioner


_READ: Mapping[str, Any] = {"padding": True, "tokens": True, "pooling": None, "prefix": "", "compute": "float32"}
"""What a TextEncoder does whose tokens the library's pipelines make."""


def _frozen(feature: TextEncoder) -> FrozenText:
    for key, expected in _READ.items():
        if (found := getattr(feature, key)) != expected:
            raise ConfigError(
                f"{WHERE}: TextEncoder: {key}: expected {expected!r}, as the library's pipelines read texts, found "
                f"{found!r}. {OTHERWISE}"
            )
    return FrozenText(feature.encoder, feature.channels, feature.max_length, feature.layer, feature.final_norm)


def _through(layer: nn.Linear, rows: Tensor) -> Tensor:
    """What a linear layer makes of the rows, summed in float64: the library adds them without one."""
    return (double(rows) @ double(layer.weight.detach()).T + double(layer.bias.detach())).float()


def _parts(conditioner: nn.Module) -> Iterator[nn.Module]:
    if isinstance(conditioner, Joint):
        for part in conditioner.conditioners.values():
            yield from _parts(part)
    elif not isinstance(conditioner, Unconditional):
        yield conditioner


def as_layer(tokens: Tensor) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Config and tensors of a UNet2DConditionModel's first layer for tokens: one-hot rows select from (K + 1, D)."""
    number, width = tokens.shape
    config = {"encoder_hid_dim": number, "encoder_hid_dim_type": "text_proj"}
    return config, {
        "encoder_hid_proj.weight": tokens.T.contiguous(),
        "encoder_hid_proj.bias": torch.zeros(width),
    }


def encoder_and_tokenizer(text: FrozenText) -> tuple[Any, Any]:
    """The encoder, without the layers whose output is not used, and its tokenizer, with the length of a caption.

    Raises:
        ConfigError: the tokens are not the output of the encoder's last norm.
    """
    found = opened(text.encoder)
    tokenizer = copy.deepcopy(found.tokenizer)
    tokenizer.model_max_length = text.max_length
    if text.layer == -1:
        return found.network, tokenizer
    if not text.final_norm:
        raise ConfigError(f"{WHERE}: FrozenText: final_norm: expected true for layer {text.layer}, found false")
    network: Any = copy.deepcopy(found.network)
    kept = network.config.num_hidden_layers + text.layer + 1
    for module in network.modules():
        if isinstance(module, nn.ModuleList) and len(module) == network.config.num_hidden_layers:
            del module[kept:]
            break
    network.config.num_hidden_layers = kept
    return network, tokenizer
