"""PatchGAN: size, receptive field, normalisation."""

import pytest
import torch
from torch import nn

from ldm.autoencoder.discriminator import PatchDiscriminator
from ldm.errors import ConfigError


def test_published_size_and_output():
    # Convolutions without bias but for first and last, and two numbers a channel for each norm.
    discriminator = PatchDiscriminator()
    assert (
        sum(parameter.numel() for parameter in discriminator.parameters())
        == 3_136 + 131_328 + 524_800 + 2_098_176 + 8_193
    )
    assert discriminator(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_receptive_field(layers, field):
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(1, 4, layers, norm=nn.Identity)
    images = torch.randn(1, 1, 128, 128, requires_grad=True)
    logits = discriminator(images)
    centre = logits.shape[-1] // 2
    logits[0, 0, centre, centre].backward()
    rows = images.grad[0, 0].abs().sum(1).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == field


def test_initial_weights():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator()
    for layer in discriminator.layers:
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 1000:
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.weight.mean().item() == pytest.approx(1.0, abs=0.02)
            assert not layer.bias.any()


def test_norm_decides_whether_a_batch_may_be_split():
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)

    def gap(discriminator: PatchDiscriminator) -> float:
        halves = torch.cat([discriminator(images[:2]), discriminator(images[2:])])
        return (discriminator(images) - halves).abs().max().item()

    assert gap(PatchDiscriminator(3, 8)) > 1e-3
    assert gap(PatchDiscriminator(3, 8, norm=lambda channels: nn.InstanceNorm2d(channels, affine=True))) < 1e-6


@pytest.mark.parametrize("layers", range(5))
def test_pictures_too_small_are_refused_with_what_fits(layers):
    """By torch's own convolutions: the smallest size passes, one pixel less does not."""
    smallest = 4 if layers == 0 else 3 * 2**layers
    network = PatchDiscriminator(channels=4, layers=layers).eval()
    assert network(torch.zeros(1, 3, smallest, smallest + 3)).shape[1] == 1
    with pytest.raises(RuntimeError, match="size"):
        network.layers(torch.zeros(1, 3, smallest - 1, smallest + 3))
    fits = f"at most {layers - 1} can" if layers > 1 or layers == 1 else "no number of layers can"
    with pytest.raises(ConfigError, match=fits):
        network(torch.zeros(1, 3, smallest - 1, smallest + 3))


def test_three_layers_on_sixteen_pixels():
    with pytest.raises(
        ConfigError, match="layers=3 need pictures of 24 pixels or more, found 16x16, where at most 2 can"
    ):
        PatchDiscriminator()(torch.zeros(1, 3, 16, 16))
