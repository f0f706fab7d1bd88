import pytest
import torch
from torch import nn

from ldm.config.load import build
from ldm.diffusion.conditioners.base import Conditioning, Unconditional, dropped, kept_keys
from ldm.diffusion.conditioners.classes import ClassOneHot, ClassToken, ClassVector
from ldm.diffusion.conditioners.joint import Joint
from ldm.diffusion.conditioners.projected import Projected
from ldm.errors import ConfigError
from ldm.randomness import Draws

N = 10_000


class Picture(nn.Module):
    """The batch's `small` picture as spatial conditioning."""

    keys = ("small",)

    def forward(self, batch):
        return Conditioning(spatial=batch["small"])

    def null(self, n):
        return Conditioning(spatial=torch.zeros(n, 1, 2, 2))


def batch(n=6):
    draws = Draws(0, range(n), n)
    return {"class_label": torch.arange(n) % 3, "small": torch.ones(n, 1, 2, 2), "draws": draws}


def joint(**dropout):
    parts = {"vector": ClassVector(3, 4), "hot": ClassOneHot(3), "token": ClassToken(3, 5), "picture": Picture()}
    return Joint(parts, dropout)


def test_slots_are_those_of_the_parts():
    conditioner = joint()
    assert conditioner.keys == ("class_label", "small")
    parts = conditioner.conditioners
    found = conditioner(batch())
    torch.testing.assert_close(found.vector, torch.cat([parts[k](batch()).vector for k in ("vector", "hot")], dim=1))
    torch.testing.assert_close(found.tokens, parts["token"](batch()).tokens)
    torch.testing.assert_close(found.spatial, batch()["small"])
    null = conditioner.null(6)
    assert _shapes(null) == _shapes(found)
    torch.testing.assert_close(null.vector[:, :4], parts["vector"].null(6).vector)
    two = Joint({"a": ClassToken(3, 5), "b": ClassToken(3, 5)})(batch())
    assert two.tokens.shape == (6, 2, 5)


class Words(nn.Module):
    """One to three tokens of ones a row, padded with garbage; null: one of zeros."""

    keys = ("class_label",)

    def forward(self, batch):
        mask = torch.arange(3) <= batch["class_label"][:, None]
        return Conditioning(tokens=torch.where(mask[..., None], torch.ones(5), float("nan")), token_mask=mask)

    def null(self, n):
        return Conditioning(tokens=torch.zeros(n, 1, 5))


def test_masks_lie_beside_one_another_as_the_tokens_do():
    rows = batch()
    found = Joint({"words": Words(), "class": ClassToken(3, 5), "more": Words()})(rows)
    assert found.tokens.shape == (6, 3 + 1 + 3, 5)
    words = torch.arange(3) <= rows["class_label"][:, None]
    assert torch.equal(found.token_mask, torch.cat([words, torch.ones(6, 1, dtype=torch.bool), words], dim=1))
    assert torch.equal(found.tokens.isfinite().all(2), found.token_mask)
    assert Joint({"a": ClassToken(3, 5), "b": ClassToken(3, 5)})(rows).token_mask is None


def test_tokens_with_masks_are_dropped_at_their_own_rate_and_become_their_null():
    conditioner = Joint({"words": Words(), "class": ClassToken(3, 5)}, {"words": 0.1, "class": 0.3}).train()
    found = conditioner(batch(N))
    no_words = found.tokens[:, 0].eq(0).all(1)
    no_class = found.tokens[:, 3].eq(conditioner.conditioners["class"].null(1).tokens[0]).all(1)
    assert no_words.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert no_class.float().mean().item() == pytest.approx(0.3, abs=0.015)
    assert (no_words & no_class).float().mean().item() == pytest.approx(0.03, abs=0.006)
    # Of the null's one token the mask shows one, of all others as many as they have.
    assert found.token_mask[no_words, :3].sum(1).eq(1).all()
    assert torch.equal(found.token_mask[~no_words, :3].sum(1), batch(N)["class_label"][~no_words] + 1)
    assert found.token_mask.any(1).all()
    null = conditioner.null(2)
    both = found.cat(null)  # as guidance does
    assert both.token_mask[-2:].tolist() == [[True, True, False, False]] * 2


def test_each_part_is_dropped_at_its_own_rate_and_on_its_own():
    conditioner, rows = joint(hot=0.1, picture=0.4).train(), batch(N)
    found = conditioner(rows)
    no_class, no_picture = found.vector[:, 4:].sum(1) == 0, found.spatial.sum((1, 2, 3)) == 0
    assert no_class.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert no_picture.float().mean().item() == pytest.approx(0.4, abs=0.02)
    assert (no_class & no_picture).float().mean().item() == pytest.approx(0.04, abs=0.01)
    torch.testing.assert_close(found.tokens, conditioner.conditioners["token"](rows).tokens)
    again = conditioner(rows)
    assert torch.equal(again.vector, found.vector)
    # A row depends on its sample number alone.
    few = Draws(0, range(100, 110), N)
    part = conditioner({"class_label": rows["class_label"][100:110], "small": rows["small"][100:110], "draws": few})
    assert torch.equal(part.spatial, found.spatial[100:110])


