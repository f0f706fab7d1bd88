"""Pictures to look at beside the numbers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.evaluation.distances.neighbors import Pair
from ldm.evaluation.pictures.base import Pictures
from ldm.evaluation.pictures.made import Reconstructions
from ldm.files import published
from ldm.images import grid, picture

COLUMNS = 12


def seeds_sheet(pictures: Pictures, number: int) -> np.ndarray:
    """The first pictures, row by row; reconstructions each below its original. (H, W, C) uint8."""
    first = range(min(number, len(pictures)))
    images = pictures.images(first)
    if isinstance(pictures, Reconstructions):
        return _one_above_another(pictures.originals.images(first), images)
    return grid(_arrays(images), min(COLUMNS, len(images)))


def pairs_sheet(pairs: Sequence[Pair], pictures: Pictures, reference: Pictures) -> np.ndarray:
    """The closest pairs, the closest first: each picture above the one of the reference. (H, W, C) uint8."""
    ours = pictures.images([pair.image for pair in pairs])
    theirs = reference.images([pair.reference for pair in pairs])
    return _one_above_another(ours, theirs)


def save_sheet(sheet: np.ndarray, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with published(path, durable=False) as file:
        picture(sheet).save(file, format="png")


def _one_above_another(above: Tensor, below: Tensor) -> np.ndarray:
    """Pictures (n, C, H, W) in rows of `COLUMNS`, each above its partner; gray ones as color where the others are."""
    channels = max(above.shape[1], below.shape[1])
    rows = []
    for start in range(0, len(above), COLUMNS):
        for images in (above, below):
            few = images[start : start + COLUMNS].expand(-1, channels, -1, -1)
            blank = few.new_full((COLUMNS - len(few), *few.shape[1:]), 255)
            rows.append(torch.cat([few, blank]) if len(above) > COLUMNS else few)
    return grid(_arrays(torch.cat(rows)), min(COLUMNS, len(above)))


def _arrays(images: Tensor) -> list[np.ndarray]:
    return [*images.permute(0, 2, 3, 1).numpy()]
