import numpy as np
import torch

from ldm.sampling import shown
from ldm.sampling.dense import Dense


def test_each_class_has_a_color_of_its_own_and_neighbors_differ():
    colors = shown.palette().astype(int)
    assert len({*map(tuple, colors.tolist()), shown.UNLABELED}) == 257
    assert np.abs(np.diff(colors, axis=0)).max(1).min() > 40


def test_a_drawn_map_can_be_read_again():
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(shown.labels_of(shown.drawn_map(labels)), labels)
    assert tuple(shown.drawn_map(labels)[-1, -1]) == shown.UNLABELED
    assert tuple(shown.drawn_map(np.array([[-1]], np.int16))[0, 0]) == shown.UNLABELED
    assert shown.labels_of(np.full((2, 2, 3), 77, np.uint8)) is None


def test_boxes_are_drawn_where_they_are_with_their_names():
    boxes = [[0.5, 0.25, 1, 1, 1]]
    drawn = shown.drawn_boxes(boxes, (64, 128), ["cat", "dog"])
    assert drawn.shape == (128, 256, 3)  # enlarged, so that names can be read
    assert tuple(drawn[100, 128]) == shown.color(1)
    assert (drawn[:, :120] == 255).all()
    assert not np.array_equal(drawn, shown.drawn_boxes(boxes, (64, 128)))


def test_what_can_be_drawn_of_a_condition_stands_at_one_size_beside_samples():
    condition = {
        "caption": "a cat",
        "image": torch.zeros(1, 8, 8) + 1,
        "mask": torch.ones(1, 8, 8),
        "masked_latent": torch.zeros(4, 2, 2),
        "low_resolution": torch.zeros(3, 2, 2),
        "map": np.zeros((8, 8), np.uint8),
        "boxes": torch.zeros(2, 5),
        "boxes_mask": torch.zeros(2, dtype=torch.bool),
    }
    drawn = shown.conditions(condition, (8, 8), Dense())
    assert len(drawn) == 4
    assert (drawn[0] == shown.HOLE).all()
    row = shown.beside([*drawn, np.zeros((8, 8, 1), np.uint8)])
    assert {image.shape for image in row} == {(256, 256, 3)}
    assert not shown.conditions(None, (8, 8), Dense())
    assert not shown.conditions({"caption": "a cat"}, (8, 8), Dense())
