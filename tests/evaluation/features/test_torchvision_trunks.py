import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models
from torchvision.transforms.functional import gaussian_blur, normalize, pil_to_tensor

from ldm.data.sources.openmoji import OpenMoji
from ldm.errors import CheckpointError
from ldm.evaluation.distances.frechet import frechet_distance
from ldm.evaluation.features.base import MAIN
from ldm.evaluation.features.choose import choose
from ldm.evaluation.features.resize import Clean
from ldm.evaluation.features.torchvision_trunks import ALEXNET, VGG16, TorchvisionTrunk
from ldm.evaluation.moments import Moments

TRUNKS = {"alexnet": (ALEXNET, models.alexnet), "vgg16": (VGG16, models.vgg16)}


@pytest.fixture(scope="module", params=TRUNKS)
def both(request, tmp_path_factory):
    """A trunk, torchvision's layers with random weights, and those in the formats of torchvision and of LPIPS."""
    trunk, make = TRUNKS[request.param]
    with torch.device("meta"):
        layers = make().features
    layers = layers.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, generator=generator)
            nn.init.normal_(layer.bias, std=0.1, generator=generator)
    folder = tmp_path_factory.mktemp(trunk.name)
    state = {f"features.{name}": tensor for name, tensor in layers.state_dict().items()}
    whole, lpips = folder / "whole.pth", folder / "lpips.safetensors"
    torch.save({**state, "classifier.1.weight": torch.zeros(2, 2)}, whole)
    save_file({**state, "lin0.model.1.weight": torch.ones(1, 64, 1, 1)}, lpips)
    return trunk, layers, whole, lpips


def test_features_are_the_last_convolution_averaged(both, pictures):
    trunk, layers, whole, _ = both
    features = TorchvisionTrunk(trunk, whole)
    pixels = normalize(Clean(128)(pictures) / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = layers[:-1](pixels).mean((2, 3))
    seen = features(pictures)
    assert seen.shape == (4, trunk.width)
    assert seen[:, features.parts[MAIN]].std() > 1e-3
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)
    assert features.name == f"{trunk.name}-{trunk.layer}/clean-128"


def test_both_files_are_one_space(both, pictures):
    trunk, _, *files = both
    one, other = (TorchvisionTrunk(trunk, file) for file in files)
    assert (one.name, one.weights) == (other.name, other.weights)
    assert torch.equal(one(pictures), other(pictures))


def test_a_size_makes_another_space(both, pictures):
    trunk, _, whole, _ = both
    small = TorchvisionTrunk(trunk, whole, size=64)
    assert small.name.endswith("/clean-64")
    assert not torch.equal(small(pictures), TorchvisionTrunk(trunk, whole)(pictures))


def test_other_weights_are_refused(tmp_path):
    file = tmp_path / "other.pth"
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, file)
    with pytest.raises(CheckpointError, match=r"other\.pth: not the weights of torchvision's alexnet"):
        TorchvisionTrunk(ALEXNET, file)


@pytest.mark.slow
def test_real_features_order_pictures_by_how_real_they_are(tmp_path):
    features = choose("alexnet")
    emoji = OpenMoji(size=64, folder=tmp_path, validation_fraction=0, skin_tones=False)
    order = torch.randperm(len(emoji), generator=torch.Generator().manual_seed(0))[:160].tolist()
    images = torch.stack([pil_to_tensor(emoji[index]["image"].convert("RGB")) for index in order])
    reference, real = images[:80], images[80:]
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(1))

    def moments(pictures):
        return Moments.of(torch.cat([features(batch) for batch in pictures.split(20)]))

    def distance(pictures):
        return frechet_distance(moments(pictures), known)

    known = moments(reference)
    blurred = [distance(gaussian_blur(real, 9, sigma)) for sigma in (1.0, 2.0)]
    noisy = [distance((real + level * noise).clamp(0, 255).to(torch.uint8)) for level in (24, 64)]
    collapsed = distance(real[:3].repeat(20, 1, 1, 1))
    same = distance(real)
    assert same < blurred[0] < blurred[1]
    assert same < noisy[0] < noisy[1]
    assert same < collapsed
