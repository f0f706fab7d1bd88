"""Items as samples are asked for by them: as a cache would keep what lies on their pictures."""

import numpy as np
import pytest
import torch

from ldm.data.transforms import EvalTransform
from ldm.latents.aligned import Boxes, Map, Pair, Pixels
from ldm.latents.asked import DenseItems
from ldm.latents.columns import Crop
from ldm.latents.dense import Dense
from ldm.latents.masked import MaskedLatents
from tests.tiny_dense import CLASSES, Blocks, Halved, Scenes

COLUMNS = {"map": Map(CLASSES), "boxes": Boxes(), "pair": Pair(), "image": Pixels()}
KEYS = ("class_label", "map", "boxes", "boxes_mask", "pair", "mask", "masked_latent", "low_resolution")


def items(**groups):
    dense = Dense(**({"aligned": COLUMNS, "drawn": {"low_resolution": Halved()}} | groups))
    return DenseItems(dense, Crop(EvalTransform((16, 24), "nearest"), 3))


def test_an_item_says_all_that_a_model_reads():
    dense = items(masked=MaskedLatents(Blocks(), variants=2))
    assert dense.says(KEYS)
    assert not dense.says([*KEYS, "score"])
    data = Scenes()
    condition = dense.condition(data[2], KEYS, 2, data.path(2))
    shapes = {key: tuple(np.shape(value)) for key, value in condition.items()}
    assert shapes == {
        "class_label": (),
        "map": (16, 24),
        "boxes": (2, 5),
        "pair": (3, 16, 24),
        "image": (3, 16, 24),
        "mask": (1, 16, 24),
        "low_resolution": (3, 8, 12),
    }
    # The map of these pictures is their red channel.
    picture = dense.picture(data[2], data.path(2))
    assert torch.equal(condition["map"], picture[0])
    assert condition["image"].min() >= -1
    assert {*condition["mask"].unique().tolist()} <= {0.0, 1.0}


def test_what_is_drawn_for_an_item_is_always_the_same():
    dense, data = items(masked=MaskedLatents(Blocks(), variants=2)), Scenes()
    first, again, other = (dense.condition(data[1], KEYS, number, "") for number in (1, 1, 3))
    assert torch.equal(first["mask"], again["mask"])
    assert torch.equal(first["low_resolution"], again["low_resolution"])
    assert not torch.equal(first["low_resolution"], other["low_resolution"])


def test_an_items_own_mask():
    dense, data = items(masked=MaskedLatents()), Scenes()
    condition = dense.condition(data[0], ("mask", "masked_latent"), 0, "")
    own = dense.crop.transform.labels(data[0]["mask"])
    assert np.array_equal(condition["mask"][0].numpy() > 0, own > 0)


@pytest.mark.parametrize("keys", [(), ("score",)])
def test_no_rows_where_items_do_not_say_it(keys):
    assert items().some(Scenes(), keys, 4) == []


def test_some_items_without_those_that_cannot_be_read():
    found = items().some(Scenes(4, broken=[1]), ("map",), 4)
    assert len(found) == 3
    assert all(torch.equal(row["map"], picture[0]) for row, picture in found)
