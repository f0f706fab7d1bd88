"""Samples beside what they were asked by: against closed forms, with baselines that are others' own, in any batches."""

from math import log10

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from ldm.autoencoder.lpips import AlexNetLPIPS
from ldm.evaluation.followed import (
    INPAINTING,
    PAIRS,
    SUPER_RESOLUTION,
    Closeness,
    Followed,
    bicubic,
    mean_filled,
    measures_of,
    metrics_of,
    task_of,
)
from ldm.latents.columns import pixels


def pictures(number=4, side=16, low=40, high=200, seed=0):
    """Bytes that are off the ends, so that an error of forty can be added anywhere."""
    return torch.randint(low, high, (number, 3, side, side), generator=torch.Generator().manual_seed(seed)).byte()


def masks(number=4, side=16):
    """The left half of a picture, and one row more of each next one."""
    holes = torch.zeros(number, 1, side, side)
    holes[..., : side // 2] = 1
    for place in range(number):
        holes[place, :, :place] = 1
    return holes


def inpainted(images, truths, holes):
    conditions = [{"image": pixels(truth), "mask": mask} for truth, mask in zip(truths, holes, strict=True)]
    return Followed(images, truths, conditions, conditions[1:] + conditions[:1])


def enlarged(images, truths, factor=4):
    conditions = [{"low_resolution": pixels(truth)[:, ::factor, ::factor]} for truth in truths]
    return Followed(images, truths, conditions, conditions[1:] + conditions[:1])


def closeness(task, perceptual=None):
    return Closeness(task, task.metrics, perceptual or {}, torch.device("cpu"))


def values(measure, *batches):
    """By name, from rows as a store keeps them."""
    rows = torch.cat([measure.rows(batch).float() for batch in batches]).numpy()
    return {one.metric: one for one in measure.values(rows)}


@pytest.fixture(scope="module")
def lpips():
    return {"LPIPS-AlexNet": AlexNetLPIPS(pretrained=False)}


def test_a_sample_that_is_the_truth(lpips):
    truths = pictures(side=32)
    found = values(closeness(INPAINTING, lpips), inpainted(truths, truths, masks(side=32)))
    assert found["PSNR in the hole"].value == 100
    assert found["LPIPS-AlexNet"].value == 0
    assert found["LPIPS-AlexNet, mean fill"].value > 0
    found = values(closeness(SUPER_RESOLUTION, lpips), enlarged(truths, truths))
    assert (found["PSNR"].value, found["LPIPS-AlexNet"].value) == (100, 0)
    assert found["SSIM"].value == pytest.approx(1, abs=1e-6)
    assert [found[name].better for name in ("PSNR", "SSIM", "LPIPS-AlexNet")] == ["higher", "higher", "lower"]


@pytest.mark.parametrize("error", [1, 40])
def test_an_error_in_the_hole_alone_counts(error):
    truths, holes = pictures(), masks()
    images = truths + (error * holes).byte()
    found = values(closeness(INPAINTING), inpainted(images, truths, holes))
    assert found["PSNR in the hole"].value == pytest.approx(20 * log10(255 / error), rel=1e-6)
    assert found["PSNR in the hole"].error == pytest.approx(0, abs=1e-6)
    # Of the whole picture it would be larger, by the share of the hole.
    images = truths + error
    found = values(closeness(PAIRS), Followed(images, truths, [{}] * 4, [{}] * 4))
    assert found["PSNR"].value == pytest.approx(20 * log10(255 / error), rel=1e-6)
    assert {*found} == {"PSNR", "SSIM"}, "a pair has no baseline"


def test_means_and_their_errors():
    truths, holes = pictures(), masks()
    errors = torch.tensor([1, 2, 5, 10])
    images = truths + (errors[:, None, None, None] * holes).byte()
    found = values(closeness(INPAINTING), inpainted(images, truths, holes))["PSNR in the hole"]
    expected = 20 * np.log10(255 / errors.numpy())
    assert found.value == pytest.approx(expected.mean(), rel=1e-6)
    assert found.error == pytest.approx(expected.std(ddof=1) / 2, rel=1e-5)
    assert (found.freedom, found.settings) == (3, {"images": 4})


def test_samples_of_one_item_are_no_surer_than_the_item():
    rows = np.random.default_rng(0).uniform(10, 30, (8, 5)).astype(np.float32)
    rows[:, -1] = [1, 1, 0, 1, 1, 1, 1, 1]  # a hole is empty
    once = Closeness(INPAINTING, ["psnr", "ssim"], {}, torch.device("cpu"), 8).values(rows)
    again = Closeness(INPAINTING, ["psnr", "ssim"], {}, torch.device("cpu"), 8).values(np.tile(rows, (3, 1)))
    alone = Closeness(INPAINTING, ["psnr", "ssim"], {}, torch.device("cpu")).values(rows)
    own = rows[rows[:, -1] > 0, 0].astype(float)
    assert once[0].error == pytest.approx(own.std(ddof=1) / 7**0.5)
    for one, three, other in zip(once, again, alone, strict=True):
        assert (three.value, three.error) == pytest.approx((one.value, one.error))
        assert (three.freedom, three.settings["images"], one.freedom) == (6, 21, 6)
        assert one == other


def test_the_hole_is_filled_with_the_mean_of_the_rest():
    truths, holes = torch.full((1, 3, 8, 8), 90, dtype=torch.uint8), torch.zeros(1, 1, 8, 8)
    holes[..., :4] = 1
    truths[:, 0, :, 4:], truths[:, 1, ::2, 4:], truths[:, 1, 1::2, 4:] = 110, 10, 31  # 20.5 on average
    batch = inpainted(truths, truths, holes)
    filled = mean_filled(batch)
    assert filled[0, :, 0, 0].tolist() == [110, 20, 90]
    assert torch.equal(filled[..., 4:], truths[..., 4:])
    found = values(closeness(INPAINTING), batch)["PSNR in the hole, mean fill"]
    assert found.value == pytest.approx(10 * log10(255**2 / ((20**2 + 70**2) / 3)), rel=1e-6)


def test_a_picture_that_is_all_hole_is_filled_with_gray():
    batch = inpainted(pictures(1), pictures(1), torch.ones(1, 1, 16, 16))
    assert mean_filled(batch).unique().tolist() == [128]


def test_an_empty_hole_is_no_work():
    truths, holes = pictures(), masks()
    holes[1] = 0
    images = truths + (7 * masks()).byte()
    found = values(closeness(INPAINTING), inpainted(images, truths, holes))["PSNR in the hole"]
    assert found.value == pytest.approx(20 * log10(255 / 7), rel=1e-6)
    assert found.settings == {"images": 3}
    assert values(closeness(INPAINTING), inpainted(images, truths, holes * 0)) == {}
    alone = Followed(*(part[:1] for part in inpainted(images, truths, holes)))
    assert values(closeness(INPAINTING), alone)["PSNR in the hole"].error is None


@pytest.mark.parametrize(("side", "factor"), [(16, 4), (24, 2)])
def test_bicubic_is_torchvisions(side, factor):
    for low, high in ((0, 256), (100, 150)):
        truths = pictures(side=side, low=low, high=high)
        batch, small = enlarged(truths, truths, factor), truths[..., ::factor, ::factor]
        theirs = resize(small.double(), [side, side], InterpolationMode.BICUBIC).clamp(0, 255)
        assert (bicubic(batch) - theirs).abs().max() < 0.501
    of_bytes = resize(small, [side, side], InterpolationMode.BICUBIC)
    assert (bicubic(batch).int() - of_bytes.int()).abs().max() <= 1, "which rounds and clips between its passes"
    beside = values(closeness(SUPER_RESOLUTION), batch)
    again = values(closeness(SUPER_RESOLUTION), batch._replace(images=bicubic(batch)))
    assert beside["PSNR, bicubic"].value == again["PSNR"].value < 30
    assert beside["SSIM, bicubic"].value == again["SSIM"].value < 1


@pytest.mark.parametrize(("task", "batch"), [(INPAINTING, "holes"), (SUPER_RESOLUTION, "small")])
def test_batches_change_nothing(task, batch, lpips):
    truths, images = pictures(side=32), pictures(side=32, seed=1)
    whole = inpainted(images, truths, masks(side=32)) if batch == "holes" else enlarged(images, truths)
    parts = [Followed(*(part[rows] for part in whole)) for rows in (slice(1), slice(1, 4))]
    measure = closeness(task, lpips)
    one, other = values(measure, whole), values(measure, *parts)
    assert {name: value.value for name, value in one.items()} == pytest.approx(
        {name: value.value for name, value in other.items()}, rel=1e-6
    )
    psnr = [name for name in one if name.startswith("PSNR")]
    assert [one[name].value for name in psnr] == [other[name].value for name in psnr], "to the bit"


class Judge:
    column = None


def test_what_is_measured_is_decided_by_what_a_model_reads():
    masked = ("mask", "masked_latent")
    assert (task_of(masked), task_of(["low_resolution"]), task_of(["pair"])) == (INPAINTING, SUPER_RESOLUTION, PAIRS)
    assert task_of(["class_label", "map"]) is None
    assert metrics_of([*masked, "class_label"]) == ("psnr", "lpips")
    assert metrics_of(["low_resolution"]) == ("psnr", "ssim", "lpips")
    assert metrics_of(["boxes", "boxes_mask", "caption"]) == ("boxes",)
    assert metrics_of(["pair", "map"]) == ("psnr", "ssim", "lpips", "map")
    assert metrics_of(["class_label"]) == ()
    judges = {"map": Judge(), "boxes": Judge()}
    found = measures_of(["low_resolution", "map"], ["psnr", "map"], {}, judges)
    assert isinstance(found[0], Closeness)
    assert found[1:] == [judges["map"]]
    assert measures_of(["low_resolution", "map"], [], {}, judges) == []


def test_what_is_kept_of_one_measure_is_not_taken_for_another(lpips):
    keys = [
        closeness(INPAINTING).column.key,
        closeness(INPAINTING, lpips).column.key,
        closeness(SUPER_RESOLUTION).column.key,
        Closeness(SUPER_RESOLUTION, ["psnr"], {}, torch.device("cpu")).column.key,
    ]
    other = {"LPIPS-AlexNet": AlexNetLPIPS(pretrained=False)}
    assert closeness(INPAINTING, other).column.key == keys[1], "the same weights"
    other["LPIPS-AlexNet"].heads[0].data += 1
    assert len({*keys, closeness(INPAINTING, other).column.key}) == 5
