import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.config.check import full_look_up, parameters
from ldm.config.targets import build
from ldm.config.tree import from_plain
from ldm.data.drawn import Drawn, draw_rows, generator, meta_column
from ldm.data.given_masks import MaskFolder, OwnMask
from ldm.data.mask_kinds import Bounds, Boxes, Halves, NarrowStrokes, Outside, Square, Strokes, Whole
from ldm.data.masks import Masks
from ldm.errors import ConfigError, DataError

KINDS = [
    *(Strokes(), NarrowStrokes(), Boxes(), Halves(), Square(), Square(side=(0.1, 0.7), centered=False)),
    *(Outside(), Outside(centered=True), Whole()),
]


def rows(*size, number=1):
    return {"image": torch.zeros(number, 3, *size, dtype=torch.uint8)}


def drawn(kind, size=(32, 32), number=40, **params):
    """(N,H,W) bool: the holes of one kind."""
    masks = Masks([kind], **{"most": 1.0, **params})
    return draw_rows("mask", masks, rows(*size, number=number), 3, range(number))[:, 0] == 255


@pytest.mark.parametrize("kind", KINDS, ids=repr)
@pytest.mark.parametrize("size", [(16, 16), (24, 40), (41, 17)])
def test_every_kind_at_any_size(kind, size):
    masks = Masks([kind], most=1.0)
    assert isinstance(masks, Drawn)
    made = draw_rows("mask", masks, rows(*size, number=20), 0, range(20))
    assert made.shape == meta_column("mask", masks, rows(*size, number=20)).shape == (20, 1, *size)
    assert set(made.unique().tolist()) <= {0, 255}
    assert (made == 255).flatten(1).any(1).all(), "nowhere all black"


@pytest.mark.parametrize("size", [(1, 1), (1, 64), (1024, 768)])
def test_extreme_sizes(size):
    for kind in (Strokes(), NarrowStrokes(), Boxes(), Square(centered=False)):
        assert drawn(kind, size, number=2).any()


@pytest.mark.parametrize("kind", [one for one in KINDS if one not in (Whole(), Square(), Halves())], ids=repr)
def test_a_share_out_of_bounds_is_drawn_again(kind):
    free = drawn(kind, number=50).float().mean((1, 2))
    low, high = np.quantile(free, [0.3, 0.7]).tolist()
    bound = drawn(kind, number=50, least=low, most=high).float().mean((1, 2))
    assert low <= bound.min()
    assert bound.max() <= high
    assert bound.max() > bound.min()


def test_the_kinds_come_as_their_weights_say():
    # Told apart by their share of hole, of 10,000 masks.
    masks = Masks([Square(side=(0.25, 0.25)), Halves(), Whole()], weights=[1, 2, 1], most=0.5)
    made = draw_rows("mask", masks, rows(8, 8, number=10_000), 5, range(10_000))
    holes = made.eq(255).flatten(1).sum(1).numpy()
    counts = np.unique(holes, return_counts=True)
    assert counts[0].tolist() == [4, 32, 64]
    for count, share in zip(counts[1], [0.25, 0.5, 0.25], strict=True):
        assert abs(count - 10_000 * share) < 5 * math.sqrt(10_000 * share * (1 - share))


def test_redrawing_does_not_change_the_weights():
    # Half of the strokes are refused, none of the squares.
    free = drawn(Strokes(), (16, 16), number=50).float().mean((1, 2))
    bounds = {"least": free.median().item(), "most": 1.0}
    masks = Masks([Strokes(), Square(side=(1.0, 1.0))], **bounds)
    whole = draw_rows("mask", masks, rows(16, 16, number=600), 0, range(600)).eq(255).flatten(1).all(1).sum().item()
    assert abs(whole - 300) < 5 * math.sqrt(150)


def test_a_mask_depends_on_its_number_alone():
    masks = Masks(KINDS, most=1.0)
    one = draw_rows("mask", masks, rows(16, 24, number=6), 1, [0, 1, 2, 3, 4, 5])
    other = draw_rows("mask", Masks(KINDS, most=1.0), rows(16, 24, number=4), 1, [5, 2, 0, 9])
    assert torch.equal(other[:3], one[[5, 2, 0]])
    assert not torch.equal(one, draw_rows("mask", masks, rows(16, 24, number=6), 2, range(6)))


def test_halves_are_the_four_halves():
    found = {tuple(map(tuple, hole.tolist())) for hole in drawn(Halves(), (4, 6))}
    left, top = torch.zeros(4, 6, dtype=torch.bool), torch.zeros(4, 6, dtype=torch.bool)
    left[:, :3], top[:2] = True, True
    assert found == {tuple(map(tuple, half.tolist())) for half in (left, ~left, top, ~top)}


