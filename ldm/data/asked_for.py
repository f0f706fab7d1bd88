"""What items would be asked for by, as samples are: their class and caption."""

from collections.abc import Mapping, Sequence
from typing import Any

from ldm.data.dataset import ImageDataset
from ldm.errors import DataError
from ldm.randomness import permutation


def conditions(dataset: ImageDataset, keys: Sequence[str], number: int) -> list[dict[str, Any]]:
    """What that many items, scattered, always the same, would be asked for by: their class and first caption.

    Args:
        keys: to have; others than "class_label" and "caption" are no data set's, and then there are no conditions.
    """
    if not keys or not {*keys} <= {"class_label", "caption"}:
        return []
    found = []
    for item in permutation(0, 0, len(dataset))[:number].tolist():
        try:
            row: dict[str, Any] = {**dataset[item]}
        except DataError:
            continue
        found.append(asked_for(row, keys, dataset.path(item)))
    return found


def asked_for(item: Mapping[str, Any], keys: Sequence[str], where: str) -> dict[str, Any]:
    """The keys of an item as a sample is asked for by them: of several captions the first.

    Raises:
        DataError: it lacks one; names `where` it comes from.
    """
    captions = item.get("caption")
    several = [captions] if isinstance(captions, str) else [*(captions or [])]
    said = {**item, "caption": several[0] if several else None}
    if missing := [key for key in keys if said.get(key) is None]:
        raise DataError(f"{where}: has no {missing[0]}, which samples are to be asked for by")
    return {key: said[key] for key in keys}
