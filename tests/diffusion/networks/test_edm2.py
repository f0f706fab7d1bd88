"""The magnitude-preserving UNet: published sizes, unit variance everywhere, constrained weights."""

import pytest
import torch

from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.conditioners.classes import ClassOneHot
from ldm.diffusion.networks.edm2 import Block, MagnitudePreservingUNet, MPConv, mp_cat, mp_silu, mp_sum, normalize
from ldm.errors import ConfigError

# Karras et al. 2024, table 2, in millions.
PUBLISHED = {128: 125, 192: 280, 256: 498, 320: 777, 384: 1120, 448: 1520}


@pytest.mark.parametrize(("channels", "millions"), PUBLISHED.items())
def test_published_sizes(channels, millions):
    with torch.device("meta"):
        network = MagnitudePreservingUNet(4, channels, vector_channels=1000)
    count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.005)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return MagnitudePreservingUNet(4, 64, (1, 2), 1, (1,), vector_channels=10).eval()


def inputs(n=3, classes=10):
    generator = torch.Generator().manual_seed(1)
    told = ClassOneHot(classes)({"class_label": torch.arange(n) % classes})
    return torch.randn(n, 4, 8, 8, generator=generator), torch.tensor([-500.0, 0.0, 900.0])[:n], told


def spread(x):
    return x.float().square().mean().sqrt().item()


def test_operations_keep_unit_variance():
    torch.manual_seed(0)
    a, b = torch.randn(200, 32, 8, 8), torch.randn(200, 96, 8, 8)
    assert spread(mp_silu(a)) == pytest.approx(1, rel=0.01)
    assert spread(mp_sum(a, torch.randn_like(a), 0.3)) == pytest.approx(1, rel=0.01)
    both = mp_cat(a, b)
    assert spread(both[:, :32]) * 32**0.5 == pytest.approx(spread(both[:, 32:]) * 96**0.5, rel=0.01)
    assert spread(both) == pytest.approx(1, rel=0.01)
    assert spread(normalize(7 * a, [1])) == pytest.approx(1, rel=0.001)
    for layer in (MPConv(32, 48, 1), MPConv(32, 48, 3)):
        assert spread(layer(a)[:, :, 1:-1, 1:-1]) == pytest.approx(1, rel=0.03)
    assert spread(MPConv(32, 48)(a[..., 0, 0])) == pytest.approx(1, rel=0.03)


def test_a_weight_s_length_does_not_matter():
    layer, x = MPConv(6, 8, 3), torch.randn(2, 6, 5, 5)
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(3)
    torch.testing.assert_close(layer(x), before, rtol=2e-4, atol=1e-5)
    layer.constrain()
    torch.testing.assert_close(layer.weight.flatten(1).square().mean(1), torch.ones(8), rtol=1e-3, atol=0)


def test_activations_have_unit_variance_through_the_network(network):
    seen = []
    for module in network.modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda *args: seen.append(spread(args[2])))
    network(*inputs())
    assert len(seen) == len(network.blocks())
    assert all(0.7 < value < 1.4 for value in seen)


def test_starts_as_zero_and_is_told_everything(network):
    x, level, told = inputs()
    assert not network(x, level, told).any()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "gain" in name:
                parameter.fill_(1.0)
    out = network(x, level, told)
    assert out.shape == x.shape
    torch.testing.assert_close(network(x[:1], level[:1], ClassOneHot(10)({"class_label": torch.tensor([0])})), out[:1])
    other = ClassOneHot(10)({"class_label": torch.tensor([5, 1, 2])})
    assert not torch.allclose(network(x, level, other)[0], out[0])
    assert not torch.allclose(network(x, level + 300, told), out)
    assert not torch.allclose(network(x, level, ClassOneHot(10).null(3)), out)


def test_checkpointing_changes_no_gradient(network):
    x, level, told = inputs()
    gradients = []
    with torch.no_grad():
        network.gain_out.fill_(1.0)
    for switch in (False, True):
        network.checkpointing = switch
        network.zero_grad()
        network(x, level, told).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len([*network.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_height_and_width_may_differ(network):
    x = torch.randn(2, 4, 6, 10)
    vector = torch.randn(2, 10)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.shape == (1,):
                parameter.fill_(0.5)
        made = network(x, torch.tensor([1.0, 2.0]), Conditioning(vector=vector))
    assert made.shape == x.shape
    assert made.std() > 0.1


def test_what_does_not_fit_is_refused(network):
    x, level, told = inputs()
    with pytest.raises(ConfigError, match=r"divisible by 2"):
        network(x[..., :7], level, told)
    with pytest.raises(ConfigError, match=r"vector_channels=10, but .* width 12"):
        network(x, level, ClassOneHot(12)({"class_label": torch.tensor([0, 1, 2])}))
    with pytest.raises(ConfigError, match="reads only a vector"):
        network(x, level, Conditioning(vector=told.vector, tokens=torch.zeros(3, 1, 8)))


def test_one_hot_has_unit_mean_square_and_no_parameters():
    conditioner = ClassOneHot(10)
    vector = conditioner({"class_label": torch.tensor([3, 7])}).vector
    assert (vector.argmax(1).tolist(), spread(vector)) == ([3, 7], pytest.approx(1))
    assert not conditioner.null(2).vector.any()
    assert not conditioner.state_dict()


def test_a_width_that_heads_cannot_share_is_refused():
    with pytest.raises(
        ConfigError, match="channels=96 makes a level with attention 96 wide; expected a multiple of 64"
    ):
        MagnitudePreservingUNet(4, 96, (1, 2), attention_levels=(0,))


def test_an_image_beside_the_latent_is_read_and_none_changes_no_weight():
    torch.manual_seed(0)
    plain = MagnitudePreservingUNet(4, 16, [1, 2], 1, [1], vector_channels=10)
    torch.manual_seed(0)
    same = MagnitudePreservingUNet(4, 16, [1, 2], 1, [1], vector_channels=10, spatial_channels=0)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), same.state_dict().values(), strict=True))
    net = MagnitudePreservingUNet(4, 16, [1, 2], 1, [1], vector_channels=10, spatial_channels=2)
    with torch.no_grad():
        net.gain_out.fill_(1.0)
    x, level, told = inputs()
    image = torch.randn(3, 2, *x.shape[2:])
    one, other = (net(x, level, Conditioning(vector=told.vector, spatial=image + shift)) for shift in (0, 1))
    assert one.shape == x.shape
    assert not torch.allclose(one, other)
    for wrong, width in ((plain, 2), (net, 0)):
        found = Conditioning(vector=told.vector, spatial=image if width else None)
        with pytest.raises(ConfigError, match=rf"spatial_channels={2 - width}, but .* width {width}"):
            wrong(x, level, found)
