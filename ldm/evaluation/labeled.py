"""What judges learn from: of a configuration's items what is in their boxes, or their pictures with their maps.

Pictures are cropped as those of a latent cache are, and what lies on them with them.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.data.dataset import box_classes, map_classes
from ldm.errors import ConfigError, DataError
from ldm.evaluation.agreement import Agreement, classes_of
from ldm.evaluation.features.classifier import UNLABELED
from ldm.evaluation.judges import crops
from ldm.evaluation.pictures.configured import Configured
from ldm.latents.aligned import Boxes, Map
from ldm.latents.columns import Column, Crop
from ldm.ranges import Count
from ldm.runtime.progress import tracked
from ldm.runtime.signals import stop_if_asked

log = logging.getLogger(__name__)


class Item(NamedTuple):
    """`image` (C,H,W) uint8, and `row`, what lies on it, as a cache keeps it."""

    image: Tensor
    row: Tensor


class Labeled(NamedTuple):
    """Pictures that a judge is trained on.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) or (N, H, W) integers.
        num_classes: as many as the data says that there are, or as are found.
        names: of the classes; None: they have none.
        what: the pictures are, for people.
    """

    images: Tensor
    labels: Tensor
    num_classes: Count
    names: Sequence[str] | None
    what: str


def in_boxes(found: Configured, number: Count | None, origin: Path) -> Labeled:
    """Crops of all boxes of the first `number` items, or of all, and their classes.

    Raises:
        ConfigError: items have no boxes.
        DataError: none can be read, none has a box, or a class has no name.
    """
    images, rows = [], []
    for item in _read(found, "boxes", number, origin):
        images.append(crops(item.image[None], [item.row]))
        rows.append(item.row)
    classes = torch.cat(rows)[:, 4].long()
    if not len(classes):
        raise DataError(f"{origin}: none of {len(rows)} items has a box")
    names = box_classes(found.pictures.dataset)
    return Labeled(torch.cat(images), classes, _number(classes, names, origin), names, "boxes")


def with_maps(found: Configured, number: Count | None, origin: Path) -> Labeled:
    """Those of the first `number` pictures, or of all, of which some pixel has a class, and their maps.

    Raises:
        ConfigError: items have no map.
        DataError: none can be read, none has a labeled pixel, or a class has no name.
    """
    column, names = _column(found, "map"), map_classes(found.pictures.dataset)
    known = column.num_classes if isinstance(column, Map) else None
    images, maps = zip(*_read(found, "map", number, origin), strict=True)
    classes = torch.stack([classes_of(one, known or 255).short() for one in maps])
    some = (classes != UNLABELED).flatten(1).any(1)
    if not some.any():
        raise DataError(f"{origin}: none of {len(maps)} maps has a labeled pixel")
    total = _number(classes, names, origin) if known is None else known
    return Labeled(torch.stack(images)[some], classes[some], total, names, "pictures with maps")


def counts(agreement: Agreement, found: Configured, origin: Path) -> np.ndarray:
    """What a judge finds on all items, (N, k) (`Agreement.counts`)."""
    of_items = []
    for image, row in _read(found, agreement.what, None, origin):
        of_items.append(agreement.counts(image[None], [{agreement.what: row}]))
    return torch.cat(of_items).numpy()


def _read(found: Configured, key: str, number: Count | None, origin: Path) -> Iterator[Item]:
    """The first items that can be read, with what lies on them under this key."""
    pictures, column = found.pictures, _column(found, key)
    crop = Crop(pictures.transform, pictures.channels)
    lost, total = 0, min(number or len(pictures), len(pictures))
    for place in tracked(range(total), f"{found.part} pictures"):
        stop_if_asked()
        path = pictures.dataset.path(place)
        try:
            item: dict[str, Any] = {**pictures.dataset[place]}
            if key not in item:
                raise ConfigError(
                    f"{origin}: its items ({path}, ...) have {', '.join(item)}, and no {key}: name the configuration "
                    "of a data set that has them"
                )
            row, _ = column.row(item, crop, path)
            yield Item(crop.picture(item["image"], crop.channels, path), row)
        except DataError as error:
            log.warning("%s; it is left out", error)
            lost += 1
    if lost == total:
        raise DataError(f"{origin}: none of the {total} pictures of its {found.part} part can be read")


def _column(found: Configured, key: str) -> Column:
    """As the configuration keeps it; of one that does not, the usual one."""
    usual: dict[str, Column] = {"boxes": Boxes(), "map": Map()}
    return {**usual, **({} if found.dense is None else found.dense.aligned)}[key]


def _number(classes: Tensor, names: Sequence[str] | None, origin: Path) -> int:
    """Of classes: of those that have names, else of those that there are."""
    most = int(classes.max()) + 1
    if names is not None and most > len(names):
        raise DataError(f"{origin}: an item has class {most - 1}, and the data set names {len(names)} classes")
    return most if names is None else len(names)
