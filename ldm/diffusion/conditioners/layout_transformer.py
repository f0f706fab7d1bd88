"""Layouts as conditions in the words of latent diffusion's own model: three tokens for each box, read by a transformer.

A box is its class, its top left corner and its bottom right corner. A corner is a point of a square grid with about as
many points as there are tokens (90 x 90 for 8192), counted row by row. What is left of the places is filled with the
last token, which stands for nothing; at the end stand the corners of the crop in its picture.
(`ObjectsBoundingBoxConditionalBuilder` in CompVis/taming-transformers, taming/data/conditional_builder; Rombach et al.
2022, appendix E.2.1.)
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor

from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.conditioners.token_transformer import TokenTransformer
from ldm.errors import ConfigError
from ldm.ranges import Count
from ldm.runtime.float64 import double


def layout_tokens(boxes: Tensor, there: Tensor, most: Count, vocab_size: int, crop: bool = True) -> Tensor:
    """Token numbers (N, 3 most, and 2 with `crop`) int64.

    Args:
        boxes: (N, K, 5), K at most `most`: left, top, right, bottom in [0, 1] of the picture, class.
        there: (N, K) bool: which of them there are; they keep their order.
        most: boxes of a layout.
        vocab_size: tokens; the last one stands for nothing.
        crop: two tokens more say which part of its picture the crop is: here it is all of it.
    """
    none, side = vocab_size - 1, math.isqrt(vocab_size)
    first = (~there).int().argsort(dim=1, stable=True)  # those that there are before the others
    boxes, there = boxes.take_along_dim(first[..., None], 1), there.take_along_dim(first, 1)
    # In float64, as a point between two of the grid would fall to another in float32.
    x, y = ((double(boxes[..., axis : axis + 3 : 2]) * (side - 1)).round() for axis in (0, 1))  # (N, K, 2) each
    points = (y * side + x).long().to(boxes.device)  # (N, K, 2)
    triples = torch.cat([boxes[..., 4:].long(), points], dim=-1)  # (N, K, 3)
    tokens = triples.masked_fill(~there[..., None], none).flatten(1)  # (N, 3 K)
    tokens = F.pad(tokens, (0, 3 * most - tokens.shape[1]), value=none)  # (N, 3 most)
    return torch.cat([tokens, tokens.new_tensor([0, side**2 - 1]).expand(len(tokens), 2)], 1) if crop else tokens


class LayoutTransformer(TokenTransformer):
    """The layout as tokens (N, 3 `most`, and 2 with `crop`, `channels`); null: of a layout without boxes.

    In training mode the boxes of a row come in an order drawn anew for each sample, as in the original. All tokens are
    read, those for nothing as well.

    Args:
        channels: width of the tokens, which is the network's `context_dim`.
        depth: layers.
        vocab_size: tokens. Classes and corners share them, so that there are at most one less classes than tokens. (The
            original's classes are followed by those of boxes that are marked as groups, occluded, depictions, inside.)
        most: boxes of a layout.
        crop: as in `layout_tokens`.
        num_heads, num_head_channels: of attention.
    """

    keys: Sequence[str] = ("boxes", "boxes_mask")

    def __init__(
        self,
        channels: Count,
        depth: Count,
        vocab_size: Annotated[int, Ge(2)] = 8192,
        most: Count = 30,
        crop: bool = True,
        num_heads: Count = 8,
        num_head_channels: Count = 64,
    ) -> None:
        super().__init__(vocab_size, 3 * most + 2 * crop, channels, depth, num_heads, num_head_channels)
        self.vocab_size = vocab_size
        self.most = most
        self.crop = crop

    def forward(self, batch: Mapping[str, Any]) -> Conditioning:
        """Raises ConfigError if there are no boxes, too many, or a class without a token."""
        boxes, there = self._read(batch)
        if self.training:
            order = batch["draws"].normal("layout/order", (boxes.shape[1],)).argsort(dim=1)  # (N, K)
            boxes, there = boxes.take_along_dim(order[..., None], 1), there.take_along_dim(order, 1)
        return self._conditioning(boxes, there)

    def null(self, n: int) -> Conditioning:
        boxes = self.places.new_zeros(1, 0, 5)
        one = self._conditioning(boxes, boxes.new_zeros(1, 0, dtype=torch.bool))
        assert one.tokens is not None
        return Conditioning(tokens=one.tokens.expand(n, -1, -1))

    def _conditioning(self, boxes: Tensor, there: Tensor) -> Conditioning:
        return Conditioning(tokens=self.encoded(layout_tokens(boxes, there, self.most, self.vocab_size, self.crop)))

    def _read(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """(N, K, 5) and (N, K) bool."""
        if any(key not in batch for key in self.keys):
            raise ConfigError(
                "LayoutTransformer: the batch has no boxes: keep those of the data set with data.params.aligned.boxes, "
                "or use another conditioner"
            )
        boxes, there = batch["boxes"], batch["boxes_mask"].bool()
        if boxes.shape[1] > self.most:
            raise ConfigError(
                f"LayoutTransformer: most: expected {self.most} boxes in a row at most, found {boxes.shape[1]}; keep "
                f"as many with data.params.aligned.boxes.params.most"
            )
        classes = boxes[..., 4]
        # Not in training, where looking would wait for the device at each step.
        if not self.training and not boxes.is_meta:
            wrong = classes[there & ((classes < 0) | (classes >= self.vocab_size - 1))]
            if len(wrong):
                raise ConfigError(
                    f"LayoutTransformer: expected classes from 0 to {self.vocab_size - 2}, found {wrong[0]:g}"
                )
        return boxes, there
