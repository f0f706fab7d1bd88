"""A running average of a model's weights, counted in images.

Early weights are near the random start, so an average with a long memory would look like noise for long: every profile
here starts with no memory and lengthens it.
"""

import copy
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Profile(Protocol):
    """profile(images_seen before the update, images in the update) -> the old average's share, in [0, 1]."""

    def __call__(self, images_seen: int, images: int) -> float: ...


class HalfLife:
    """A weight's share halves every `images` images, whatever the batch size.

    Until 1/ramp half-lives have passed, the half-life is `ramp` times the images seen (Karras et al. 2022, "EDM").
    """

    def __init__(self, images: float, ramp: float = 0.05) -> None:
        self.images = images
        self.ramp = ramp

    def __call__(self, images_seen: int, images: int) -> float:
        half_life = min(self.images, self.ramp * images_seen)
        return 0.5 ** (images / half_life) if half_life > 0 else 0.0


class Decay:
    """The classic: a constant share an update, at first at most (1 + n) / (10 + n) after n updates of this size."""

    def __init__(self, decay: float = 0.9999) -> None:
        self.decay = decay

    def __call__(self, images_seen: int, images: int) -> float:
        updates = images_seen / images
        return min(self.decay, (1 + updates) / (10 + updates))


class EMA(nn.Module):
    """Holds the average as the submodule `average`: a float32 copy, always in eval mode, never trained.

    Attributes:
        average: the averaged model.
        images_seen: images counted so far; kept on the host (reading it never waits) and saved with the weights.
    """

    def __init__(self, model: nn.Module, profile: Profile) -> None:
        super().__init__()
        self.average = copy.deepcopy(model).float().requires_grad_(False)
        self.profile = profile
        self.images_seen = 0
        self.train(False)

    @torch.no_grad()
    def update(self, model: nn.Module, images: int) -> None:
        """Take in the weights after an optimizer step over `images` images (the global batch)."""
        keep = self.profile(self.images_seen, images)
        averages: list[Tensor] = [*self.average.parameters()]
        weights = [w.to(a.dtype) for a, w in zip(averages, model.parameters(), strict=True)]
        torch._foreach_lerp_(averages, weights, 1 - keep)
        for ours, theirs in zip(self.average.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
        self.images_seen += images

    def train(self, mode: bool = True) -> "EMA":
        """Stays in eval mode, whatever the module around it does."""
        return super().train(False)

    def get_extra_state(self) -> dict[str, Any]:
        return {"images_seen": self.images_seen}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.images_seen = state["images_seen"]
