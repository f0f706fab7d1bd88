"""Boxes of objects from COCO's JSON (instances_*.json): https://cocodataset.org/#format-data."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import DataError
from ldm.sizes import Size, same_proportions

# Only these are kept while the file is read: outlines of objects would take gigabytes.
_KEPT = frozenset(
    {"images", "annotations", "categories", "id", "file_name", "width", "height", "name"}
    | {"image_id", "category_id", "bbox", "iscrowd"}
)
_NOTHING = 1e-3  # pixels: the third decimal is rounding
_SHAPE = '{"images": [...], "annotations": [...], "categories": [...]}'


class CocoBoxes:
    """Boxes of each picture, from `images`, `annotations` and `categories` of a JSON file.

    `file_name` of an image is relative to the pictures' folder. Classes are numbered from 0 in the order of their
    categories' ids. A box that reaches outside of its picture is clipped; one that has no area in it is left out, and
    so are crowds; all three are counted in a warning. A picture may have no box, or thousands.

    The boxes are in pixels of the `width` and `height` that the file states; of a picture that was resized in
    proportion they are scaled with it.

    Args:
        file: the JSON file.
    """

    key = "boxes"

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)

    def beside(self, root: Path, pictures: Sequence[str]) -> "_Boxes":
        file = read(self.file)
        lacking = [name for name in pictures if name not in file.image_of]
        if lacking:
            raise DataError(
                f"{root / lacking[0]}: is not among the {len(file.image_of)} `images` of {self.file}, like "
                f"{len(lacking)} of {len(pictures)} pictures in all: set `root` of the data set to the folder that "
                "`file_name` is relative to, add them there, or list the other pictures in a table (ImageTable)"
            )
        return _Boxes(file, [file.image_of[name] for name in pictures])


@dataclass(frozen=True)
class CocoFile:
    """What such a file says.

    Attributes:
        path: of it.
        classes: the names of categories, in the order of their ids.
        image_of: a number for each image, by name.
        sizes: (N,2) int64, height and width of each.
        boxes: (M,5) float64: left, top, right, bottom, class; image by image, in the file's order.
        first: (N+1,) int64, where the boxes of each image begin.
        note: what was left out or clipped; "": nothing.
    """

    path: Path
    classes: list[str]
    image_of: Mapping[str, int]
    sizes: np.ndarray
    boxes: np.ndarray
    first: np.ndarray
    note: str


class _Boxes:
    def __init__(self, file: CocoFile, images: Sequence[int]) -> None:
        self.classes: list[str] | None = file.classes
        absent = len(file.image_of) - len(set(images))
        self.note = "; ".join(
            filter(None, [file.note, f"{absent} images of {file.path} are not there" if absent else ""])
        )
        self._file = file
        self._images = images

    def of(self, index: int, size: Size) -> np.ndarray:
        image, file = self._images[index], self._file
        height, width = file.sizes[image].tolist()
        if not same_proportions((height, width), size):
            name = next(name for name, number in file.image_of.items() if number == image)
            raise DataError(
                f"{file.path}: says that {name} has {width} x {height} pixels; it has {size[1]} x {size[0]}, of other "
                "proportions, so its boxes lie elsewhere: correct `width`, `height` and the boxes"
            )
        scale = np.array([size[1] / width, size[0] / height] * 2 + [1])
        return (file.boxes[file.first[image] : file.first[image + 1]] * scale).astype(np.float32)

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        file, images = self._file, np.asarray(self._images, dtype=np.int64)
        digest = hashlib.sha256(json.dumps(file.classes).encode())
        counts = np.diff(file.first)[images]
        digest.update(file.sizes[images].tobytes() + counts.tobytes())
        for image in images.tolist():
            digest.update(file.boxes[file.first[image] : file.first[image + 1]].tobytes())
        return digest.hexdigest()


def read(path: Path) -> CocoFile:
    """All boxes of a file.

    Raises:
        DataError: it cannot be read, or holds something else; names the entry, what was expected and found.
    """
    document = _document(path)
    classes, class_of = _categories(path, document["categories"])
    image_of, names, sizes = _images(path, document["images"])
    images, boxes, crowds = _annotations(path, document["annotations"], image_of, class_of)
    limits = sizes[images][:, [1, 0, 1, 0]]
    clipped = np.concatenate([np.clip(boxes[:, :4], 0, limits), boxes[:, 4:]], axis=1)
    whole = (clipped[:, 2:4] - clipped[:, :2] > _NOTHING).all(1)
    cut = whole & (np.abs(clipped - boxes) > _NOTHING).any(1)
    notes = [
        f"{crowds} crowds are left out" if crowds else "",
        _counted(~whole, "boxes have no area in their picture and are left out", images, names),
        _counted(cut, "boxes reach outside of their picture and are clipped", images, names),
    ]
    order = np.argsort(images[whole], kind="stable")
    counts = np.bincount(images[whole], minlength=len(names))
    note = ", ".join(filter(None, notes))
    return CocoFile(
        path=path,
        classes=classes,
        image_of={name: number for number, name in enumerate(names)},
        sizes=sizes,
        boxes=clipped[whole][order],
        first=np.concatenate([[0], np.cumsum(counts)]),
        note=f"{path}: {note}" if note else "",
    )


def _counted(chosen: np.ndarray, what: str, images: np.ndarray, names: Sequence[str]) -> str:
    return f"{chosen.sum()} {what} (the first in {names[images[chosen.argmax()]]})" if chosen.any() else ""


def _document(path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            found = json.load(file, object_pairs_hook=lambda pairs: {k: v for k, v in pairs if k in _KEPT})
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); expected {_SHAPE}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected {_SHAPE}, found a {type(found).__name__}")
    for key in ("images", "annotations", "categories"):
        rows = found.get(key)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            state = "is missing" if rows is None else "is no list of objects"
            raise DataError(f"{path}: `{key}` {state}; expected {_SHAPE}, as in COCO's instances_*.json")
    return found


def _categories(path: Path, rows: Sequence[dict[str, Any]]) -> tuple[list[str], dict[int, int]]:
    """Names of classes, and the class of each category's id."""
    names: dict[int, str] = {}
    for number, row in enumerate(rows):
        where = f"{path}: categories[{number}]"
        identity = _whole(row, "id", where)
        if identity in names:
            raise DataError(f"{where}: id {identity} is also that of {names[identity]!r}; expected another")
        names[identity] = _text(row, "name", where)
    if not names:
        raise DataError(f'{path}: `categories` is empty; expected [{{"id": 1, "name": "person"}}, ...]')
    return [names[identity] for identity in sorted(names)], {one: label for label, one in enumerate(sorted(names))}


