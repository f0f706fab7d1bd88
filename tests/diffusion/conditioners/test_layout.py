"""Layouts: corners as waves, shares of pixels, padding that changes nothing, and networks that read them."""

import math

import pytest
import torch

from ldm.diffusion.conditioners.base import Conditioning, require_conditioner
from ldm.diffusion.conditioners.joint import Joint
from ldm.diffusion.conditioners.layout import LayoutMap, LayoutTokens, coverage, waves
from ldm.diffusion.networks.dit import DiT
from ldm.errors import ConfigError
from tests.diffusion.conditioners.reading import errors, unet

CLASSES = 4
KINDS = {"tokens": LayoutTokens(CLASSES, 6), "map": LayoutMap(CLASSES, 6)}


def batch(device="cpu"):
    """Two boxes; one, and padding of which nothing may be seen."""
    boxes = torch.tensor(
        [[[0.0, 0.0, 0.5, 0.25, 1], [0.25, 0.5, 1.0, 1.0, 3]], [[0.5, 0.25, 0.75, 1.0, 0], [math.nan, 7, -1, 2, 99]]]
    )
    mask = torch.tensor([[True, True], [True, False]])
    latent = torch.empty(2, 3, 4, 8, device="meta")
    return {"boxes": boxes.to(device), "boxes_mask": mask.to(device), "latent": latent}


def mirrored(rows):
    left, top, right, bottom, classes = rows["boxes"].unbind(-1)
    return rows | {"boxes": torch.stack([1 - right, top, 1 - left, bottom, classes], -1)}


def test_waves_are_sines_and_cosines_of_octaves():
    found = waves(torch.tensor([[0.25, 0.5]]), 3)
    expected = [
        wave(octave * math.pi * place) for place in (0.25, 0.5) for wave in (math.sin, math.cos) for octave in (1, 2, 4)
    ]
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_shares_of_pixels_that_a_box_covers():
    found = coverage(torch.tensor([0.0, 0.25, 0.375, 1.0]), (2, 4))
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.25, 0, 0], [1, 0.5, 0, 0]]))
    corners = torch.rand(5, 2, 2).sort(1).values.flatten(1)  # left, top, right, bottom
    areas = (corners[:, 2:] - corners[:, :2]).prod(1)
    torch.testing.assert_close(coverage(corners, (7, 5)).mean((1, 2)), areas)


def test_a_token_for_each_box_after_one_that_begins():
    conditioner, rows = KINDS["tokens"], batch()
    require_conditioner(conditioner)
    found = conditioner(rows)
    assert found.token_mask.tolist() == [[True, True, True], [True, True, False]]
    assert torch.equal(found.tokens[:, 0], conditioner.begins.weight[0].expand(2, 6))
    box = conditioner.table.weight[3] + conditioner.corners(waves(rows["boxes"][0, 1, :4], 8))
    torch.testing.assert_close(found.tokens[0, 2], box)
    null = conditioner.null(2)
    assert torch.equal(null.tokens[:, 0], conditioner.begins.weight[1].expand(2, 6))
    both = found.cat(null)
    assert both.token_mask[2:].tolist() == [[True, False, False]] * 2


def test_an_image_of_the_rows_of_boxes_and_of_no_box():
    conditioner, rows = KINDS["map"], batch()
    found, weight = conditioner(rows).spatial, conditioner.table.weight
    assert found.shape == (2, 6, 4, 8)
    torch.testing.assert_close(found[0, :, 0, 0], weight[1])
    torch.testing.assert_close(found[0, :, 3, 7], weight[3])
    torch.testing.assert_close(found[0, :, 0, 7], weight[-1])
    torch.testing.assert_close(found[1, :, 1, 4], weight[0])
    over = {"boxes": torch.tensor([[[0, 0, 1, 1, 1], [0.25, 0, 1, 1, 2.0]]]), "boxes_mask": torch.ones(1, 2) > 0}
    torch.testing.assert_close(
        conditioner(over | {"latent": torch.empty(1, 1, 1, 1)}).spatial[0, :, 0, 0], weight[1] + 0.75 * weight[2]
    )
    null = conditioner.null(3).spatial
    assert null.shape == (3, 6, 1, 1)
    assert not null.any()


def seen(found: Conditioning):
    """What a network sees of the tokens, or of the image."""
    return found.spatial if found.tokens is None else found.clean_tokens()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_and_no_gradient(kind):
    conditioner, rows = KINDS[kind], batch()
    alone = {"boxes": rows["boxes"][1:, :1], "boxes_mask": rows["boxes_mask"][1:, :1], "latent": rows["latent"][1:]}
    found = seen(conditioner(rows))
    torch.testing.assert_close(found[1:] if kind == "map" else found[1:, :2], seen(conditioner(alone)))
    conditioner.zero_grad()
    found.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in conditioner.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_layout_is_not_the_absence_of_one(kind):
    conditioner, n = KINDS[kind], 2
    none = {"boxes": torch.zeros(n, 0, 5), "boxes_mask": torch.zeros(n, 0) > 0, "latent": batch()["latent"]}
    empty = {"boxes": torch.zeros(n, 3, 5), "boxes_mask": torch.zeros(n, 3) > 0, "latent": batch()["latent"]}
    found = [seen(conditioner(rows)) for rows in (none, empty)]
    if kind == "tokens":
        found = [tokens[:, :1] for tokens in found]
        assert conditioner(empty).token_mask.sum(1).tolist() == [1, 1]
    assert torch.equal(*found)
    assert not torch.allclose(found[0], seen(conditioner.null(n)))


