"""How images are held out for validation."""

import logging

import numpy as np

from ldm.data.dataset import ImageDataset, Subset, emptied_classes
from ldm.errors import DataError
from ldm.randomness import keys
from ldm.runtime import distributed

logger = logging.getLogger(__name__)


def hold_out(dataset: ImageDataset, number: int) -> tuple[Subset, Subset]:
    """Split into (the rest, `number` scattered items): the same split in every run, whatever its seed.

    If a data set has no more than `number` items, a tenth is held out instead, with a warning, so that a configuration
    made for a large data set also works for a small one. Classes of which nothing is left to train on are named in
    another warning.

    Raises:
        DataError: nothing would be left to train on.
    """
    total = len(dataset)
    if number < 1 or total < 2:
        raise DataError(
            f"data.params.num_validation: cannot hold out {number} of {total} items; write 0 to train on all of them"
        )
    tenth = max(1, total // 10)
    held_out = number if number < total else tenth
    if 2 * number > total and distributed.is_main():
        found = f"data.params.num_validation: {number} of {total} items"
        if number < total:
            logger.warning(
                "%s are held out, %d are left to train on; a tenth would be %d", found, total - number, tenth
            )
        else:
            logger.warning("%s would leave none to train on; a tenth, %d, is held out instead", found, tenth)
    ranking = np.argsort(keys(0, "hold out", np.arange(total)), kind="stable")
    rest, scattered = sorted(ranking[held_out:].tolist()), sorted(ranking[:held_out].tolist())
    emptied = emptied_classes(dataset, scattered) if distributed.is_main() else []
    if emptied:
        logger.warning(
            "data.params.num_validation: the %d items held out include all items of %d classes, so that none are left "
            "to train on: %s; hold out fewer items, or add images to these classes",
            *(held_out, len(emptied), ", ".join(emptied)),
        )
    return Subset(dataset, rest), Subset(dataset, scattered)
