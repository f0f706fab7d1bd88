"""Weights that are converted once: the bits of autocast, which converts them at every call."""

import copy

import pytest
import torch
from torch import nn

from ldm.autoencoder.networks import Decoder
from ldm.autoencoder.tiny import TinyDecoder
from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.networks.dit import DiT
from ldm.diffusion.networks.edm2 import MagnitudePreservingUNet
from ldm.diffusion.networks.unet import UNet
from ldm.runtime.autocast import convert_weights

LEVELS = {"model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_levels": [1]}
STAGE = {"base_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "latent_channels": 4}
X, LEVEL = (3, 4, 16, 16), torch.tensor([1.0, 200.0, 900.0])
_RANDOM = torch.Generator().manual_seed(0)
VECTOR, TOKENS = (torch.randn(shape, generator=_RANDOM) for shape in ((3, 8), (3, 5, 12)))

NETWORKS = {
    "unet": (lambda: UNet(4, num_heads=2, vector_channels=8, **LEVELS), {"vector": VECTOR}),
    "unet of tokens": (lambda: UNet(4, num_heads=2, context_dim=12, **LEVELS), {"tokens": TOKENS}),
    "dit": (lambda: DiT(4, 2, 32, 2, 2, vector_channels=8), {"vector": VECTOR}),
    "modern dit": (
        lambda: DiT(4, 2, 32, 2, 2, context_dim=12, rms_norm=True, swiglu=True, rope=True, qk_norm=True),
        {"tokens": TOKENS},
    ),
    "edm2": (lambda: MagnitudePreservingUNet(4, vector_channels=8, **LEVELS), {"vector": VECTOR}),
}
DECODERS = {
    "decoder": lambda: Decoder(3, attention_levels=[1], **STAGE),
    "tiny decoder": lambda: TinyDecoder(channels=16, num_blocks=(1, 1)),
}


def randomized(network):
    """Zeros at the start of training would hide what comes before them."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network.requires_grad_(False).eval()


def check(network, *inputs):
    converted = copy.deepcopy(network)
    convert_weights(converted, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = network(*inputs), converted(*inputs)
    assert expected.float().std() > 0.01
    assert not torch.equal(expected.float(), network(*inputs))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_give_the_bits_of_autocast(name):
    make, slots = NETWORKS[name]
    check(randomized(make()), torch.randn(X), LEVEL, Conditioning(**slots))


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_give_the_bits_of_autocast(name):
    check(randomized(DECODERS[name]()), torch.randn(X))


class Own(nn.Linear):
    """A layer of another kind, which may use its weight in any way."""


def test_only_the_weights_of_plain_layers_are_converted():
    table, head = nn.Embedding(7, 4), nn.Linear(4, 7)
    head.weight = table.weight
    network = nn.Sequential(
        table, nn.Linear(4, 4), nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2)), Own(2, 2), head
    )
    convert_weights(network, torch.bfloat16)
    types = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    converted = {"1.weight", "2.0.weight", "4.weight"}
    assert types == {name: torch.bfloat16 if name in converted else torch.float32 for name in types}
    assert not any(network[place].weight.requires_grad for place in (1, 4))