def test_squares_and_boxes_have_their_sides():
    centered = drawn(Square(side=(0.5, 0.5)), (16, 24), number=1)[0]
    assert centered[4:12, 8:16].all()
    assert centered.sum() == 64
    for hole in drawn(Square(side=(0.25, 0.5), centered=False), (16, 24)):
        height, width = hole.any(1).sum(), hole.any(0).sum()
        assert 4 <= height == width <= 8
        assert hole.sum() == height * width
    for hole in drawn(Boxes(boxes=(1, 1), side=(0.25, 0.5), margin=0.125), (16, 24)):
        height, width = hole.any(1).sum(), hole.any(0).sum()
        assert hole.sum() == height * width
        assert 4 <= min(height, width) <= max(height, width) <= 8
        assert hole[2:-2, 2:-2].sum() == hole.sum(), "the margin stays"


def test_outside_of_a_box():
    for hole in drawn(Outside(side=(0.5, 0.75)), (16, 24)):
        height, width = (~hole).any(1).sum(), (~hole).any(0).sum()
        assert (~hole).sum() == height * width
        assert 8 <= height <= 12
        assert 12 <= width <= 18


def test_a_stroke_of_one_segment_has_its_width():
    # A long straight line across: area / length is the width, but for rounding.
    wide = Strokes(strokes=(1, 1), segments=(1, 1), width=(0.1, 0.1), length=(0.5, 0.5))
    for hole in drawn(wide, (200, 200), number=60):
        if not (hole[0].any() or hole[-1].any() or hole[:, 0].any() or hole[:, -1].any()):
            assert hole.sum().item() == pytest.approx(100 * 20 + math.pi * 10**2, rel=0.12)


def test_narrow_and_wide_at_another_size_have_about_the_same_share():
    for kind in (Strokes(), NarrowStrokes()):
        small, large = (drawn(kind, (side, side), 20).float().mean().item() for side in (64, 256))
        assert small == pytest.approx(large, rel=0.15)


def test_descriptions_are_plain_and_tell_settings_apart():
    said = [json.dumps(Masks([kind], most=1.0).describe()) for kind in KINDS]
    assert len({*said}) == len(KINDS)
    assert Masks().describe() == {
        "target": "ldm.data.masks.Masks",
        "kinds": [Strokes().describe(), Boxes().describe()],
        "shares": [1 / 1.3, 0.3 / 1.3],
        "least": 0.0,
        "most": 0.5,
    }


def test_a_node_of_yaml_is_checked_and_built():
    narrow = {"target": "ldm.data.mask_kinds.NarrowStrokes", "params": {"strokes": [1, 3]}}
    node = {"target": "ldm.data.masks.Masks", "params": {"kinds": [narrow], "least": 0.01}}
    made = build(node, key="data.params.drawn.mask")
    assert [*made.kinds[0].strokes] == [1, 3]
    assert made.kinds[0].describe()["strokes"] == [1, 3]
    wrong = {"mask": node | {"params": {"kinds": [{"target": narrow["target"], "params": {"strokes": [0, 3]}}]}}}
    (problem,) = parameters(from_plain(wrong, "masks.yaml"), full_look_up(()))
    assert "mask.params.kinds.0.params.strokes.0" in problem
    assert "a whole number from 1 up" in problem


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"kinds": []}, "expected at least one, found none"),
        ({"kinds": [Halves()], "weights": [0]}, "Masks.weights: expected weights from 0 up of which one is above 0"),
        ({"least": 0.4, "most": 0.2}, "expected 0 <= least <= most and most above 0, found 0.4 and 0.2"),
        ({"most": 0.0}, "most above 0"),
        ({"kinds": [Halves()], "most": 0.4}, "Halves: 0 of 64 masks had a hole of 0.0 to 0.4 of the picture"),
        ({"kinds": [Square(side=(1.0, 1.0))], "most": 0.99}, "Square: 0 of 64 masks"),
    ],
)
def test_masks_that_cannot_be_are_refused(params, message):
    with pytest.raises(ConfigError, match=message):
        Masks(**params)


@pytest.mark.parametrize(
    ("make", "params"),
    [
        *((Strokes, {name: (2, 1)}) for name in ("strokes", "segments", "width", "length")),
        *((Boxes, {"boxes": (2, 1)}), (Boxes, {"side": (0.5, 0.2)}), (Square, {"side": (0.5, 0.2)})),
        *((Outside, {"side": (0.5, 0.2)}), (Boxes, {"margin": 0.5})),
    ],
)
def test_reversed_ranges_are_refused(make, params):
    (name,) = params
    with pytest.raises(ConfigError, match=rf"{make.__name__}\.{name}: expected"):
        make(**params)


