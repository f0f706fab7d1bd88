"""Dense conditions as pictures: maps in colors, boxes with names, masked pictures, small pictures enlarged.

For sheets of samples, previews in training and the page alike; each has the height and width of a sample.
"""

import colorsys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ldm.images import font, visible
from ldm.sampling.dense import Dense
from ldm.sizes import Size

UNLABELED = (0, 0, 0)
HOLE = 128
"""The gray of a hole, as a model of masked pictures sees it."""

SHOWABLE = ("map", "boxes", "mask", "low_resolution", "pair", "image")
"""The keys of a condition that can be drawn."""

_GOLDEN = (5**0.5 - 1) / 2
_SHADES = ((0.75, 0.95), (0.5, 0.75), (0.95, 0.6), (0.35, 1.0), (0.85, 0.8))  # saturation and value


@cache
def palette() -> np.ndarray:
    """(256, 3) uint8: a color for each class, no two alike, neighbors far apart; from 256 classes up they repeat."""
    found: dict[tuple[int, int, int], None] = {UNLABELED: None}
    place = 0
    while len(found) <= 256:
        saturation, value = _SHADES[place % len(_SHADES)]
        red, green, blue = colorsys.hsv_to_rgb(place * _GOLDEN % 1, saturation, value)
        found[(round(red * 255), round(green * 255), round(blue * 255))] = None
        place += 1
    return np.array([*found][1:], dtype=np.uint8)


def color(label: int) -> tuple[int, int, int]:
    """The color of a class."""
    red, green, blue = palette()[label % 256].tolist()
    return red, green, blue


def drawn_map(labels: Any) -> np.ndarray:
    """A map (H,W) of classes, 255 of uint8 and -1 being unlabeled -> (H,W,3) uint8 in the colors of the classes."""
    values = np.asarray(labels)
    unlabeled = values == 255 if values.dtype == np.uint8 else values < 0
    return np.where(unlabeled[..., None], np.array(UNLABELED, np.uint8), palette()[values.astype(np.int64) % 256])


def labels_of(colors: np.ndarray) -> np.ndarray | None:
    """A map of up to 255 classes as `drawn_map` draws it, (H,W,3) uint8 -> (H,W) uint8; None for other colors."""
    codes = colors.astype(np.int64) @ (1 << 16, 1 << 8, 1)  # (H,W)
    known = np.concatenate([palette()[:255], [UNLABELED]]).astype(np.int64) @ (1 << 16, 1 << 8, 1)
    order = np.argsort(known)
    places = order[np.searchsorted(known[order], codes).clip(max=len(known) - 1)]
    return places.astype(np.uint8) if (known[places] == codes).all() else None


def drawn_boxes(boxes: Any, size: Size, names: Sequence[str] | None = None, below: np.ndarray | None = None) -> Any:
    """Boxes with the names of their classes.

    Args:
        boxes: (K,5): left, top, right, bottom in [0,1] of the picture, and class.
        size: (height, width) of the picture.
        names: of the classes; None: they have numbers.
        below: (H,W,3) uint8, what they are drawn on; None: white.

    Returns:
        (H,W,3) uint8.
    """
    height, width = size
    times = max(1, -(-256 // max(size)))  # names are legible in small pictures too
    under = np.full((height, width, 3), 255, np.uint8) if below is None else below
    picture = Image.fromarray(under.repeat(times, 0).repeat(times, 1))
    draw, letters = ImageDraw.Draw(picture), font(max(11, picture.height // 24))
    for *corners, label in np.asarray(boxes, dtype=np.float64).reshape(-1, 5).tolist():
        fill, place = color(int(label)), [corner * side for corner, side in zip(corners, picture.size * 2, strict=True)]
        draw.rectangle(place, outline=fill, width=max(2, picture.height // 128))
        name = str(int(label)) if names is None else names[int(label)]
        where = (place[0] + 3, place[1] + 2)
        draw.rectangle(draw.textbbox(where, name, font=letters), fill=fill)
        draw.text(where, name, fill="black" if sum(fill) > 380 else "white", font=letters)
    return np.asarray(picture)


def masked(image: np.ndarray, mask: Any) -> np.ndarray:
    """A picture (H,W,C) uint8 whose hole, where `mask` (H,W) or (1,H,W) is not 0, is gray."""
    hole = np.asarray(mask).reshape(image.shape[:2]) > 0
    return np.where(hole[..., None], np.uint8(HOLE), image)


def pixels(image: Any) -> np.ndarray:
    """(C,H,W) in [-1,1] -> (H,W,C) uint8."""
    values = np.asarray(image, dtype=np.float32).clip(-1, 1)
    array: np.ndarray = np.rint((values + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)
    return array


def enlarged(image: np.ndarray, size: Size) -> np.ndarray:
    """A picture (H',W',C) uint8 at another size, each pixel a square."""
    rows, columns = (np.arange(side) * there // side for side, there in zip(size, image.shape[:2], strict=True))
    return image[rows][:, columns]


def colored(image: np.ndarray, size: Size) -> np.ndarray:
    """(H,W,C) uint8 as it is shown, in color, at a size: (*size, 3)."""
    seen = visible(image)
    if seen.shape[1] != image.shape[1]:  # several channels beside one another: the first stands for all
        seen = image[..., :1]
    return np.broadcast_to(enlarged(seen, size), (*size, 3)) if seen.shape[2] == 1 else enlarged(seen, size)


def conditions(condition: Mapping[str, Any] | None, size: Size, dense: Dense) -> list[np.ndarray]:
    """What can be drawn of a condition to sample with, a picture each.

    Args:
        condition: with arrays or tensors, as `generate` takes them.
        size: (height, width) of the samples; drawn larger where boxes have names to be read.
        dense: what is known of the model's conditions, such as the names of the classes of boxes.

    Returns:
        (H,W,3) uint8 each: the masked picture, the pair, the small picture, the map, the layout.
    """
    found = []
    said = {key: _array(value) for key, value in (condition or {}).items() if key in SHOWABLE}
    if "mask" in said:
        below = pixels(said["image"]) if "image" in said else np.full((*said["mask"].shape[-2:], 1), 255, np.uint8)
        found.append(masked(below, said["mask"]))
    elif "image" in said:
        found.append(pixels(said["image"]))
    found += [pixels(said[key]) for key in ("pair", "low_resolution") if key in said]
    if "map" in said:
        found.append(drawn_map(said["map"]))
    if "boxes" in said:
        boxes = said["boxes"]
        there = (condition or {}).get("boxes_mask")
        found.append(
            drawn_boxes(boxes if there is None else boxes[_array(there).astype(bool)], size, dense.box_classes)
        )
    return found


def beside(pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What stands in a row (conditions, samples, truth) at one size, that of the largest, in color: (H,W,3) each."""
    largest = max((image.shape[0], image.shape[1]) for image in pictures)
    return [colored(image, largest) for image in pictures]


def _array(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