def test_mirrored_boxes_are_the_mirrored_image_to_the_bit():
    conditioner, rows = KINDS["map"], batch()
    assert torch.equal(conditioner(mirrored(rows)).spatial, conditioner(rows).spatial.flip(-1))
    once = KINDS["tokens"](mirrored(rows)).clean_tokens()
    assert not torch.allclose(once[:, 1], KINDS["tokens"](rows).clean_tokens()[:, 1])
    assert torch.equal(KINDS["tokens"](mirrored(mirrored(rows))).clean_tokens(), KINDS["tokens"](rows).clean_tokens())


def test_both_together_and_a_thousand_boxes():
    conditioner = Joint({"map": LayoutMap(CLASSES, 3), "tokens": LayoutTokens(CLASSES, 8)})
    assert conditioner.keys == ("boxes", "boxes_mask")
    box = torch.tensor([0.25, 0.25, 0.5, 0.5, 2])
    rows = {"boxes": box.expand(1, 1000, 5), "boxes_mask": torch.ones(1, 1000), "latent": torch.empty(1, 4, 8, 8)}
    found = conditioner(rows)
    assert (found.spatial.shape, found.tokens.shape) == ((1, 3, 8, 8), (1, 1001, 8))
    assert found.spatial.isfinite().all()


def test_without_values_and_in_half_precision():
    with torch.device("meta"):
        tokens, image = LayoutTokens(CLASSES, 6), LayoutMap(CLASSES, 6)
    found = tokens(batch(device="meta"))
    assert (found.tokens.shape, found.token_mask.shape) == ((2, 3, 6), (2, 3))
    assert image(batch(device="meta")).spatial.shape == (2, 6, 4, 8)
    assert LayoutTokens(CLASSES, 6).bfloat16()(batch()).tokens.dtype == torch.bfloat16
    assert LayoutMap(CLASSES, 6).bfloat16()(batch()).spatial.dtype == torch.bfloat16


def changed(place, value):
    boxes = batch()["boxes"]
    boxes[0, 1, place] = value
    return {"boxes": boxes}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": None}, r"condition boxes: expected a tensor \(any, 5\) .* found none; data.params.aligned.boxes"),
        ({"boxes_mask": torch.ones(2, 3)}, "boxes_mask: found 3 a row, expected 2, as boxes"),
        (changed(2, 1.5), "boxes: expected 0 <= left < right <= 1, .* found 0.25, 0.5, 1.5, 1, 3"),
        (changed(0, 1.0), "boxes: expected 0 <= left < right"),
        (changed(4, 4), r"class from 0 to 3 \(box_classes=4\), found 0.25, 0.5, 1, 1, 4"),
        (changed(4, 1.5), "found 0.25, 0.5, 1, 1, 1.5"),
        (changed(1, math.nan), "found 0.25, nan, 1, 1, 3"),
    ],
)
def test_what_does_not_fit_is_refused(kind, change, message):
    with pytest.raises(ConfigError, match=message):
        KINDS[kind](batch() | change)


def quarters(random):
    """One or two boxes, each a quarter of the picture, and latents of a pixel each, in which a class has its color."""
    n, palette = 64, torch.randn(CLASSES + 1, 3, generator=torch.Generator().manual_seed(1))
    places = torch.rand(n, 4, generator=random).argsort(1)[:, :2]  # two different quarters
    classes = torch.randint(0, CLASSES, (n, 2), generator=random)
    mask = torch.stack([torch.ones(n), torch.randint(0, 2, (n,), generator=random)], 1) > 0
    left, top = places % 2 / 2, places // 2 / 2
    boxes = torch.stack([left, top, left + 0.5, top + 0.5, classes], -1)
    colors = torch.full((n, 4), CLASSES).scatter(1, places, classes.where(mask, torch.tensor(CLASSES)))
    return {"boxes": boxes, "boxes_mask": mask, "latent": palette[colors].reshape(n, 2, 2, 3).movedim(-1, 1)}


@pytest.mark.slow
def test_a_denoiser_reads_the_image():
    torch.manual_seed(0)
    told, shuffled = errors(unet(3, spatial_channels=4), LayoutMap(CLASSES, 4), quarters)
    assert told < 0.2
    assert shuffled > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("in_sequence", [False, True])
def test_a_denoiser_reads_the_tokens(in_sequence):
    torch.manual_seed(0)
    network = DiT(3, 1, 64, 2, 4, context_dim=32, tokens_in_sequence=in_sequence)
    conditioner = LayoutTokens(CLASSES, 32, waves=2)  # which tell quarters; shorter ones take longer to learn
    told, shuffled = errors(network, conditioner, quarters, 600, lr=6e-3)
    assert told < 0.2
    assert shuffled > 0.8