def test_bounds_that_no_mask_of_a_small_picture_meets_are_refused():
    masks = Masks([Square(side=(0.5, 0.5))], least=0.2, most=0.3)
    with pytest.raises(ConfigError, match=r"Square: of 1000 masks for a picture of 1 pixels none had a hole of 0.2 to"):
        masks.draw({"image": torch.zeros(3, 1, 1)}, generator(0, "mask", 0))


def test_bounds_are_of_pixels():
    mask = np.zeros((2, 5), dtype=np.uint8)
    assert not Bounds(0, 1).admit(mask)
    mask[0, 0] = 255
    assert Bounds(0.1, 0.1).admit(mask)
    assert not Bounds(0.2, 1).admit(mask)
    assert not Bounds(0, 0.05).admit(mask)


# ---- given masks ----


def test_an_own_mask_is_read_whatever_the_bounds():
    masks = Masks([OwnMask("hole")], least=0.9, most=0.95)
    assert masks.reads == ["image", "hole"]
    given = torch.tensor([[0, 127, 128], [255, 0, 0]], dtype=torch.uint8)
    for form in (given, given[None]):
        made = masks.draw({"image": torch.zeros(3, 2, 3), "hole": form}, generator(0, "mask", 0))
        assert made.tolist() == [[[0, 0, 255], [255, 0, 0]]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(2, 3), "'mask' of an item: the mask is all black.*: paint the hole white"),
        (torch.full((2, 3), 255), "the mask is all white.*allow it by `most: 1`"),
        (torch.zeros(3, 2), r"expected a mask of 2 x 3 pixels as its picture, found \(3, 2\)"),
    ],
)
def test_own_masks_that_leave_nothing_to_do_are_refused(given, message):
    row = {"image": torch.zeros(3, 2, 3), "mask": given.to(torch.uint8)}
    with pytest.raises(DataError, match=message):
        Masks([OwnMask()]).draw(row, generator(0, "mask", 0))


def test_an_own_mask_may_be_all_white_where_that_is_asked_for():
    row = {"image": torch.zeros(3, 2, 3), "mask": torch.full((2, 3), 255, dtype=torch.uint8)}
    assert Masks([OwnMask()], most=1.0).draw(row, generator(0, "mask", 0)).eq(255).all()


def save(file, mask):
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(np.array(mask, dtype=np.uint8)).save(file)


def test_masks_of_a_folder_are_drawn_by_number_and_resized_by_nearest(tmp_path):
    left, top = [[255, 0], [255, 0]], [[200, 200], [0, 127]]
    save(tmp_path / "a.png", left)
    save(tmp_path / "more" / "b.PNG", top)
    masks = Masks([MaskFolder(str(tmp_path))])
    made = draw_rows("mask", masks, rows(4, 6, number=200), 0, range(200))[:, 0]
    large = [torch.tensor(one).ge(128).repeat_interleave(2, 0).repeat_interleave(3, 1) for one in (left, top)]
    found = [made.eq(255).eq(one).flatten(1).all(1).sum().item() for one in large]
    assert sum(found) == 200
    assert abs(found[0] - 100) < 36
    again = draw_rows("mask", masks, rows(4, 6, number=2), 0, [7, 3])[:, 0]
    assert torch.equal(again, made[[7, 3]])


def test_the_description_of_a_folder_is_that_of_its_masks(tmp_path):
    for name in ("one", "two"):
        save(tmp_path / name / "a.png", [[255, 0]])
    one, two = (MaskFolder(str(tmp_path / name)).describe() for name in ("one", "two"))
    assert one == two
    save(tmp_path / "two" / "a.png", [[0, 255]])
    assert MaskFolder(str(tmp_path / "two")).describe() != one


def test_folders_without_usable_masks_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"expected a folder of masks as .png, found no such folder"):
        MaskFolder(str(tmp_path / "none"))
    with pytest.raises(DataError, match="found no file of that ending: name another `root`"):
        MaskFolder(str(tmp_path))
    save(tmp_path / "black.png", [[0, 0]])
    with pytest.raises(DataError, match=r"black\.png: the mask is all black"):
        Masks([MaskFolder(str(tmp_path))])
    save(tmp_path / "black.png", [[255, 255]])
    with pytest.raises(ConfigError, match=r"MaskFolder: 0 of 64 masks had a hole of 0.0 to 0.5"):
        Masks([MaskFolder(str(tmp_path))])
    (tmp_path / "black.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"black\.png: cannot be read as an image"):
        Masks([MaskFolder(str(tmp_path))])
