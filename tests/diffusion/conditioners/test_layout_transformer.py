"""Layouts in the lineage's tokens: those of the public code, and a transformer that reads them."""

import pytest
import torch
from torch import nn

from ldm.config.load import build
from ldm.diffusion.conditioners.base import require_conditioner
from ldm.diffusion.conditioners.layout_transformer import LayoutTransformer, layout_tokens
from ldm.errors import ConfigError
from ldm.randomness import Draws

# Of ObjectsBoundingBoxConditionalBuilder in CompVis/taming-transformers, with its shuffling left out: most, vocabulary,
# crop; a box and its three tokens in each line.
PUBLIC = [
    (
        (30, 8192, True),
        [],
    ),
    (
        (30, 8192, True),
        [
            ([0.6250955, 0.2252072, 0.8972138, 0.77568567, 33], [33, 1856, 6290]),
        ],
    ),
    (
        (30, 8192, True),
        [
            ([0.0, 0.0, 1.0, 1.0, 180], [180, 0, 8099]),
            ([0.0625, 0.5534974, 0.5, 0.99550027, 507], [507, 4416, 8054]),
            ([0.30303243, 0.6221792, 0.46793497, 0.7926619, 96], [96, 4977, 6432]),
            ([0.25486958, 0.2153087, 0.2784256, 0.98896015, 514], [514, 1733, 7945]),
        ],
    ),
    (
        (5, 1024, False),
        [],
    ),
    (
        (5, 1024, False),
        [
            ([0.0, 0.0, 1.0, 1.0, 238], [238, 0, 1023]),
            ([0.0625, 0.5946849, 0.5, 0.659275, 453], [453, 578, 656]),
            ([0.11240574, 0.3066595, 0.84016883, 0.96135086, 279], [279, 323, 986]),
        ],
    ),
    (
        (5, 1024, False),
        [
            ([0.0, 0.0, 1.0, 1.0, 583], [583, 0, 1023]),
            ([0.0625, 0.52330416, 0.5, 0.9156354, 340], [340, 514, 912]),
            ([0.41151682, 0.030288834, 0.7640301, 0.04665224, 146], [146, 45, 56]),
            ([0.72998923, 0.020215573, 0.8152218, 0.25276867, 23], [23, 55, 281]),
            ([0.113204956, 0.18750334, 0.9133549, 0.24856977, 183], [183, 196, 284]),
        ],
    ),
]
SIZES = {"channels": 16, "depth": 2, "vocab_size": 64, "most": 4, "num_heads": 2}
LAYOUT = torch.tensor([[0.0, 0.0, 0.5, 1.0, 3], [0.2, 0.1, 0.9, 0.4, 7], [0.6, 0.6, 0.8, 0.7, 3]])


def random(**more):
    """With weights at which every part matters."""
    torch.manual_seed(0)
    found = LayoutTransformer(**{**SIZES, **more})
    for weight in found.parameters():
        nn.init.normal_(weight, std=0.3)
    return found.eval()


def batch(*lengths, first=LAYOUT):
    """Rows with so many boxes of the layout, padded with what no row may depend on."""
    there = torch.arange(len(first)) < torch.tensor(lengths)[:, None]
    boxes = torch.where(there[..., None], first, torch.tensor(0.9))
    return {"boxes": boxes, "boxes_mask": there, "draws": Draws(0, range(len(lengths)), len(lengths))}


@pytest.mark.parametrize(("sizes", "layout"), PUBLIC)
def test_tokens_are_those_of_the_public_code(sizes, layout):
    most, vocab_size, crop = sizes
    rows = torch.tensor([box for box, _ in layout]).reshape(1, -1, 5)
    found = layout_tokens(rows, torch.ones(rows.shape[:2], dtype=torch.bool), most, vocab_size, crop)
    padding = [vocab_size - 1] * (3 * (most - len(layout)))
    assert found.tolist() == [
        [token for _, tokens in layout for token in tokens] + padding + ([0, 8099] if crop else [])
    ]


def test_boxes_that_are_not_there_leave_no_gap():
    boxes = LAYOUT[None].repeat(2, 1, 1)
    there = torch.tensor([[False, True, True], [False, False, False]])
    found = layout_tokens(boxes, there, 4, 64)
    assert found[0].tolist() == layout_tokens(boxes[:1, 1:], there[:1, 1:], 4, 64)[0].tolist()
    assert found[1].tolist() == [63] * 12 + [0, 63]  # a grid of 8 x 8


@torch.no_grad()
def test_it_reads_each_box_and_nothing_that_is_padding():
    model = random()
    require_conditioner(model)
    found = model(batch(3, 2, 1, 0)).tokens
    assert found.shape == (4, 14, 16)
    assert model(batch(3)).token_mask is None
    assert all(not torch.allclose(found[i], found[j]) for i in range(4) for j in range(i))
    alone = model({"boxes": LAYOUT[None, :2], "boxes_mask": torch.ones(1, 2, dtype=torch.bool)}).tokens
    torch.testing.assert_close(found[1:2], alone)
    torch.testing.assert_close(model.null(2).tokens, found[3:].expand(2, -1, -1))
    asked = {"boxes": LAYOUT[None], "boxes_mask": torch.ones(1, 3, dtype=torch.int64)}  # as a list of JSON has it
    torch.testing.assert_close(model(asked).tokens, found[:1])


@torch.no_grad()
def test_in_training_each_sample_has_its_own_order():
    model, rows = random(), batch(3, 3, 3, 3)
    orders = {
        tuple(map(tuple, LAYOUT[list(order)].tolist())): order
        for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    }
    known = {order: model(batch(3, first=LAYOUT[list(order)])).tokens[0] for order in orders.values()}
    found = model.train()(rows).tokens
    taken = [next(order for order, one in known.items() if torch.allclose(row, one, atol=1e-5)) for row in found]
    assert len(set(taken)) > 1
    later = {**rows, "boxes": rows["boxes"][2:], "boxes_mask": rows["boxes_mask"][2:], "draws": rows["draws"][2:]}
    torch.testing.assert_close(model(later).tokens, found[2:])  # whoever is beside it


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"boxes_mask": None}, r"no boxes.*data\.params\.aligned\.boxes"),
        ({"boxes": torch.rand(1, 5, 5), "boxes_mask": torch.ones(1, 5)}, r"most: expected 4 boxes.*found 5.*most"),
        ({"boxes": LAYOUT[None] + 61}, r"classes from 0 to 62, found 64"),
    ],
)
def test_what_it_cannot_read_is_said(wrong, message):
    rows = {key: one for key, one in {**batch(3), **wrong}.items() if one is not None}
    with pytest.raises(ConfigError, match=message):
        random()(rows)


def test_without_values_only_shapes_are_known():
    with torch.device("meta"):
        model = build({"target": "ldm.diffusion.conditioners.layout_transformer.LayoutTransformer", "params": SIZES})
        rows = {"boxes": torch.empty(2, 3, 5), "boxes_mask": torch.empty(2, 3, dtype=torch.bool)}
    for mode in (model.train(), model.eval()):
        assert mode({**rows, "draws": Draws(0, [0, 1], 2, "meta")}).tokens.shape == (2, 14, 16)
    assert model.null(3).tokens.is_meta
