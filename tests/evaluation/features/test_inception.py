"""Against torch-fidelity itself, on the same file: random weights in the format of the published ones."""

import pytest
import torch
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from ldm.errors import CheckpointError
from ldm.evaluation.features.base import LOGITS, MAIN, SPATIAL
from ldm.evaluation.features.inception import Inception
from ldm.evaluation.features.resize import Clean


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("inception", ["2048"])
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)  # torch's own would let the signal die within a few layers
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.running_mean, std=0.1)
        nn.init.normal_(network.fc.bias)
    path = tmp_path_factory.mktemp("weights") / "weights-inception.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def few(pictures):
    return pictures[:2]


@pytest.fixture(scope="module")
def inception(file):
    return Inception(file)


@pytest.fixture(scope="module")
def seen(inception, few):
    return inception(few)


def test_features_and_logits_are_those_of_torch_fidelity(inception, file, few, seen):
    theirs = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(file))
    features, logits = theirs(few)
    assert features.std() > 1e-3
    assert torch.equal(seen[:, inception.parts[MAIN]], features)
    assert torch.equal(seen[:, inception.parts[LOGITS]], logits)


def test_spatial_features_are_seven_channels_of_a_layer_with_channels_last(inception, file, few, seen):
    theirs, found = FeatureExtractorInceptionV3("inception", ["2048"], str(file)), []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda *call: found.append(call[-1]))
    theirs(few)
    expected = found[0].numpy().transpose(0, 2, 3, 1)[..., :7].reshape(2, -1)  # TensorFlow's order, as ADM's evaluator
    assert expected.shape == (2, 2023)
    assert torch.equal(seen[:, inception.parts[SPATIAL]], torch.from_numpy(expected))


def test_parts_cover_everything_once(inception, seen):
    assert [inception.parts[name] for name in (MAIN, LOGITS, SPATIAL)] == [
        slice(0, 2048),
        slice(2048, 3056),
        slice(3056, 5079),
    ]
    assert seen.shape == (2, 5079)


def test_the_resize_rule_is_part_of_the_name(inception, file, few, seen):
    clean = Inception.clean(file)
    assert (inception.name, clean.name) == ("inception-2015/tf1-299", "inception-2015/clean-299")
    assert clean.weights == inception.weights
    resized = Clean(299)(few).round().to(torch.uint8)  # of the size that torch-fidelity does not resize
    assert not torch.equal(clean(few), seen)
    assert torch.equal(clean(resized), inception(resized))


def test_other_weights_are_refused(tmp_path, file):
    other = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, other)
    with pytest.raises(CheckpointError, match=r"other\.pth: not the weights of torch-fidelity's Inception"):
        Inception(other)
    other.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"other\.pth: cannot be read"):
        Inception(other)
