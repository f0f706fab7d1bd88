import pytest
import torch

from ldm.config.load import build
from ldm.diffusion.conditioners.base import Conditioning, require_conditioner
from ldm.diffusion.conditioners.given import Field, Given
from ldm.diffusion.conditioners.joint import Joint
from ldm.errors import ConfigError

N = 3


def given():
    return Given(vector=Field("pooled", [4]), tokens=Field("tokens", [None, 6]), spatial=Field("picture", [2, 8, 8]))


def batch(length=5):
    return {
        "pooled": torch.randn(N, 4),
        "tokens": torch.randn(N, length, 6, dtype=torch.float64),
        "picture": torch.randn(N, 2, 8, 8),
    }


def test_tensors_of_the_batch_are_the_slots():
    conditioner, rows = given(), batch()
    require_conditioner(conditioner)
    assert conditioner.keys == ("pooled", "tokens", "picture")
    found = conditioner(rows)
    torch.testing.assert_close(found.vector, rows["pooled"])
    torch.testing.assert_close(found.tokens, rows["tokens"].float())
    torch.testing.assert_close(found.spatial, rows["picture"])
    assert not conditioner.state_dict()


def test_slots_that_are_not_asked_for_stay_empty():
    found = Given(tokens=Field("tokens", [5, 6]))(batch())
    assert found.vector is None
    assert found.spatial is None


def test_null_is_zeros_and_replaces_rows_of_any_length():
    conditioner = given()
    null = conditioner.null(N)
    assert [slot.shape for slot in vars(null).values() if slot is not None] == [(N, 4), (N, 1, 6), (N, 2, 8, 8)]
    assert not any(slot.any() for slot in vars(null).values() if slot is not None)
    kept = torch.tensor([True, False, True])
    mixed = conditioner(rows := batch(7)).where(kept, null)
    torch.testing.assert_close(mixed.tokens[0], rows["tokens"][0].float())
    assert not mixed.tokens[1].any()
    assert conditioner(rows).cat(null).tokens.shape == (2 * N, 7, 6)


def test_only_a_null_of_size_one_is_as_long_as_its_conditions():
    three, two = (Conditioning(tokens=torch.zeros(N, length, 6)) for length in (3, 2))
    with pytest.raises(RuntimeError):
        three.cat(two)


@pytest.mark.parametrize(
    "wrong", [{}, {"tokens": "a cat"}, {"tokens": torch.zeros(N, 6)}, {"tokens": torch.zeros(N, 5, 7)}]
)
def test_what_is_missing_or_of_another_shape_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"condition tokens: expected a tensor \(any, 6\).*found"):
        Given(tokens=Field("tokens", [None, 6]))(wrong)


def test_tokens_come_with_a_mask_of_bools_or_numbers():
    conditioner = Given(tokens=Field("tokens", [None, 6]), token_mask=Field("mask", [None]))
    rows = batch(5) | {"mask": torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])}
    found = conditioner(rows)
    assert torch.equal(found.token_mask, rows["mask"].bool())
    assert torch.equal(conditioner(rows | {"mask": rows["mask"].bool()}).token_mask, found.token_mask)
    both = found.cat(conditioner.null(N))
    assert both.token_mask[N:].tolist() == [[True, False, False, False, False]] * N
    for shape, tokens in (([5], Field("tokens", [None, 6])), ([None], None)):
        with pytest.raises(ConfigError, match=r"token_mask: .* is no mask of the tokens"):
            Given(tokens=tokens, token_mask=Field("mask", shape), vector=Field("vector", [4]))


def test_a_field_has_the_sides_of_its_slot():
    with pytest.raises(ConfigError, match="one or more"):
        Given()
    with pytest.raises(ConfigError, match="spatial: expected a shape of 3 sides"):
        Given(spatial=Field("picture", [2]))


def test_is_built_from_a_configuration_and_is_a_part_of_several():
    field = {"target": "ldm.diffusion.conditioners.given.Field", "params": {"key": "tokens", "shape": [None, 6]}}
    built = build({"target": "ldm.diffusion.conditioners.given.Given", "params": {"tokens": field}})
    both = Joint({"text": built, "picture": Given(spatial=Field("picture", [2, 8, 8]))})
    found = both(batch())
    assert found.tokens.shape == (N, 5, 6)
    assert found.spatial.shape == (N, 2, 8, 8)
