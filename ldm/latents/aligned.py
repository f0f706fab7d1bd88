"""What of an item lies on its picture, as a cache keeps it: maps, boxes, masks, pictures.

It is cropped once, exactly as `EvalTransform` crops the picture, and mirrored when a batch is gathered, as exactly:
a map that is the picture stays the picture. A cache has a part (parts.py) for each column, and where there are buckets
one for each size.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Interval
from PIL import Image
from torch import Tensor

from ldm.data.dataset import Picture
from ldm.diffusion.conditioners.features import Part
from ldm.errors import DataError
from ldm.latents.columns import Crop, hole, pixels
from ldm.ranges import Count
from ldm.sizes import Size, same_proportions, spell

_GRID = 1 << 16  # of corners in a crop: then 1 - x is exact, and mirroring twice changes nothing


class Map:
    """`map` (H,W): the class of each pixel. 255 (of uint8) and -1 (of int16) mean unlabeled.

    Args:
        num_classes: of the data set; int16 from 256 up. None: as many as uint8 has.
    """

    reads = "map"

    def __init__(self, num_classes: Annotated[int, Interval(ge=1, le=32767)] | None = None) -> None:
        self.num_classes = num_classes
        self.dtype = torch.uint8 if num_classes is None or num_classes <= 255 else torch.int16

    def part(self, crop: Crop) -> Part:
        return Part(crop.size, self.dtype)

    def describe(self) -> dict[str, Any]:
        return {"what": "map", "num_classes": self.num_classes}

    def row(self, item: Mapping[str, Any], crop: Crop, path: str) -> tuple[Tensor, bool]:
        values = _on_picture("map", item, (np.uint8, np.int16))
        unlabeled, most = values == (255 if values.dtype == np.uint8 else -1), self.num_classes or 255
        if (wrong := values[~unlabeled & ((values < 0) | (values >= most))]).size:
            hint = "" if self.num_classes else "; say how many there are: data.params.aligned.map.params.num_classes"
            raise DataError(
                f"map: expected classes 0 .. {most - 1}, or 255 (uint8) or -1 (int16) for unlabeled, found "
                f"{wrong[0]}{hint}"
            )
        if self.dtype == torch.uint8:
            values = np.where(unlabeled, 255, values).astype(np.uint8)
        else:
            values = np.where(unlabeled, -1, values.astype(np.int16)).astype(np.int16)
        return torch.from_numpy(crop.transform.labels(values)), False

    def mirrored(self, rows: Tensor) -> Tensor:
        return rows.flip(-1)

    def placed(self, rows: Tensor) -> Tensor:
        return rows


class Boxes:
    """`boxes` (K,5): corners in the crop, [0,1], and class; a box of which nothing is in the crop is left out.

    Args:
        most: boxes that are kept, the largest ones; rows of a batch are padded to so many, and `boxes_mask` says which
            there are. A layout may be empty.
    """

    reads = "boxes"

    def __init__(self, most: Count = 30) -> None:
        self.most = most

    def part(self, crop: Crop) -> Part:
        return Part((self.most, 5), torch.float32, ragged=True)

    def describe(self) -> dict[str, Any]:
        return {"what": "boxes", "most": self.most}

    def row(self, item: Mapping[str, Any], crop: Crop, path: str) -> tuple[Tensor, bool]:
        size = size_of(item["image"])
        boxes = np.asarray(item["boxes"], dtype=np.float64)
        if boxes.ndim != 2 or boxes.shape[1] != 5:
            raise DataError(f"boxes: expected (K, 5), left, top, right, bottom, class, found {boxes.shape}")
        self._check(boxes, size)
        corners = crop.transform.corners(boxes[:, :4].reshape(-1, 2, 2), size).reshape(-1, 4)
        corners = np.rint(corners.clip(0, 1) * _GRID) / _GRID
        sides = corners[:, 2:] - corners[:, :2]
        found = np.concatenate([corners, boxes[:, 4:]], 1)[(sides > 0).all(1)]
        if too_many := len(found) > self.most:
            areas = sides[(sides > 0).all(1)].prod(1)
            found = found[np.sort(np.argsort(-areas, kind="stable")[: self.most])]
        return torch.from_numpy(found.astype(np.float32)), too_many

    def _check(self, boxes: np.ndarray, size: Size) -> None:
        left, top, right, bottom, classes = boxes.T
        bad = ~((left < right) & (top < bottom) & (classes >= 0) & np.isfinite(boxes).all(1))
        bad |= (right <= 0) | (bottom <= 0) | (left >= size[1]) | (top >= size[0])
        if bad.any():
            found = ", ".join(f"{number:g}" for number in boxes[np.flatnonzero(bad)[0]])
            raise DataError(
                f"boxes: expected left < right, top < bottom, in the picture of {spell(size)} pixels, and a class from "
                f"0 up, found {found}"
            )

    def mirrored(self, rows: Tensor) -> Tensor:
        left, top, right, bottom, classes = rows.unbind(-1)
        flipped = torch.stack([1 - right, top, 1 - left, bottom, classes], -1)
        return torch.where((left < right)[..., None], flipped, rows)  # what pads a layout stays zero

    def placed(self, rows: Tensor) -> Tensor:
        return rows


class Mask:
    """`mask` (1,H,W): 1 in the hole, which may be changed, and 0 where the picture stays; kept as 255 and 0."""

    reads = "mask"

    def part(self, crop: Crop) -> Part:
        return Part((1, *crop.size), torch.uint8)

    def describe(self) -> dict[str, Any]:
        return {"what": "mask"}

    def row(self, item: Mapping[str, Any], crop: Crop, path: str) -> tuple[Tensor, bool]:
        hole = np.where(_on_picture("mask", item, (np.uint8, np.bool_)) > 0, 255, 0).astype(np.uint8)
        return torch.from_numpy(crop.transform.labels(hole))[None], False

    def mirrored(self, rows: Tensor) -> Tensor:
        return rows.flip(-1)

    def placed(self, rows: Tensor) -> Tensor:
        return hole(rows)


class Pixels:
    """`image` (C,H,W): the picture itself, in [-1,1]; kept as uint8."""

    reads = "image"

    def part(self, crop: Crop) -> Part:
        return Part((crop.channels, *crop.size), torch.uint8)

    def describe(self) -> dict[str, Any]:
        return {"what": "pixels"}

    def row(self, item: Mapping[str, Any], crop: Crop, path: str) -> tuple[Tensor, bool]:
        return crop.picture(item["image"], crop.channels, path), False

    def mirrored(self, rows: Tensor) -> Tensor:
        return rows.flip(-1)

    def placed(self, rows: Tensor) -> Tensor:
        return pixels(rows)


class Pair:
    """`pair` (C,H,W): a second picture of the item, of the same proportions, resized and cropped as the first.

    Args:
        channels: of it.
    """

    reads = "pair"

    def __init__(self, channels: Count = 3) -> None:
        self.channels = channels

    def part(self, crop: Crop) -> Part:
        return Part((self.channels, *crop.size), torch.uint8)

    def describe(self) -> dict[str, Any]:
        return {"what": "pair", "channels": self.channels}

    def row(self, item: Mapping[str, Any], crop: Crop, path: str) -> tuple[Tensor, bool]:
        size, found = size_of(item["image"]), size_of(item["pair"])
        if not same_proportions(size, found):
            raise DataError(
                f"pair: expected the proportions of its picture, {spell(size)} pixels, found {spell(found)}"
            )
        return crop.picture(item["pair"], self.channels, path), False

    def mirrored(self, rows: Tensor) -> Tensor:
        return rows.flip(-1)

    def placed(self, rows: Tensor) -> Tensor:
        return pixels(rows)


def size_of(picture: Picture) -> Size:
    """Height and width, pixels."""
    return (picture.height, picture.width) if isinstance(picture, Image.Image) else (picture.shape[0], picture.shape[1])


def _on_picture(key: str, item: Mapping[str, Any], types: tuple[Any, ...]) -> np.ndarray:
    """The values under the key, (H,W); DataError unless they are of these types and as many as the picture's pixels."""
    values, size = np.asarray(item[key]), size_of(item["image"])
    if values.shape != size:
        raise DataError(f"{key}: expected {size}, the picture's height and width, found {values.shape}")
    if values.dtype not in types:
        raise DataError(f"{key}: expected {' or '.join(one.__name__ for one in types)}, found {values.dtype}")
    return values
