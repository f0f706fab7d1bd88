import pytest
import torch
from safetensors.torch import save_file

from ldm.errors import CheckpointError, ConfigError
from ldm.evaluation.agreement import accuracy
from ldm.evaluation.features import classifier
from ldm.evaluation.features.base import LOGITS, MAIN
from ldm.evaluation.features.classifier import (
    Classifier,
    ClassifierFeatures,
    judge,
    save,
    train_classifier,
    unit_range,
)
from ldm.runtime.precision import Answer
from ldm.weights.digest import weight_hash


def striped(number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy 16 px images of two classes: stripes across or down."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (number,), generator=generator)
    across = (torch.arange(16) // 2 % 2).float().expand(16, 16) * 120
    images = torch.where(labels[:, None, None] == 0, across, across.T)
    noise = torch.rand(number, 16, 16, generator=generator) * 130
    return (images + noise).to(torch.uint8)[:, None], labels


@pytest.fixture(scope="module")
def trained():
    return train_classifier(*striped(256, seed=0), 2, epochs=8, batch_size=32, width=8)


def test_a_classifier_learns_what_it_is_shown(trained):
    images, labels = striped(100, seed=1)
    assert accuracy(judge(trained, images).logits, labels) > 0.95


def test_training_is_a_function_of_its_arguments(trained):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = train_classifier(*striped(256, seed=0), 2, epochs=8, batch_size=32, width=8)
    assert torch.equal(torch.get_rng_state(), before)
    for ours, theirs in zip(trained.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    other = train_classifier(*striped(256, seed=0), 2, epochs=1, batch_size=32, width=8, seed=1)
    assert not torch.equal(other.head.weight, trained.head.weight)


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_used_only_where_it_is_not_emulated(native, monkeypatch):
    seen, scaled = set(), classifier.unit_range

    def watched(images):
        seen.add(torch.is_autocast_enabled("cpu"))
        return scaled(images)

    monkeypatch.setattr(classifier, "computes_bf16", lambda kind: Answer(native, "as the test says"))
    monkeypatch.setattr(classifier, "unit_range", watched)
    images = torch.zeros(4, 1, 16, 16, dtype=torch.uint8)
    train_classifier(images, torch.zeros(4, dtype=torch.int64), 2, epochs=1, batch_size=4, width=8)
    assert seen == {native}


def test_features_are_the_input_of_the_last_layer(trained):
    images, _ = striped(10, seed=2)
    seen = judge(trained, images)
    assert seen.features.shape == (10, 32)
    torch.testing.assert_close(seen.logits, seen.features @ trained.head.weight.T + trained.head.bias)
    torch.testing.assert_close(seen.logits, trained(unit_range(images)))


def test_an_image_is_judged_apart_from_its_batch(trained):
    images, _ = striped(10, seed=2)
    torch.testing.assert_close(judge(trained, images, batch_size=3).features, judge(trained, images).features)
    assert not judge(trained, images).features.requires_grad


def test_bytes_become_the_range_of_the_autoencoder():
    assert unit_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_fewer_images_than_a_batch_are_still_learnt_from():
    model = train_classifier(*striped(10, seed=3), 2, epochs=1, batch_size=32, width=8)
    assert isinstance(model, Classifier)
    assert not model.training


def test_a_saved_classifier_is_a_feature_space(trained, tmp_path):
    file = tmp_path / "deep" / "stripes.safetensors"
    save(trained, 16, file)
    features = ClassifierFeatures(file)
    images, _ = striped(10, seed=2)
    expected, seen = judge(trained, images), features(images)
    assert torch.equal(seen[:, features.parts[MAIN]], expected.features)
    assert torch.equal(seen[:, features.parts[LOGITS]], expected.logits)
    assert features.name == "classifier/clean-16"
    assert features.weights == weight_hash(trained.state_dict())
    large = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert features(large).shape == seen.shape
    with pytest.raises(ConfigError, match="classifier/clean-16 are of gray pictures"):
        features(images.expand(-1, 3, -1, -1))


def test_a_file_that_holds_no_classifier_is_refused(tmp_path):
    file = tmp_path / "other.safetensors"
    with pytest.raises(CheckpointError, match=r"other\.safetensors: no such file"):
        ClassifierFeatures(file)
    save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match=r"other\.safetensors: not the weights of a classifier that ldm saved"):
        ClassifierFeatures(file)
    file.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"other\.safetensors: cannot be read as safetensors"):
        ClassifierFeatures(file)
