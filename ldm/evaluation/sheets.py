"""Pictures to look at beside the numbers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.evaluation.distances.neighbors import Pair
from ldm.evaluation.followed import Followed
from ldm.evaluation.pictures.base import Pictures
from ldm.evaluation.pictures.made import Reconstructions
from ldm.files import published
from ldm.images import grid, picture
from ldm.sampling.dense import Dense
from ldm.sampling.sample_folder import title
from ldm.sampling.shown import beside, conditions

COLUMNS = 12
ROWS = 12
"""Of the sheet that shows what samples were asked by."""


def seeds_sheet(pictures: Pictures, number: int) -> np.ndarray:
    """The first pictures, row by row; reconstructions each below its original. (H, W, C) uint8."""
    first = range(min(number, len(pictures)))
    images = pictures.images(first)
    if isinstance(pictures, Reconstructions):
        return _one_above_another(pictures.originals.images(first), images)
    return grid(_arrays(images), min(COLUMNS, len(images)))


def asked_sheet(
    made: Followed, baseline: Tensor | None, dense: Dense, names: Sequence[str] | None = None
) -> np.ndarray:
    """A row each of the first samples: what it was asked by, itself, the baseline, and the true picture.

    Args:
        made: the samples.
        baseline: its pictures, (n, C, H, W) uint8; None: there is none.
        dense: what is known of the model's conditions.
        names: of the classes.

    Returns:
        (H, W, 3) uint8.
    """
    shown = [one for one in (made.images, baseline, made.truths) if one is not None]
    height, width = made.images.shape[2:]
    rows = [
        [*conditions(condition, (height, width), dense), *row]
        for condition, *row in zip(made.conditions[:ROWS], *map(_arrays, shown), strict=False)
    ]
    titles = [title(condition, names) for condition in made.conditions[:ROWS]]
    return grid(beside([cell for row in rows for cell in row]), len(rows[0]), titles=titles if any(titles) else ())


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
