"""What a data set may say of itself, and what a part of it hands on."""

import numpy as np
from PIL import Image

from ldm.data.dataset import Item, Subset, aligned_keys, box_classes, map_classes
from ldm.data.sources.arrays import ArrayImages


class Scenes(ArrayImages):
    """Three gray pictures with a box each."""

    def __init__(self) -> None:
        super().__init__("scenes", np.zeros((3, 4, 4), np.uint8))

    def __getitem__(self, index: int) -> Item:
        return {"image": Image.new("L", (4, 4)), "boxes": np.array([[0, 0, index + 1, 4, 1]], np.float32)}

    def aligned_keys(self) -> list[str]:
        return ["boxes"]

    def map_classes(self) -> list[str] | None:
        return None

    def box_classes(self) -> list[str] | None:
        return ["cat", "dog"]


def test_a_part_hands_on_what_lies_on_the_pictures():
    part = Subset(Subset(Scenes(), [2, 0]), [0])
    assert aligned_keys(part) == ["boxes"]
    assert box_classes(part) == ["cat", "dog"]
    assert map_classes(part) is None
    assert part[0]["boxes"].tolist() == [[0, 0, 3, 4, 1]]


def test_other_data_sets_have_nothing_on_their_pictures():
    plain = ArrayImages("plain", np.zeros((3, 4, 4), np.uint8))
    for data in (plain, Subset(plain, [1])):
        assert (*aligned_keys(data),) == ()
        assert map_classes(data) is box_classes(data) is None
