"""Weights for another number of classes or of channels: which axis of which tensor that is, and what goes where.

A tensor with such an axis is laid out in groups along it (channels of the latent, then those of a conditioning image;
rows of the classes, then that of "no class"); within each group, what both models have is kept. Resolution needs
nothing here: no network has a tensor of it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.autoencoder.module import AutoencoderKL
from ldm.diffusion.conditioners.classes import ClassOneHot, ClassToken, ClassVector
from ldm.diffusion.module import LatentDiffusion, parts
from ldm.diffusion.networks.dit import DiT
from ldm.diffusion.networks.edm2 import MagnitudePreservingUNet
from ldm.diffusion.networks.unet import UNet

Shapes = Mapping[str, torch.Size]
Names = Sequence[str] | None


@dataclass(frozen=True)
class Resizing:
    """How a tensor of one model becomes that of another.

    Attributes:
        axis: the one along which they differ.
        pairs: (index in ours, index in theirs) of what is kept.
        zero: whether the rest of ours is zero, so that it has no effect at first; False: as it was initialized.
        scale: of what is kept.
    """

    axis: int
    pairs: Sequence[tuple[int, int]]
    zero: bool = False
    scale: float = 1.0

    def changes_nothing(self, ours: torch.Size, theirs: torch.Size) -> bool:
        """Whether ours becomes theirs as it is."""
        return ours == theirs and [*self.pairs] == [(place, place) for place in range(ours[self.axis])]

    def __call__(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """Ours (as initialized), with theirs where they go together."""
        made = torch.zeros_like(ours) if self.zero else ours.clone()
        if self.pairs:
            into, out_of = torch.tensor([*self.pairs]).unbind(1)
            kept = theirs.to(ours.device, ours.dtype).index_select(self.axis, out_of.to(ours.device))
            made.index_copy_(self.axis, into.to(ours.device), kept * self.scale)
        return made


def resizings(
    model: Any, ours: Shapes, theirs: Shapes, resize: Sequence[str], classes: tuple[Names, Names] = (None, None)
) -> dict[str, Resizing]:
    """{name: how it is resized} of the tensors that `resize` names and that are not the same in both.

    Args:
        model: that starts from the weights.
        ours, theirs: shapes by name, as in ldm/training/init_from.py.
        resize: of "classes", "channels".
        classes: the names of our classes and of theirs, if known: rows of one name go together, otherwise those of one
            number.
    """
    found: dict[str, Resizing] = {}
    if "classes" in resize:
        found |= _classes(model, ours, theirs, *classes)
    if "channels" in resize:
        found |= _channels(model, ours, theirs)
    return {
        name: one
        for name, one in found.items()
        if _differ_in(one.axis, ours[name], theirs[name]) and not one.changes_nothing(ours[name], theirs[name])
    }


def _differ_in(axis: int, ours: torch.Size, theirs: torch.Size) -> bool:
    """Whether they may differ in this axis alone."""
    return len(ours) == len(theirs) and all(
        place == axis or size == other for place, (size, other) in enumerate(zip(ours, theirs, strict=True))
    )


# ---- classes


def _classes(model: Any, ours: Shapes, theirs: Shapes, names: Names, their_names: Names) -> dict[str, Resizing]:
    if not isinstance(model, LatentDiffusion):
        return {}
    network, conditioner = parts(model.denoiser)
    found: dict[str, Resizing] = {}
    assert isinstance(conditioner, nn.Module)
    for place, module in conditioner.named_modules(prefix="conditioner"):
        name = f"{place}.table.weight"
        if isinstance(module, ClassVector | ClassToken) and name in ours and name in theirs:
            count, other = ours[name][0] - 1, theirs[name][0] - 1
            pairs = [*_same_classes(count, other, names, their_names), (count, other)]  # the last is "no class"
            found[name] = Resizing(0, pairs)
    name = "network.embed_vector.weight"
    if isinstance(conditioner, ClassOneHot) and name in ours and name in theirs:
        count, other = ours[name][1], theirs[name][1]
        # The one-hot vector is sqrt(classes) long, which a layer of unit length (EDM2) takes out again.
        plain = isinstance(getattr(network, "embed_vector"), nn.Linear)  # noqa: B009
        scale = math.sqrt(other / count) if plain else 1.0
        found[name] = Resizing(1, _same_classes(count, other, names, their_names), scale=scale)
    return found


def _same_classes(count: int, other: int, names: Names, their_names: Names) -> list[tuple[int, int]]:
    if names is None or their_names is None:
        return [(number, number) for number in range(min(count, other))]
    places = {name: number for number, name in enumerate(their_names) if number < other}
    return [(number, places[name]) for number, name in enumerate(names) if number < count and name in places]


# ---- channels


@dataclass(frozen=True)
class _Axis:
    """An axis and the lengths of its groups; `zero` of inputs: a new channel has no effect at first."""

    axis: int
    groups: Sequence[int]
    zero: bool


_Layout = Callable[[Shapes], dict[str, _Axis]]


def _channels(model: Any, ours: Shapes, theirs: Shapes) -> dict[str, Resizing]:
    found: dict[str, Resizing] = {}
    for layout in _layouts(model):
        try:
            here, there = layout(ours), layout(theirs)
        except KeyError:  # of another network, whose tensors do not fit anyway
            continue
        for name, axis in here.items():
            pairs: list[tuple[int, int]] = []
            start = other = 0
            for length, their_length in zip(axis.groups, there[name].groups, strict=True):
                pairs += [(start + number, other + number) for number in range(min(length, their_length))]
                start, other = start + length, other + their_length
            found[name] = Resizing(axis.axis, pairs, axis.zero)
    return found


def _layouts(model: Any) -> list[_Layout]:
    if isinstance(model, AutoencoderKL):
        return [_encoder, _decoder]
    if not isinstance(model, LatentDiffusion):
        return []
    network, _ = parts(model.denoiser)
    kinds: dict[type, _Layout] = {UNet: _unet, DiT: _dit, MagnitudePreservingUNet: _edm2}
    return [layout for kind, layout in kinds.items() if isinstance(network, kind)]


def _encoder(shapes: Shapes) -> dict[str, _Axis]:
    return {"encoder.conv_in.weight": _Axis(1, [shapes["encoder.conv_in.weight"][1]], True)}


def _decoder(shapes: Shapes) -> dict[str, _Axis]:
    return _outputs("decoder.conv_out", shapes)


def _unet(shapes: Shapes) -> dict[str, _Axis]:
    """The latent's channels, then those of the conditioning image."""
    latent, both = shapes["network.conv_out.weight"][0], shapes["network.conv_in.weight"][1]
    return {
        "network.conv_in.weight": _Axis(1, [latent, both - latent], True),
        **_outputs("network.conv_out", shapes),
    }


def _dit(shapes: Shapes) -> dict[str, _Axis]:
    """The same, each channel as the pixels of a patch."""
    latent, both = shapes["network.out.weight"][0], shapes["network.patches.weight"][1]
    return {"network.patches.weight": _Axis(1, [latent, both - latent], True), **_outputs("network.out", shapes)}


def _edm2(shapes: Shapes) -> dict[str, _Axis]:
    """The latent's channels, those of the conditioning image, then one of ones."""
    latent, all_three = shapes["network.conv_out.weight"][0], shapes["network.conv_in.weight"][1]
    return {
        "network.conv_in.weight": _Axis(1, [latent, all_three - latent - 1, 1], True),
        "network.conv_out.weight": _Axis(0, [latent], False),
    }


def _outputs(layer: str, shapes: Shapes) -> dict[str, _Axis]:
    return {f"{layer}.{name}": _Axis(0, [shapes[f"{layer}.{name}"][0]], False) for name in ("weight", "bias")}
