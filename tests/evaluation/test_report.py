import numpy as np
import pytest
import torch

from ldm.data.sources.arrays import ArrayImages
from ldm.errors import ConfigError, DataError
from ldm.evaluation.report import Pictures, compare, of_each_class, read, unit_range
from ldm.images import to_uint8
from ldm.sampling.pipeline import Pipeline


def dataset(number: int, seed: int) -> ArrayImages:
    """Plain colors, one a class, in the three classes of the tiny pipeline; 16 px."""
    random = np.random.default_rng(seed)
    labels = np.arange(number) % 3
    images = random.integers(0, 60, (number, 16, 16, 3), dtype=np.uint8)
    images[np.arange(number), :, :, labels] += 190
    return ArrayImages("colours", images, labels, ["cat", "dog", "Ankle boot"])


@pytest.fixture(scope="module")
def pipeline(runs):
    return Pipeline.load(runs.diffusion)


@pytest.fixture(scope="module")
def report(pipeline):
    return compare(pipeline, dataset(600, 0), dataset(150, 1), 4, epochs=6, guidance_scales=[1.0, 3.0], steps=2)


def test_real_images_do_well_and_an_untrained_pipeline_does_not(report):
    assert [*report.scores] == ["real", "reconstructions of these", "samples, guidance 1", "samples, guidance 3"]
    assert report.test_accuracy > 0.95
    assert report.scores["real"].accuracy > 0.95
    assert report.scores["samples, guidance 1"].accuracy < 0.8
    assert report.scores["real"].distance < 0.2 * report.scores["samples, guidance 1"].distance


def test_every_row_is_as_many_of_each_class(report):
    for pictures in report.pictures.values():
        assert pictures.images.shape == (12, 3, 16, 16)
        assert pictures.images.dtype == torch.uint8
        assert pictures.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_real_images_come_from_the_tenth_that_the_classifier_never_saw(report):
    last = read(dataset(600, 0), 16, 3).images[540:]
    for image in report.pictures["real"].images:
        assert (last == image).flatten(1).all(1).any()


def test_samples_are_those_of_the_pipeline_and_all_different(report):
    images = report.pictures["samples, guidance 3"].images
    assert len(images.flatten(1).unique(dim=0)) == 12


def test_the_report_as_table_and_picture(report):
    lines = report.markdown().splitlines()
    assert lines[0] == "| images | classifier accuracy | Fréchet distance to the test set |"
    assert lines[1] == "| --- | --- | --- |"
    assert lines[2].startswith("| real | ")
    assert lines[-1].endswith("% | 0 |")
    assert len(lines) == 7
    sheet = report.sheet(columns=2)
    assert sheet.shape == (2 + 3 * 66, 4 * (2 + 2 * 66), 3)
    assert np.array_equal(sheet[2:66:4, 2:66:4], report.pictures["real"].images[0].permute(1, 2, 0).numpy())


def test_pixels_are_read_as_the_autoencoder_gets_them():
    pictures = read(dataset(3, 0), 16, 3)
    assert np.array_equal(pictures.images.permute(0, 2, 3, 1).numpy(), dataset(3, 0).images)
    assert read(dataset(3, 0), 8, 1).images.shape == (3, 1, 8, 8)


def test_bytes_and_units_are_inverse():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(unit_range(every)), every)


def test_too_few_images_of_a_class_are_refused():
    pictures = Pictures(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 0, 1]))
    with pytest.raises(DataError, match="class 1: expected 2 images, found 1"):
        of_each_class(pictures, 2, 2)


def test_an_unconditional_model_is_refused(make_runs):
    pipeline = Pipeline.load(make_runs(classes=None).diffusion)
    with pytest.raises(ConfigError, match="without classes"):
        compare(pipeline, dataset(60, 0), dataset(15, 1), 1, epochs=1, guidance_scales=[1.0], steps=1)
