"""What every feature space of a frozen network does, on a network that averages colors."""

import pytest
import torch
from torch import nn

from ldm.errors import ConfigError
from ldm.evaluation.features.base import MAIN, FrozenNetwork
from ldm.evaluation.features.resize import Clean


class Mean(FrozenNetwork):
    def __init__(self, channels: int = 3) -> None:
        network = nn.Linear(channels, 5)
        super().__init__(network, "mean-layer", "0" * 64, {MAIN: slice(0, 5)}, Clean(16), channels)

    def extract(self, pixels):
        assert pixels.shape[1:] == (self.channels, 16, 16)
        return self.network(pixels.mean((2, 3)) / 255)


def test_pictures_become_rows_of_float32(pictures):
    features = Mean()
    seen = features(pictures)
    assert seen.shape == (4, 5)
    assert seen.dtype == torch.float32
    assert not seen.requires_grad
    assert features.name == "mean-layer/clean-16"


def test_gray_pictures_are_repeated(pictures):
    features = Mean()
    gray = pictures[:, :1]
    assert torch.equal(features(gray), features(gray.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("channels", [2, 4])
def test_pictures_of_other_channels_are_refused(channels):
    images = torch.zeros(2, channels, 16, 16, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=rf"mean-layer/clean-16 are of pictures of 1 or 3 channels, found {channels}"):
        Mean()(images)


def test_colors_are_refused_by_a_network_of_gray_pictures(pictures):
    with pytest.raises(ConfigError, match=r"of gray pictures \(1 channel\), found 3"):
        Mean(channels=1)(pictures)


def test_floats_are_no_pictures(pictures):
    with pytest.raises(TypeError, match=r"uint8, 0 to 255, not torch\.float32"):
        Mean()(pictures.float())


def test_the_network_stays_frozen_and_in_eval_mode():
    features = Mean().train()
    assert not features.training
    assert not any(parameter.requires_grad for parameter in features.parameters())


def test_precision_is_that_of_no_surroundings(pictures):
    features = Mean()
    expected = features(pictures)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(features(pictures), expected)