def _images(path: Path, rows: Sequence[dict[str, Any]]) -> tuple[dict[int, int], list[str], np.ndarray]:
    """The number of each image's id, their names, and (N,2) height and width."""
    number_of: dict[int, int] = {}
    names: dict[str, None] = {}
    sizes = np.zeros((len(rows), 2), np.int64)
    for number, row in enumerate(rows):
        where = f"{path}: images[{number}]"
        identity, name = _whole(row, "id", where), _text(row, "file_name", where)
        sizes[number] = _whole(row, "height", where), _whole(row, "width", where)
        if sizes[number].min() < 1:
            raise DataError(
                f"{where}: expected a width and height of 1 or more, found {row['width']} x {row['height']}"
            )
        if identity in number_of or name in names:
            raise DataError(f"{where}: its id {identity} or file_name {name!r} is that of another image; remove one")
        number_of[identity] = number
        names[name] = None
    return number_of, [*names], sizes


def _annotations(
    path: Path, rows: Sequence[dict[str, Any]], image_of: Mapping[int, int], class_of: Mapping[int, int]
) -> tuple[np.ndarray, np.ndarray, int]:
    """The image of each box, (M,) int64; boxes (M,5) float64, as they stand; and how many crowds were left out."""
    images: list[int] = []
    boxes: list[tuple[float, ...]] = []
    for number, row in enumerate(rows):
        if row.get("iscrowd"):
            continue
        where = f"{path}: annotations[{number}]"
        image, category = _whole(row, "image_id", where), _whole(row, "category_id", where)
        if image not in image_of:
            raise DataError(f"{where}: image_id {image} is none of the {len(image_of)} `images`; correct or remove it")
        if category not in class_of:
            known = ", ".join(map(str, [*class_of][:10]))
            raise DataError(f"{where}: category_id {category} is none of `categories` ({known}); add it there")
        left, top, width, height = _corners(row, where)
        images.append(image_of[image])
        boxes.append((left, top, left + width, top + height, class_of[category]))
    found = np.array(boxes, dtype=np.float64).reshape(-1, 5)
    return np.array(images, dtype=np.int64), found, len(rows) - len(boxes)


def _corners(row: Mapping[str, Any], where: str) -> Sequence[float]:
    box = row.get("bbox")
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(type(side) in (int, float) and abs(side) < 2**31 for side in box)  # NaN is not less either
    ):
        raise DataError(f"{where}: bbox: expected [left, top, width, height] in pixels, found {str(box)[:80]}")
    return box


def _whole(row: Mapping[str, Any], key: str, where: str) -> int:
    value = row.get(key)
    if type(value) is not int:
        raise DataError(f"{where}: {key}: expected a whole number, found {str(value)[:80]}")
    return value


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key}: expected a text, found {str(value)[:80]}")
    return value
