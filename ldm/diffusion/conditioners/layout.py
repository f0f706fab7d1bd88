"""Layouts as conditions: boxes with classes, as tokens for cross-attention or rendered as an image.

A batch has `boxes` (N, K, 5): left, top, right, bottom in [0, 1] of the picture, class; and `boxes_mask` (N, K), true
for boxes, false for padding, which nothing depends on. A row may have no box: an empty layout, which is another
condition than none.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.conditioners.base import Conditioning, latent_size
from ldm.diffusion.conditioners.given import Field
from ldm.errors import ConfigError
from ldm.ranges import Count
from ldm.sizes import Size

_ORIGIN = "data.params.aligned.boxes has it kept in the cache"


class _Boxes(nn.Module):
    """Reads the boxes of a batch.

    Args:
        box_classes: 0 .. box_classes - 1.
    """

    keys = ("boxes", "boxes_mask")

    def __init__(self, box_classes: Count) -> None:
        super().__init__()
        self.box_classes = box_classes
        self._boxes = Field("boxes", [None, 5], _ORIGIN)
        self._mask = Field("boxes_mask", [None], _ORIGIN)

    def read(self, batch: Mapping[str, Any], place: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Corners (N, K, 4) float32 and classes (N, K) int64, zeros in padding, and the mask (N, K).

        Raises:
            ConfigError: they are missing or do not fit together or, on the CPU, a box is outside of the picture or of
                a class that does not exist. (Elsewhere, torch stops the program at such a class.)
        """
        given, mask = self._boxes.find(batch).to(place).float(), self._mask.find(batch).to(place) != 0
        if given.shape[1] != mask.shape[1]:
            raise ConfigError(f"condition boxes_mask: found {mask.shape[1]} a row, expected {given.shape[1]}, as boxes")
        boxes = given.masked_fill(~mask[..., None], 0)
        if boxes.device.type == "cpu":
            self._check(boxes[mask])
        return boxes[..., :4], boxes[..., 4].long(), mask

    def _check(self, boxes: Tensor) -> None:
        """`boxes` (M, 5), without padding."""
        left, top, right, bottom, classes = boxes.unbind(-1)
        inside = (left >= 0) & (top >= 0) & (left < right) & (top < bottom) & (right <= 1) & (bottom <= 1)
        known = (classes >= 0) & (classes < self.box_classes) & (classes == classes.floor())
        if not bool((inside & known).all()):
            found = ", ".join(f"{number:g}" for number in boxes[~(inside & known)][0].tolist())
            raise ConfigError(
                "condition boxes: expected 0 <= left < right <= 1, 0 <= top < bottom <= 1 and a class from 0 to "
                f"{self.box_classes - 1} (box_classes={self.box_classes}), found {found}"
            )


class LayoutTokens(_Boxes):
    """A token for each box, after one that begins the layout: (N, 1 + K, channels).

    A box's is a learned row of its class plus a linear map of waves of its corners, sines and cosines of pi x, 2 pi x,
    4 pi x, ... (Mildenhall et al. 2020, "NeRF", eq. 4; so do Li et al. 2023, "GLIGEN"). Their order says nothing.

    The null is one token of its own, "no layout is known"; an empty layout is the one that begins all others.

    Args:
        box_classes: 0 .. box_classes - 1.
        channels: width of a token, the network's `context_dim`.
        waves: of each coordinate; the shortest one has half a period in 1 / 2^(waves - 1) of the picture.
    """

    def __init__(self, box_classes: Count, channels: Count, waves: Count = 8) -> None:
        super().__init__(box_classes)
        self.table = nn.Embedding(box_classes, channels)
        self.begins = nn.Embedding(2, channels)  # a layout; none
        self.waves = waves
        self.corners = nn.Linear(8 * waves, channels)

    def forward(self, batch: Mapping[str, Any]) -> Conditioning:
        corners, classes, mask = self.read(batch, self.table.weight.device)
        begin = self._begin(0, len(mask))  # (N, 1, channels)
        embedding = waves(corners, self.waves).to(self.corners.weight.dtype)  # (N, K, 8 waves)
        boxes = self.table(classes) + self.corners(embedding)  # (N, K, channels)
        return Conditioning(
            tokens=torch.cat([begin, boxes.to(begin.dtype)], dim=1),
            token_mask=torch.cat([mask.new_ones(len(mask), 1), mask], dim=1),
        )

    def null(self, n: int) -> Conditioning:
        tokens = self._begin(1, n)
        return Conditioning(tokens=tokens, token_mask=tokens.new_ones(n, 1, dtype=torch.bool))

    def _begin(self, which: int, n: int) -> Tensor:
        return self.begins(torch.full((n, 1), which, device=self.begins.weight.device))


class LayoutMap(_Boxes):
    """The boxes as an image of the latent's size: (N, channels, h, w).

    A pixel of the latent is the sum of the learned rows of all boxes that cover it, each weighted by the covered share
    of its area; a further row, "no box", has the product of the shares that each leaves. Boxes that overlap add up, so
    that neither their order nor padding changes anything. The null is zeros; an empty layout is "no box" everywhere.

    Args:
        box_classes: 0 .. box_classes - 1.
        channels: of the image, the network's `spatial_channels`.
    """

    def __init__(self, box_classes: Count, channels: Count) -> None:
        super().__init__(box_classes)
        self.table = nn.Embedding(box_classes + 1, channels)

    def forward(self, batch: Mapping[str, Any]) -> Conditioning:
        weight = self.table.weight
        corners, classes, _ = self.read(batch, weight.device)
        shares = coverage(corners, latent_size(batch))  # (N, K, h, w)
        free = (1 - shares).prod(1)  # (N, h, w)
        image = torch.einsum("nkyx,nkc->ncyx", shares.to(weight.dtype), self.table(classes))
        return Conditioning(spatial=image + free[:, None].to(weight.dtype) * weight[-1, :, None, None])

    def null(self, n: int) -> Conditioning:
        return Conditioning(spatial=self.table.weight.new_zeros(n, self.table.embedding_dim, 1, 1))


def waves(places: Tensor, number: Count) -> Tensor:
    """Sines, then cosines of pi x, 2 pi x, ... 2^(number - 1) pi x: (..., D) in [0, 1] -> (..., 2 number D) float32."""
    octaves = math.pi * 2.0 ** torch.arange(number, device=places.device)  # (number,)
    angles = places.float()[..., None] * octaves  # (..., D, number)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def coverage(corners: Tensor, size: Size) -> Tensor:
    """The share of each pixel of an image of `size` that a box covers: corners (..., 4) in [0, 1] -> (..., h, w)."""
    height, width = size
    left, top, right, bottom = corners[..., None].unbind(-2)  # (..., 1) each
    x, y = (torch.arange(side, device=corners.device) for side in (width, height))
    across = (torch.minimum(right * width, x + 1) - torch.maximum(left * width, x)).clamp(min=0)  # (..., w)
    down = (torch.minimum(bottom * height, y + 1) - torch.maximum(top * height, y)).clamp(min=0)  # (..., h)
    return down[..., :, None] * across[..., None, :]
