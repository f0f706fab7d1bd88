"""Latents of pictures with a hole, for inpainting: the hole is filled with one level before it is encoded.

A cache keeps some masks of each item with the latents of the picture behind them, in the orientations that the run
sees, and the sample number chooses one: training needs no autoencoder, and an item is seen with as many holes as there
are variants. Without variants a mask is drawn anew each time, and the autoencoder encodes each picture of each batch
once more: see `MaskedLatents`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from annotated_types import Interval
from torch import Tensor

from ldm.autoencoder.codec import Codec
from ldm.data.drawn import Drawn, draw_rows
from ldm.diffusion.conditioners.features import Part
from ldm.errors import ConfigError, DataError
from ldm.latents.aligned import Mask, Pixels
from ldm.latents.build import LARGEST
from ldm.latents.columns import Column, Crop, lying_on_pictures, pixels
from ldm.latents.part_reader import PartReader
from ldm.latents.parts import Found
from ldm.latents.ragged import to_raw
from ldm.randomness import Draws
from ldm.ranges import Count
from ldm.sizes import Size

NAME = "masked"
MASK, LATENT = "mask", "masked_latent"
"""The columns of a batch."""
KEY = "data.params.masked"

_MEAN, _HOLE = "mean", "hole"
_AT_ONCE = 16  # pictures of one item


class MaskedLatents:
    """`mask` (N,1,H,W), 1 in the hole, and `masked_latent` (N,c,h,w), the standardized posterior mean of what is left.

    Args:
        masks: draws them. None: the items' own (`mask`), of which there is one.
        variants: masks that are drawn for each item when the cache is built. Each takes as many latents in fp16 and
            masks in bits as there are orientations: of pictures of 256 pixels and latents of 4 x 32 x 32 as much as the
            latents themselves. None: a mask is drawn anew for each sample, from the column `image`, and the autoencoder
            stays in memory and encodes each picture of each batch: 8 pictures of 64 pixels take an f8 encoder of 2.1 M
            parameters 0.17 s of one core, where forward and backward of a UNet of 4 M take 0.11 s. Its last bits then
            depend on how many are encoded at once.
        fill: what is put into the hole before it is encoded: gray, as in Stable Diffusion; -1, black, in
            inpainting_big.
    """

    def __init__(
        self,
        masks: Drawn | None = None,
        variants: Count | None = None,
        fill: Annotated[float, Interval(ge=-1, le=1)] = 0.0,
    ) -> None:
        if masks is None:
            if variants not in (None, 1):
                raise ConfigError(f"{KEY}.variants: an item has one mask of its own, found {variants}: leave it out")
            variants = 1
        self.masks = masks
        self.variants = variants
        self.fill = fill

    def describe(self) -> dict[str, Any]:
        found = {"masks": "given" if self.masks is None else self.masks.describe(), "variants": self.variants}
        return found if self.fill == 0 else {**found, "fill": self.fill}

    def gathered(
        self, part: PartReader, size: Size, items: np.ndarray, numbers: np.ndarray, mirrored: np.ndarray, seed: int
    ) -> dict[str, Tensor]:
        """`mask` (N,1,H,W) uint8 and `masked_latent` (N,c,h,w) fp16, not standardized, from a cache.

        Args:
            part: of the cache.
            size: of the pictures.
            items: (N,) int64.
            numbers: (N,) int64, the sample numbers, which choose the variant.
            mirrored: (N,) bool, the orientation.
            seed: of the run; of validation `VALIDATION_SEED`.
        """
        assert self.variants is not None, "there is no part without"
        drawn = Draws(seed, numbers, 1).uniform("masked").numpy().astype(np.float64)
        variant = np.floor(drawn * self.variants).astype(np.int64)
        orientations = 2 if part.plan.feature.get("mirrored", True) else 1
        found = part.gather(NAME, items, orientations * variant + mirrored)
        bits = np.unpackbits(found[f"{NAME}.{_HOLE}"].numpy(), axis=1, count=math.prod(size))
        return {MASK: torch.from_numpy(bits).view(-1, 1, *size), LATENT: found[f"{NAME}.{_MEAN}"]}


def filled(images: Tensor, masks: Tensor, fill: float) -> Tensor:
    """Pictures (N,C,H,W) in [-1,1] with `fill` where the mask (N,1,H,W) is not 0."""
    return torch.where(masks > 0, fill, images)


@dataclass(frozen=True)
class MaskedRows:
    """What a cache keeps of the items: of each variant a row, plain, and one mirrored (dataset_parts.py::ItemRows).

    Args:
        masked: which masks.
        crop: of the pictures.
        codec: the autoencoder.
        encoder: its encoder's hash.
        columns: aligned ones, by name, from which masks can be drawn.
        mirrored: mirror images are seen, too.
    """

    masked: MaskedLatents
    crop: Crop
    codec: Codec
    encoder: str
    columns: Mapping[str, Column]
    mirrored: bool = True

    SEED: ClassVar[int] = 0  # of the masks, whatever a run's is: runs share a cache

    @property
    def reads(self) -> str:
        return "image" if self.masked.masks is not None else "mask"

    @property
    def aligned(self) -> Sequence[str]:
        masks = self.masked.masks
        return ["mask"] if masks is None else lying_on_pictures(self.columns[name] for name in masks.reads)

    @property
    def several(self) -> int:
        return self._variants * (2 if self.mirrored else 1)

    @property
    def parts(self) -> dict[str, Part]:
        latent = self.codec.latent_shape(self.crop.size)
        return {
            _MEAN: Part(latent, torch.float16),
            _HOLE: Part((-(-math.prod(self.crop.size) // 8),), torch.uint8),
        }

    @property
    def _variants(self) -> int:
        assert self.masked.variants is not None, "nothing is cached without"
        return self.masked.variants

    def describe(self) -> dict[str, Any]:
        reads = [] if self.masked.masks is None else self.masked.masks.reads
        return {
            **self.masked.describe(),
            "encoder": self.encoder,
            "pixels": self.crop.describe(),
            "aligned": {name: self.columns[name].describe() for name in reads},
            **({} if self.mirrored else {"mirrored": False}),
        }

    def read(self, number: int, item: Mapping[str, Any], path: str) -> tuple[Tensor, Tensor, str]:
        """The picture (C,H,W) and its masks (variants,1,H,W), both uint8, and its path."""
        picture, _ = Pixels().row(item, self.crop, path)
        masks = self.masked.masks
        if masks is None:
            return picture, Mask().row(item, self.crop, path)[0][None], path
        rows = {name: self.columns[name].row(item, self.crop, path)[0] for name in masks.reads}
        alike = {name: row.expand(self._variants, *row.shape) for name, row in rows.items()}
        numbers = number * self._variants + np.arange(self._variants)
        return picture, draw_rows(NAME, masks, alike, self.SEED, numbers), path

    def found(self, read: tuple[Tensor, Tensor, str]) -> Found:
        picture, masks, path = read
        left = filled(pixels(picture)[None], masks, self.masked.fill)
        if self.mirrored:  # of each mask plain, mirrored
            left, masks = (torch.stack([one, one.flip(-1)], 1).flatten(0, 1) for one in (left, masks))
        means = torch.cat([self.codec.encode(some)[0].cpu() for some in left.split(_AT_ONCE)])
        if not bool((means.abs() <= LARGEST).all()):
            raise DataError(f"{path}: latent of the masked picture: expected magnitudes up to {LARGEST:g} (fp16)")
        bits = np.packbits(masks.flatten(1).numpy() > 0, axis=1)
        rows = zip(means.half(), bits, strict=True)
        return Found([{_MEAN: to_raw(mean), _HOLE: row} for mean, row in rows])


def live(images: Tensor, masks: Tensor, codec: Codec, fill: float) -> Tensor:
    """What a cache would hold of these, unrounded: pictures (N,C,H,W) in [-1,1], masks (N,1,H,W) -> (N,c,h,w)."""
    return codec.encode(filled(images, masks, fill))[0]
