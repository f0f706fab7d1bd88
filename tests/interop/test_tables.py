"""Tables of tensors: both directions are exact, and what does not fit is named in one message."""

import pytest
import torch

from ldm.errors import CheckpointError
from ldm.interop.tables import (
    LINEAR_AS_CONV2D,
    Change,
    Dropped,
    Entry,
    check_complete,
    identity_conv,
    layer,
    to_ours,
    to_theirs,
    under,
)

# Two of theirs are one of ours, a linear layer is a convolution, and one of ours they do not have.
STACKED = Change(lambda tensors: torch.stack(list(tensors)), lambda tensor: tuple(tensor))
TABLE = [
    *layer("a", "first", LINEAR_AS_CONV2D),
    Entry("pair", ("left", "right"), STACKED),
    *(entry for number in range(3) for entry in layer(f"blocks.{number}", f"block.{number}.conv", bias=None)),
    *identity_conv("last", 2),
    Entry("count", ("count",)),
]
THEIRS = {
    "first.weight": torch.randn(2, 3),
    "first.bias": torch.randn(2),
    "left": torch.randn(4),
    "right": torch.randn(4),
    **{f"block.{number}.conv.weight": torch.randn(2, 2) for number in range(3)},
    "count": torch.tensor(7),
}
SHAPES = {
    "a.weight": torch.Size((2, 3, 1, 1)),
    "a.bias": torch.Size((2,)),
    "pair": torch.Size((2, 4)),
    **{f"blocks.{number}.weight": torch.Size((2, 2)) for number in range(3)},
    "last.weight": torch.Size((2, 2, 1, 1)),
    "last.bias": torch.Size((2,)),
    "count": torch.Size(()),
}


def refusal(tensors, dropped=()) -> str:
    with pytest.raises(CheckpointError) as caught:
        to_ours(TABLE, tensors, SHAPES, "a.ckpt (a family)", dropped)
    return str(caught.value)


def test_the_way_there_and_back_is_exact():
    ours = to_ours(TABLE, THEIRS, SHAPES, "a.ckpt").weights
    assert {name: one.shape for name, one in ours.items()} == SHAPES
    back = to_theirs(TABLE, ours)
    assert back.keys() == THEIRS.keys()
    assert all(torch.equal(back[name], one) and back[name].is_contiguous() for name, one in THEIRS.items())


def test_half_precision_becomes_float32_without_rounding_and_counts_stay():
    half = {name: one.to(torch.bfloat16) if one.is_floating_point() else one for name, one in THEIRS.items()}
    ours = to_ours(TABLE, half, SHAPES, "a.ckpt").weights
    assert ours["a.bias"].dtype == torch.float32
    assert torch.equal(ours["a.bias"], half["first.bias"].float())
    assert (ours["count"].dtype, int(ours["count"])) == (torch.int64, 7)


def test_everything_that_does_not_fit_is_one_message():
    wrong = {name: one for name, one in THEIRS.items() if name != "left"}
    wrong |= {"head.weight": torch.zeros(5), "first.weight": torch.zeros(2, 4), "right": torch.full((4,), torch.nan)}
    wrong |= {"block.0.conv.weight": torch.zeros(2, 2, dtype=torch.int8)}
    text = refusal(wrong)
    assert text.startswith("a.ckpt (a family): its tensors do not fit. Nothing was written.")
    for line in (
        "missing (1):\n    left",
        "in no place of this model (1):\n    head.weight [5]",
        "of another shape (1):\n    first.weight: expected [2, 3], found [2, 4]",
        "of a type that weights do not have (1):\n    block.0.conv.weight: expected floating point, found int8",
        "not finite (NaN or infinity) (1):\n    right",
    ):
        assert line in text


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_half_precision_that_overflowed_is_named(value):
    overflowed = THEIRS | {"first.bias": torch.full((2,), value, dtype=torch.float16)}
    assert "not finite (NaN or infinity) (1):\n    first.bias" in refusal(overflowed)


def test_lines_that_differ_in_a_number_alone_are_one():
    without = {name: one for name, one in THEIRS.items() if not name.startswith("block.")}
    assert "missing (3):\n    block.*.conv.weight (3 tensors)" in refusal(without)


def test_a_long_list_ends():
    text = refusal(THEIRS | {f"{chr(97 + number)}x": torch.zeros(1) for number in range(20)})
    assert "in no place of this model (20)" in text
    assert "and 8 more kinds" in text
    assert len(text.splitlines()) < 20


def test_what_may_be_left_out_is_counted_by_its_reason():
    dropped = [Dropped("opt.*", "the optimizer")]
    fitted = to_ours(TABLE, THEIRS | {"opt.a": torch.zeros(1), "opt.b": torch.zeros(1)}, SHAPES, "a.ckpt", dropped)
    assert fitted.dropped == {"the optimizer": 2}
    assert "options [1]" in refusal(THEIRS | {"options": torch.zeros(1)}, dropped)


def test_what_theirs_do_not_have_must_still_be_what_it_was():
    ours = to_ours(TABLE, THEIRS, SHAPES, "a.ckpt").weights
    assert torch.equal(ours["last.weight"][..., 0, 0], torch.eye(2))
    assert not ours["last.bias"].any()
    ours["last.bias"][0] = 1e-3
    with pytest.raises(CheckpointError, match=r"last\.bias: has been trained"):
        to_theirs(TABLE, ours)


def test_sparse_tensors_are_refused():
    assert "expected a dense tensor, found sparse_coo" in refusal(THEIRS | {"left": torch.ones(4).to_sparse()})


def test_a_table_that_forgets_or_repeats_is_a_bug():
    with pytest.raises(AssertionError, match="listed twice"):
        check_complete([*TABLE, TABLE[0]], SHAPES)
    with pytest.raises(AssertionError, match="not in both"):
        check_complete(TABLE[1:], SHAPES)


def test_a_part_has_its_prefixes():
    (entry,) = under([Entry("a", ("b", "c"))], "net.", "model.")
    assert (entry.ours, entry.theirs) == ("net.a", ("model.b", "model.c"))
