"""A conditioner at other widths: the layers are trained, the null goes through them, and padding stays unseen."""

import pytest
import torch
from torch import nn

from ldm.diffusion.conditioners.base import Conditioning, drops_all
from ldm.diffusion.conditioners.classes import ClassToken, ClassVector
from ldm.diffusion.conditioners.given import Field, Given
from ldm.diffusion.conditioners.joint import Joint
from ldm.diffusion.conditioners.projected import Projected, layers
from ldm.errors import ConfigError

ROWS = {"class_label": torch.tensor([0, 2, 1])}


class Padded(nn.Module):
    """Tokens whose padding is not a number."""

    keys = ("class_label",)

    def forward(self, batch):
        mask = torch.arange(3) <= batch["class_label"][:, None]
        return Conditioning(tokens=torch.where(mask[..., None], torch.ones(4), float("nan")), token_mask=mask)

    def null(self, n):
        return Conditioning(tokens=torch.zeros(n, 1, 4), token_mask=torch.ones(n, 1, dtype=torch.bool))


def test_two_widths_are_a_linear_layer_and_more_have_silus_between():
    assert [type(part) for part in layers([4, 5])] == [nn.Linear]
    assert [type(part) for part in layers([4, 5, 6])] == [nn.Linear, nn.SiLU, nn.Linear]


def test_vector_and_null_go_through_the_same_layers():
    conditioner = Projected(ClassVector(3, 4), vector=[4, 8, 6])
    inner = conditioner.conditioner
    assert torch.equal(conditioner(ROWS).vector, conditioner.vector(inner(ROWS).vector))
    assert torch.equal(conditioner.null(2).vector, conditioner.vector(inner.null(2).vector))
    assert conditioner.keys == ("class_label",)
    conditioner(ROWS).vector.sum().backward()
    assert all(parameter.grad is not None for parameter in conditioner.parameters())


def test_padding_reaches_neither_tokens_nor_gradients():
    conditioner = Projected(Padded(), tokens=[4, 6])
    found = conditioner(ROWS)
    assert found.tokens.shape == (3, 3, 6)
    assert torch.equal(found.token_mask, Padded()(ROWS).token_mask)
    found.tokens[found.token_mask].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in conditioner.parameters())


def test_slots_that_are_not_asked_for_stay_and_tokens_of_two_widths_fit_together():
    given = Given(vector=Field("v", [5]), tokens=Field("t", [2, 4]))
    rows = ROWS | {"v": torch.randn(3, 5), "t": torch.randn(3, 2, 4)}
    both = Joint({"given": Projected(given, tokens=[4, 6]), "class": ClassToken(3, 6)})(rows)
    assert torch.equal(both.vector, rows["v"])
    assert both.tokens.shape == (3, 3, 6)


def test_what_does_not_fit_is_named():
    with pytest.raises(ConfigError, match="expected vector, tokens, or both"):
        Projected(ClassVector(3, 4))
    with pytest.raises(ConfigError, match=r"tokens: expected two widths or more.*found \[4\]"):
        Projected(ClassToken(3, 4), tokens=[4])
    with pytest.raises(ConfigError, match="vector: expected width 5 from the conditioner, found 4"):
        Projected(ClassVector(3, 4), vector=[5, 6])(ROWS)
    with pytest.raises(ConfigError, match="tokens: expected width 5 from the conditioner, found None"):
        Projected(ClassVector(3, 4), tokens=[5, 6]).null(1)


def test_around_a_conditioner_that_drops_it_says_so_too():
    def several(rate):
        return Joint({"a": ClassVector(3, 4), "b": ClassVector(3, 4)}, {"a": 0.1, "b": rate})

    assert drops_all(Projected(several(0.1), vector=[8, 6]))
    assert not drops_all(Projected(several(0.0), vector=[8, 6]))
    assert drops_all(Joint({"both": Projected(Projected(several(0.1), vector=[8, 6]), vector=[6, 2])}))
    assert not drops_all(Projected(ClassVector(3, 4), vector=[4, 6]))
