"""Where an error counts: for inpainting, above all in the hole, since around it the latent is known."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.conditioners.given import Field
from ldm.errors import ConfigError
from ldm.ranges import CountOrZero, FractionAboveZero
from ldm.sizes import is_multiple


class MaskedLoss:
    """Weights of the latent's pixels: 1 in the hole, `unmasked_weight` around it, divided by their mean.

    A model that is given what is around a hole learns little from it: with a hole of a tenth, nine tenths of an
    unweighted loss lie where the model was given the answer. Fine-tuning tools know this as masked training. The mean
    weight of each row is 1, so a small hole counts as much as a large one, and the learning rate stays what it was.

    A batch has `mask` (N, 1, H, W) in pixels, 1 in the hole and 0 around it. A latent pixel lies in the hole if any of
    its pixels does.

    Args:
        unmasked_weight: of what is around the hole; 1 weights nothing.
        margin: latent pixels around the hole that count as it does, since its edge is to fit.
    """

    def __init__(self, unmasked_weight: FractionAboveZero = 0.05, margin: CountOrZero = 1) -> None:
        self.unmasked_weight = unmasked_weight
        self.margin = margin
        self._mask = Field("mask", [1, None, None], "data.params.masked has it drawn")

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """Weights (N, 1, h, w) for the batch's `latent` (N, c, h, w), of mean 1 over each row.

        Raises:
            ConfigError: a batch without a mask, or with one whose sides are no multiples of the latent's.
        """
        latent = batch["latent"]
        mask = self._mask.read(batch, latent)  # (N, 1, H, W)
        size, pixels = latent.shape[2:], mask.shape[2:]
        if not is_multiple(pixels, size):
            raise ConfigError(
                f"masked_loss: a mask of {[*pixels]} pixels, expected whole multiples of the latent's sides, {[*size]}"
            )
        hole = F.adaptive_max_pool2d(mask, size)  # (N, 1, h, w)
        hole = F.max_pool2d(hole, 2 * self.margin + 1, stride=1, padding=self.margin)  # (N, 1, h, w)
        weights = self.unmasked_weight + (1 - self.unmasked_weight) * hole
        return weights / weights.mean(dim=(1, 2, 3), keepdim=True)
