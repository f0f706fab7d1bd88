"""Conditioning slots, and the conditioners that fill them."""

import pytest
import torch

from ldm.diffusion.conditioners.base import Conditioning, Unconditional, latent_size
from ldm.diffusion.conditioners.classes import ClassOneHot, ClassToken, ClassVector
from ldm.errors import ConfigError


def test_where_chooses_whole_rows():
    ours = Conditioning(torch.zeros(3, 2), torch.zeros(3, 4, 2), torch.zeros(3, 1, 2, 2))
    theirs = Conditioning(torch.ones(3, 2), torch.ones(3, 4, 2), torch.ones(3, 1, 2, 2))
    chosen = ours.where(torch.tensor([True, False, True]), theirs)
    for slot in (chosen.vector, chosen.tokens, chosen.spatial):
        assert slot.flatten(1).amax(1).tolist() == slot.flatten(1).amin(1).tolist() == [0, 1, 0]


def test_cat_joins_rows_and_keeps_empty_slots_empty():
    joined = Conditioning(vector=torch.zeros(2, 3)).cat(Conditioning(vector=torch.ones(1, 3)))
    assert joined.vector.shape == (3, 3)
    assert joined.tokens is None
    assert joined.spatial is None


def test_a_slot_filled_on_one_side_is_an_error():
    with pytest.raises(ValueError, match="vector"):
        Conditioning(vector=torch.zeros(2, 3)).cat(Conditioning())


@pytest.mark.parametrize(
    ("conditioner", "slot", "shape"), [(ClassVector, "vector", (8,)), (ClassToken, "tokens", (1, 8))]
)
def test_classes_and_the_null_class(conditioner, slot, shape):
    module = conditioner(num_classes=3, channels=8)
    told = getattr(module({"class_label": torch.tensor([0, 2, 2, 1])}), slot)
    untold = getattr(module.null(4), slot)
    assert told.shape == untold.shape == (4, *shape)
    torch.testing.assert_close(told[1], told[2])
    assert not torch.equal(told[0], told[1])
    # "No class" is a row of its own, the same for all, and learned.
    torch.testing.assert_close(untold[0], untold[3])
    assert not any(torch.equal(untold[0], row) for row in told)
    untold.sum().backward()
    assert module.table.weight.grad.abs().sum(1).gt(0).tolist() == [False, False, False, True]


@pytest.mark.parametrize(("conditioner", "slot"), [(ClassVector, "vector"), (ClassToken, "tokens")])
def test_data_without_classes_is_of_no_class(conditioner, slot):
    """So that a class-conditional configuration goes for a flat folder as well; its loss reaches the one row."""
    module = conditioner(num_classes=None, channels=8)
    rows = getattr(module({"draws": range(4)}), slot)
    assert torch.equal(rows, getattr(module.null(4), slot))
    rows.sum().backward()
    assert module.table.weight.grad.shape == (1, 8)
    assert module.table.weight.grad.eq(4).all()


def test_data_without_classes_has_no_one_hot():
    assert ClassOneHot(None)({"draws": range(4)}) == ClassOneHot(None).null(4) == Conditioning()


def test_unconditional_fills_nothing():
    assert Unconditional()({"class_label": torch.zeros(2)}) == Unconditional().null(2) == Conditioning()
    assert not [*Unconditional().parameters()]


def test_an_image_lies_beside_the_latent_and_sides_of_one_stand_for_any():
    x = torch.randn(2, 3, 4, 6)
    assert Conditioning().beside(x) is x
    image = torch.randn(2, 1, 4, 6)
    assert torch.equal(Conditioning(spatial=image).beside(x), torch.cat([x, image], 1))
    found = Conditioning(spatial=torch.full((2, 1, 1, 1), 7.0)).beside(x.bfloat16())
    assert (found.shape, found.dtype) == ((2, 4, 4, 6), torch.bfloat16)
    assert (found[:, 3] == 7).all()
    with pytest.raises(ConfigError, match="spatial slot is 6 x 4, expected 4 x 6, the latent's height and width"):
        Conditioning(spatial=image.mT).beside(x)


def test_the_size_of_the_latent_is_the_batch_s():
    assert latent_size({"latent": torch.empty(2, 3, 4, 6, device="meta")}) == (4, 6)
    for wrong, found in (({}, "none"), ({"latent": torch.zeros(2, 3)}, r"\(2, 3\)"), ({"latent": 3}, "int")):
        with pytest.raises(ConfigError, match=rf"latent: expected \(N, c, h, w\), .* found {found}"):
            latent_size(wrong)
