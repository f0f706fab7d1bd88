"""Samples and reconstructions as pictures: what decides each of them, and that nothing else does."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from ldm.autoencoder.codec import Codec
from ldm.data.sources.folder import ImageFolder
from ldm.data.transforms import EvalTransform
from ldm.errors import ConfigError, NumericError
from ldm.evaluation.pictures import made
from ldm.evaluation.pictures.base import digest
from ldm.evaluation.pictures.labels import Random
from ldm.evaluation.pictures.made import Generated, Recipe, Reconstructions
from ldm.evaluation.pictures.stored import DatasetPictures
from ldm.sampling.guidance import Guidance
from ldm.sampling.pipeline import Pipeline
from ldm.sampling.samplers import ddim
from ldm.sampling.timesteps import default

RECIPE = Recipe(ddim, 2, default, Guidance(), {"sampler": "ddim", "steps": 2})


def test_samples_are_those_of_their_seeds_and_classes(runs):
    pipeline = Pipeline.load(runs.diffusion)
    made = Generated(pipeline, RECIPE, 7, first=2)
    assert (len(made), made.shape) == (7, (3, 16, 16))
    assert made.labels().tolist() == [2, 0, 1, 2, 0, 1, 2]
    (image,) = pipeline.generate([4], [{"class_label": 1}], steps=2)
    assert np.array_equal(made.images([2])[0], np.asarray(image).transpose(2, 0, 1))
    alone, together = made.images([5]), made.images([4, 5, 6])[1:2]
    assert (alone.int() - together.int()).abs().max() <= 1


def test_a_model_without_classes(make_runs):
    made = Generated(Pipeline.load(make_runs(channels=1, classes=None).diffusion), RECIPE, 3)
    assert made.labels() is None
    assert made.images([0, 1]).shape == (2, 1, 16, 16)


def test_the_description_has_what_decides_and_no_more(runs):
    pipeline = Pipeline.load(runs.diffusion)

    def name(pipeline=pipeline, recipe=RECIPE, number=5, first=0):
        return digest(Generated(pipeline, recipe, number, first).description())

    same = [name(), name(number=9), name(Pipeline.load(runs.diffusion))]
    assert len({*same}) == 1
    other = [
        name(first=1),
        name(recipe=replace(RECIPE, labels=Random())),
        name(recipe=replace(RECIPE, settings={"sampler": "ddim", "steps": 3})),
        name(Pipeline.load(runs.diffusion, ema=False)),
    ]
    assert len({*same, *other}) == 5


def test_a_model_of_several_sizes_says_at_which_it_is_measured(runs):
    pipeline = Pipeline.load(runs.diffusion)
    one = Generated(pipeline, RECIPE, 2).description()
    assert not {"size", "trained_sizes"} & one.keys()
    several = replace(pipeline, manifest=replace(pipeline.manifest, sizes=[[8, 16], [16, 16]]))
    assert Generated(several, RECIPE, 2).description() == {
        **one,
        "size": [16, 16],
        "trained_sizes": [[8, 16], [16, 16]],
    }


def test_reconstructions_are_of_the_mean(runs, image_folder):
    codec = Codec.load(runs.autoencoder)
    originals = DatasetPictures(ImageFolder(image_folder), EvalTransform(16), 3)
    pictures = Reconstructions(codec, originals)
    batch = pictures.batch([3, 4])
    assert torch.equal(batch.decoded, codec.decode(codec.encode(originals.pixels([3, 4]))[0]))
    assert torch.equal(pictures.images([3, 4]), batch.images)
    assert pictures.labels().tolist() == originals.labels().tolist()


def test_reconstructions_in_bf16_are_decoded_so_and_are_others(runs, image_folder):
    codec = Codec.load(runs.autoencoder)
    originals = DatasetPictures(ImageFolder(image_folder), EvalTransform(16), 3)
    plain, half = Reconstructions(codec, originals), Reconstructions(codec, originals, compute=torch.bfloat16)
    expected, found = plain.batch([3, 4]), half.batch([3, 4])
    assert torch.equal(found.mean, expected.mean)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found.decoded, codec.decode(expected.mean))
    assert not torch.equal(found.decoded, expected.decoded)
    assert half.description() == {**plain.description(), "compute": "torch.bfloat16"}


def test_reconstructions_that_are_not_finite(runs, image_folder, monkeypatch):
    codec = Codec.load(runs.autoencoder)
    monkeypatch.setattr(codec, "decode", partial(torch.full_like, fill_value=float("nan")))
    pictures = Reconstructions(codec, DatasetPictures(ImageFolder(image_folder), EvalTransform(16), 3))
    with pytest.raises(NumericError, match="a reconstruction is not finite"):
        pictures.images([0])


def test_weights_are_read_for_the_description_alone(runs, monkeypatch):
    """Weights that are sharded over ranks can be sampled, and not be hashed."""
    monkeypatch.setattr(made, "weight_hash", lambda *_: pytest.fail("nobody asked"))
    pictures = Generated(Pipeline.load(runs.diffusion), RECIPE, 3)
    assert pictures.images([0]).shape == (1, 3, 16, 16)
    with pytest.raises(pytest.fail.Exception, match="nobody asked"):
        pictures.description()


def test_samples_of_another_rounding_are_others(runs):
    pictures, kernel = Generated(Pipeline.load(runs.diffusion), RECIPE, 3), torch.backends.mkldnn.conv
    before, precision = digest(pictures.description()), kernel.fp32_precision
    kernel.fp32_precision = "bf16"
    try:
        assert digest(pictures.description()) != before
    finally:
        kernel.fp32_precision = precision


def test_seeds_end_somewhere(runs):
    pipeline = Pipeline.load(runs.diffusion)
    assert Generated(pipeline, RECIPE, 3, 2**63 - 3).labels().dtype == np.int64
    with pytest.raises(ConfigError, match=r"first seed 9223372036854775806: 3 samples would need seeds beyond"):
        Generated(pipeline, RECIPE, 3, 2**63 - 2)
