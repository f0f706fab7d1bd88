"""Numbers that a model may be conditioned on beside its pictures: their sizes, their crops, and a data set's columns.

A configuration names those that batches hold (`data.params.numbers`):

    original_size       (N, 2) height and width of the picture as it is stored, pixels
    crop_top_left       (N, 2) where the crop begins in the resized picture
    target_size         (N, 2) height and width of the crop
    anything else       a column of the data set, such as an aesthetic score

as the micro-conditions of Podell et al. 2023, "SDXL".
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.config.tree import nearest
from ldm.data.dataset import ImageDataset, Sized, Subset, columns, sizes
from ldm.data.transforms import center_crops
from ldm.errors import ConfigError
from ldm.sizes import SIZES

_KEY = "data.params.numbers"


def gathered(dataset: ImageDataset, names: Sequence[str], targets: np.ndarray) -> dict[str, np.ndarray]:
    """The named numbers of every item: (N,) or (N, k) float32.

    Args:
        dataset: of N items.
        names: of the numbers.
        targets: (2,) or (N, 2), the height and width that the pictures are cropped to.

    Raises:
        ConfigError: the data set has no such numbers.
    """
    check(dataset, names)
    found = {name: column for name, column in columns(dataset).items() if name in names}
    if {*SIZES} & {*names}:
        originals = sizes(dataset)
        if originals is None:
            raise _lacking(dataset, next(name for name in names if name in SIZES), [])
        crops = np.broadcast_to(targets, originals.shape)
        every = (originals, center_crops(originals, crops), crops)
        found |= {name: column for name, column in zip(SIZES, every, strict=True) if name in names}
    return {name: np.ascontiguousarray(found[name], dtype=np.float32) for name in names}


def meta(dataset: ImageDataset, names: Sequence[str], rows: int) -> dict[str, Tensor]:
    """The named numbers of some rows, without values; ConfigError as `gathered`."""
    check(dataset, names)
    own = columns(dataset) if {*names} - {*SIZES} else {}
    shapes = {name: (2,) if name in SIZES else own[name].shape[1:] for name in names}
    return {name: torch.empty(rows, *shape, device="meta") for name, shape in shapes.items()}


def check(dataset: ImageDataset, names: Sequence[str]) -> None:
    """ConfigError unless the data set has all of these numbers."""
    known = [*(SIZES if _is_sized(dataset) else ()), *columns(dataset)] if names else []
    for name in names:
        if name not in known:
            raise _lacking(dataset, name, known)


def _is_sized(dataset: ImageDataset) -> bool:
    return _is_sized(dataset.dataset) if isinstance(dataset, Subset) else isinstance(dataset, Sized)


def _lacking(dataset: ImageDataset, name: str, known: Sequence[str]) -> ConfigError:
    lacking = "does not know the sizes of its pictures" if name in SIZES else "has no such column"
    hint = f"; {nearest(name, known)}" if known else ""
    return ConfigError(f"{_KEY}: {name}: the data set ({dataset.path(0)}, ...) {lacking}{hint}")
