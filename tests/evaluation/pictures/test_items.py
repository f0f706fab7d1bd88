"""Samples asked for by the items of a data set."""

import numpy as np
import pytest

from ldm.errors import ConfigError, DataError
from ldm.evaluation.pictures.items import Items


class Pets:
    """Three items, read one by one."""

    class_names = None
    num_classes = 2

    def __init__(self, *lacking):
        self.lacking = lacking
        self.read = []

    def __len__(self):
        return 3

    def __getitem__(self, index):
        self.read.append(index)
        item = {"image": None, "class_label": index % 2, "caption": [["a cat", "a kitten"], "a dog", ""][index]}
        return {key: value for key, value in item.items() if key not in self.lacking}

    def class_labels(self):
        return np.array([0, 1, 0])

    def fingerprint(self):
        return "pets"

    def path(self, index):
        return f"pet {index}"


def test_each_item_has_its_turn():
    pets = Pets()
    items = Items(pets, ["caption", "class_label"])
    seeds = np.array([0, 1, 2, 3, 7])
    assert items.places(seeds).tolist() == [0, 1, 2, 0, 1]
    assert items.conditions(seeds) == [
        {"caption": "a cat", "class_label": 0},
        {"caption": "a dog", "class_label": 1},
        {"caption": "", "class_label": 0},
        {"caption": "a cat", "class_label": 0},
        {"caption": "a dog", "class_label": 1},
    ]
    assert pets.read == [0, 1, 2]
    assert items.labels(seeds).tolist() == [0, 1, 0, 0, 1]
    assert Items(pets, ["class_label"]).conditions(seeds[:1]) == [{"class_label": 0}]


def test_the_name_covers_the_data_and_the_keys():
    names = {Items(Pets(), keys).name for keys in (["caption"], ["class_label"], ["caption", "class_label"])}
    assert len(names) == 3
    assert Items(Pets(), ["caption"]).name in names


def test_what_items_cannot_say_is_refused():
    with pytest.raises(ConfigError, match="this model reads layout, which no item says"):
        Items(Pets(), ["class_label", "layout"])
    with pytest.raises(DataError, match="pet 1: has no caption"):
        Items(Pets("caption"), ["caption"]).conditions(np.array([1]))
