"""Dense conditions of samples: which are taken, which refused, and what of a picture is kept."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm.errors import ConfigError
from ldm.images import to_arrays
from ldm.sampling.dense import Dense
from ldm.sampling.generate import generate
from tests.dense_models import load_dense, save_dense


@pytest.fixture(scope="module")
def pipelines(runs, tmp_path_factory):
    """pipelines(*keys) -> a pipeline that reads them."""
    made = {}

    def load(*keys):
        if keys not in made:
            made[keys] = load_dense(save_dense(tmp_path_factory.mktemp("dense") / "run", runs, keys))
        return made[keys]

    return load


def image(seed=0, size=16):
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, (3, size, size)).astype(np.float32))


def mask(columns=slice(0, 8)):
    found = torch.zeros(1, 16, 16)
    found[..., columns] = 1
    return found


def made(pipeline, conditions, **settings):
    return np.stack([one.image for one in generate(pipeline, range(len(conditions)), conditions, steps=2, **settings)])


def test_outside_of_the_mask_each_picture_stays_pixel_for_pixel(pipelines):
    pipeline = pipelines("mask", "masked_latent")
    pictures, masks = [image(0), image(1), image(2)], [mask(), mask(slice(3, 5)), mask(slice(15, 16))]
    rows = [{"image": one, "mask": hole} for one, hole in zip(pictures, masks, strict=True)]
    samples = made(pipeline, rows, batch_size=2)
    for sample, picture, hole in zip(samples, to_arrays(torch.stack(pictures)), masks, strict=True):
        outside = hole[0].numpy() == 0
        assert np.array_equal(sample[outside], picture[outside])
        assert not np.array_equal(sample[~outside], picture[~outside])


def test_a_masked_picture_is_encoded_with_gray_in_its_hole(pipelines):
    pipeline = pipelines("mask", "masked_latent")
    one, hole = image(), mask()
    mean = pipeline.codec.encode(torch.where(hole > 0, 0.0, one)[None])[0]
    latent = pipeline.manifest.standardize(mean.half().float())[0]
    by_picture = made(pipeline, [{"image": one, "mask": hole}])
    by_latent = made(pipeline, [{"masked_latent": latent, "mask": hole}])
    inside = hole[0].numpy() > 0
    assert np.array_equal(by_picture[0][inside], by_latent[0][inside])
    # What is in the hole cannot be seen.
    other = torch.where(hole > 0, image(7), one)
    assert np.array_equal(made(pipeline, [{"image": other, "mask": hole}]), by_picture)


def test_layouts_of_different_lengths_are_padded(pipelines):
    pipeline = pipelines("boxes", "boxes_mask")
    two = {"boxes": [[0, 0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1, 0]]}
    one = {"boxes": torch.tensor([[0, 0, 0.5, 1.0, 2]])}
    assert made(pipeline, [two, one]).shape == (2, 16, 16, 3)


def test_maps_keep_their_type(pipelines):
    seen = []
    pipeline = pipelines("map")
    pipeline.conditioner.register_forward_pre_hook(lambda _, given: seen.append(given[0]["map"].dtype))
    for kind in (np.uint8, np.int16):
        made(pipeline, [{"map": np.zeros((16, 16), kind)}])
    assert seen == [torch.uint8, torch.int16]


@pytest.mark.parametrize(
    ("keys", "condition", "message"),
    [
        (("mask", "masked_latent"), {"image": image(), "mask": torch.ones(1, 8, 8)}, r"mask: expected \(1, 16, 16\)"),
        (("mask", "masked_latent"), {"image": image(size=8), "mask": mask()}, r"image: expected \(3, 16, 16\)"),
        (("mask", "masked_latent"), {"mask": mask()}, "keys that the model reads, mask, image; found mask"),
        (("low_resolution",), {"low_resolution": image(size=32)}, r"low_resolution: expected \(3, 4, 4\)"),
        (("map",), {"map": np.zeros((8, 16), np.uint8)}, r"map: expected \(16, 16\)"),
        (("boxes", "boxes_mask"), {"boxes": [[0, 0, 1.5, 1, 0]]}, r"boxes: expected \[left, top, right, bottom\]"),
        (("boxes", "boxes_mask"), {"boxes": [[0.5, 0, 0.5, 1, 0]]}, r"found \[0.5, 0, 0.5, 1\]"),
        (("boxes", "boxes_mask"), {"boxes": [[0, 0, 1, 1]]}, "corners in fractions of the picture, found"),
        (("boxes", "boxes_mask"), {"boxes": [[0, 0, 1, 1, -1]]}, "expected a class from 0 and up, found -1"),
    ],
)
def test_what_does_not_fit_is_refused(pipelines, keys, condition, message):
    with pytest.raises(ConfigError, match=message):
        made(replace(pipelines(*keys), dense=Dense(factor=4)), [condition])


def test_a_layout_has_no_more_boxes_than_the_model_was_trained_with(pipelines):
    pipeline = replace(pipelines("boxes", "boxes_mask"), dense=Dense(box_classes=["a", "b"], most_boxes=30))
    with pytest.raises(ConfigError, match="expected 30 boxes at most, as the model was trained, found 1000"):
        made(pipeline, [{"boxes": [[0, 0, 1, 1, 0]] * 1000}])
    with pytest.raises(ConfigError, match="expected a class from 0 to 1, found 2"):
        made(pipeline, [{"boxes": [[0, 0, 1, 1, 2]]}])