def test_nothing_is_dropped_in_evaluation():
    conditioner = joint(hot=1.0, picture=1.0).eval()
    rows = {key: value for key, value in batch().items() if key != "draws"}  # as when sampling
    assert (conditioner(rows).spatial == 1).all()


def test_a_model_of_several_conditions_trains_its_parts():
    conditioner = joint().train()
    found = conditioner(batch())
    (found.vector.sum() + found.tokens.sum()).backward()
    assert all(parameter.grad is not None for parameter in conditioner.parameters())
    assert [*conditioner.state_dict()] == ["conditioners.vector.table.weight", "conditioners.token.table.weight"]


def test_it_is_built_from_a_configuration():
    classes = {"target": "ldm.diffusion.conditioners.classes.ClassVector", "params": {"num_classes": 3, "channels": 4}}
    node = {
        "target": "ldm.diffusion.conditioners.joint.Joint",
        "params": {"conditioners": {"class": classes}, "dropout": {"class": 0.1}},
    }
    made = build(node)
    assert isinstance(made, Joint)
    assert made.dropout == {"class": 0.1}


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="expected one conditioner or more"):
        Joint({})
    with pytest.raises(ConfigError, match="dropout names clas, but the conditioners are class"):
        Joint({"class": ClassVector(3, 4)}, {"clas": 0.1})
    with pytest.raises(ConfigError, match=r"tokens of its .* fit together: a \(N, 1, 5\), b \(N, 1, 6\); .*Projected"):
        Joint({"a": ClassToken(3, 5), "b": ClassToken(3, 6)})(batch())


def test_a_part_that_is_no_conditioner_is_named():
    with pytest.raises(ConfigError, match=r"Joint: conditioners.odd: expected a module with keys, forward and null"):
        Joint({"odd": nn.Linear(1, 1)})


def test_whether_all_conditions_are_dropped_together_in_training():
    classes, nothing = ClassVector(3, 4), ClassVector(None, 4)
    assert not Joint({"a": classes, "b": ClassVector(3, 4)}, {"a": 0.1}).drops_all()
    assert Joint({"a": classes, "b": ClassVector(3, 4)}, {"a": 0.1, "b": 0.5}).drops_all()
    assert Joint({"a": classes, "b": nothing}, {"a": 0.1}).drops_all()  # the other has nothing to drop
    assert Joint({"a": Joint({"a": classes}, {"a": 0.1})}).drops_all()


def test_unconditional_parts_read_nothing():
    assert Joint({"none": Unconditional(), "class": ClassVector(3, 4)}).keys == ("class_label",)
    assert Joint({"none": Unconditional()}).keys == ()


def inpainting(**parameters):
    return Joint({"token": ClassToken(3, 5), "picture": Picture()}, kept=["picture"], **parameters)


def test_what_is_kept_stays_where_all_else_is_dropped():
    conditioner, rows = inpainting(), batch()
    assert conditioner.kept_keys() == kept_keys(conditioner) == ("small",)
    found = dropped(conditioner, rows, 6)
    assert torch.equal(found.spatial, rows["small"])
    assert torch.equal(found.tokens, conditioner.conditioners["token"].null(6).tokens)
    assert not conditioner.null(6).spatial.any()
    within = Joint({"task": conditioner, "more": ClassVector(3, 4)})
    assert within.kept_keys() == ("small",)
    assert torch.equal(dropped(within, rows, 6).spatial, rows["small"])
    assert torch.equal(dropped(Projected(conditioner, tokens=[5, 5]), rows, 6).spatial, rows["small"])
    parts_of_a_drop = within.train()
    parts_of_a_drop.dropout["task"] = 1.0
    assert torch.equal(parts_of_a_drop(rows).spatial, rows["small"])
    assert torch.equal(parts_of_a_drop(rows).tokens, found.tokens)


def test_without_anything_kept_what_is_dropped_is_the_null():
    for conditioner in (joint(), ClassToken(3, 5), Unconditional()):
        assert kept_keys(conditioner) == ()
        found, null = dropped(conditioner, batch(), 6), conditioner.null(6)
        assert all(torch.equal(slot, getattr(null, name)) for name, slot in vars(found).items() if slot is not None)


def test_whether_all_but_what_is_kept_is_dropped_in_training():
    assert inpainting(dropout={"token": 0.1}).drops_all()
    assert not inpainting().drops_all()


def test_what_is_kept_exists_and_has_no_dropout():
    with pytest.raises(ConfigError, match="kept names pict, but the conditioners are token, picture"):
        Joint({"token": ClassToken(3, 5), "picture": Picture()}, kept=["pict"])
    with pytest.raises(ConfigError, match="picture: is kept and has a dropout rate; leave one of them out"):
        inpainting(dropout={"picture": 0.1})


class Wide(Picture):
    """Two channels of any height and width."""

    def null(self, n):
        return Conditioning(spatial=torch.zeros(n, 2, 1, 1))


def test_images_of_any_size_take_that_of_the_others():
    null = Joint({"picture": Picture(), "wide": Wide()}).null(3)
    assert null.spatial.shape == (3, 3, 2, 2)
    assert Joint({"wide": Wide(), "too": Wide()}).null(3).spatial.shape == (3, 4, 1, 1)


def _shapes(conditioning):
    return {name: slot.shape for name, slot in vars(conditioning).items() if slot is not None}
