"""Judges and their files: what they see, what they say of themselves, and which are refused."""

import pytest
import torch

from ldm.errors import CheckpointError, ConfigError
from ldm.evaluation.features.classifier import Classifier, ClassifierFeatures, save
from ldm.evaluation.features.segmenter import Segmenter
from ldm.evaluation.judges import BoxClassifier, MapSegmenter, crops

NAMES = ["cat", "dog", "sun"]


def boxes(names=NAMES):
    return BoxClassifier(Classifier(3, 3, 4), (16, 24), names)


def segmenter(names=NAMES):
    return MapSegmenter(Segmenter(3, 3, 4), (16, 24), names)


def noise(number=3, height=16, width=24):
    return torch.randint(256, (number, 3, height, width), generator=torch.Generator().manual_seed(0)).byte()


def test_crops_of_whole_pixels_are_those_pixels():
    images = noise(2, 64, 64)
    one, other = torch.tensor([[0, 0, 0.5, 0.5], [0.5, 0.25, 1, 0.75]]), torch.tensor([[0.25, 0.5, 0.75, 1]])
    found = crops(images, [one, other])
    expected = [images[0, :, :32, :32], images[0, :, 16:48, 32:], images[1, :, 32:, 16:48]]
    assert torch.equal(found, torch.stack(expected))
    assert crops(images, [torch.zeros(0, 5)] * 2).shape == (0, 3, 32, 32)


def test_larger_boxes_are_averaged_and_smaller_ones_interpolated():
    images = noise(1, 64, 64)
    whole = crops(images, [torch.tensor([[0.0, 0, 1, 1]])])
    mean = torch.nn.functional.avg_pool2d(images.float(), 2).round()
    assert (whole.float() - mean).abs().max() <= 1
    flat = images.clone()
    flat[..., 10:21, 7:14] = 99
    inside = torch.tensor([[7.5, 10.5, 13.4, 20.2, 64]]) / 64
    assert crops(flat, [inside]).unique().tolist() == [99]


@pytest.mark.parametrize("judge", [boxes(), segmenter(), boxes(None)], ids=["boxes", "map", "without names"])
def test_a_file_holds_all_of_it(judge, tmp_path):
    file = tmp_path / "deep" / "judge.safetensors"
    judge.save(file)
    again = type(judge).load(file)
    assert (again.names, again.size, again.num_classes) == (judge.names, (16, 24), 3)
    assert again.weights == judge.weights
    asked = (noise(), [torch.tensor([[0.1, 0.1, 0.6, 0.9, 1]])] * 3)[: 1 + isinstance(judge, BoxClassifier)]
    assert torch.equal(again(*asked), judge(*asked))
    assert not again.train().network.training


def test_judges_of_other_kinds_are_refused(tmp_path):
    files = {name: tmp_path / f"{name}.safetensors" for name in ("classes", "boxes", "map")}
    save(Classifier(3, 3, 4), (16, 24), files["classes"])
    boxes().save(files["boxes"])
    segmenter().save(files["map"])
    with pytest.raises(CheckpointError, match=r"map.*: holds a segmenter, which --segmenter takes; expected a classif"):
        BoxClassifier.load(files["map"])
    with pytest.raises(CheckpointError, match=r"holds a classifier, which --classifier takes; .* --of boxes"):
        BoxClassifier.load(files["classes"])
    with pytest.raises(CheckpointError, match=r"holds a classifier of boxes, which --boxes-classifier takes; .*of map"):
        MapSegmenter.load(files["boxes"])
    with pytest.raises(CheckpointError, match=r"holds a classifier of boxes, which --boxes-classifier takes"):
        ClassifierFeatures(files["boxes"])
    with pytest.raises(CheckpointError, match=r"none\.safetensors: no such file; expected a segmenter"):
        MapSegmenter.load(tmp_path / "none.safetensors")


def test_what_a_judge_does_not_know_is_refused():
    size = (16, 24)
    for judge in (boxes(), segmenter(), boxes(None)):
        judge.check(3, size, None, None)
        judge.check(3, size, 3, NAMES)
        with pytest.raises(ConfigError, match="it sees pictures of 3 channels, and the samples have 1"):
            judge.check(1, size, None, None)
        with pytest.raises(ConfigError, match="it knows 3 classes, and the model 4"):
            judge.check(3, size, 4, None)
        with pytest.raises(ConfigError, match="it knows 3 classes, and the model 2"):
            judge.check(3, size, None, NAMES[:2])
    with pytest.raises(ConfigError, match="--segmenter: its class 1 is 'dog', and the model's is 'frog'"):
        segmenter().check(3, size, 3, ["cat", "frog", "sun"])
    with pytest.raises(ConfigError, match="trained on pictures of 16 x 24 pixels, and the samples have 24 x 16"):
        segmenter().check(3, (24, 16), 3, NAMES)
    boxes().check(3, (24, 16), 3, NAMES)
