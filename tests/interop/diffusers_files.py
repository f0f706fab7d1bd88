"""Random weights for tests, and models of diffusers that have them."""

from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ldm.config.load import build


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with weights of a size that keeps signals as they are, in eval mode."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=draws))
    return module.requires_grad_(False).eval()


def built(node: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """What a node of ours builds, randomized."""
    return randomized(build(node), seed)


def of_diffusers(name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A model of the library, with these tensors or random ones; it says if one has no place in it."""
    made = getattr(diffusers, name).from_config(dict(config))
    if tensors is None:
        return randomized(made, 1)
    made.load_state_dict(dict(tensors), strict=True)
    return made.requires_grad_(False).eval()


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's configuration as its config.json holds it, without notes."""
    listed = {key: [*value] if isinstance(value, tuple) else value for key, value in config.items()}
    return {key: value for key, value in listed.items() if not key.startswith("_")}


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative to theirs."""
    return float((ours - theirs).norm() / theirs.norm())
