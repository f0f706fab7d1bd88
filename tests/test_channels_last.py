import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.autoencoder.lpips import LPIPS
from ldm.autoencoder.networks import Decoder, Encoder
from ldm.channels_last import LAYOUT, _NormOfBf16, fastest_layout
from ldm.layers import GroupNorm
from ldm.runtime.float64 import double

GROUPS, EPS = 4, 1e-6


def laid_out(*shape, dtype):
    return (torch.randn(shape, dtype=torch.float64) + 0.5).to(dtype).to(memory_format=LAYOUT)


def gradients(output, inputs, upstream):
    return torch.autograd.grad(output, inputs, upstream)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_the_gradients_are_those_of_torch():
    x = laid_out(3, 12, 5, 7, dtype=torch.float64).requires_grad_()
    weight, bias = (torch.randn(12, dtype=torch.float64, requires_grad=True) for _ in range(2))
    upstream = laid_out(3, 12, 5, 7, dtype=torch.float64)
    found = gradients(_NormOfBf16.apply(x, weight, bias, GROUPS, EPS), (x, weight, bias), upstream)
    wanted = gradients(F.group_norm(x, GROUPS, weight, bias, EPS), (x, weight, bias), upstream)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(lambda *inputs: _NormOfBf16.apply(*inputs, GROUPS, EPS), (x, weight, bias))


def test_gradients_of_gradients_are_refused():
    x = laid_out(1, 8, 4, 4, dtype=torch.bfloat16).requires_grad_()
    (first,) = torch.autograd.grad(GroupNorm(GROUPS, 8)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


@pytest.mark.parametrize("offset", [0.0, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mean_of_many_deviations_costs_no_precision(offset, dtype):
    """Beside float64 with the same rounded inputs, and no worse than torch's norm in NCHW."""
    x = (laid_out(2, 32, 64, 64, dtype=torch.float64) + offset).to(dtype)
    norm, plain = GroupNorm(GROUPS, 32), nn.GroupNorm(GROUPS, 32)
    true = F.group_norm(double(x), GROUPS)
    with torch.no_grad():
        error, usual = ((double(one) - true).norm() / true.norm() for one in (norm(x), plain(x.contiguous())))
    assert error < 2 * usual
    assert usual < 2**-8 if dtype == torch.bfloat16 else 2**-18


@pytest.mark.parametrize("offset", [0.0, 0.7, 1.5, 4.0, 100.0])
def test_in_bf16_the_gradients_are_as_precise_as_their_type(offset):
    """Beside float64 with the same rounded inputs, also where the mean is many deviations."""
    norm = GroupNorm(GROUPS, 16, eps=EPS)
    nn.init.normal_(norm.weight)
    x = (laid_out(4, 16, 64, 64, dtype=torch.bfloat16) + offset).requires_grad_()
    upstream = laid_out(4, 16, 64, 64, dtype=torch.bfloat16)
    output = norm(x)
    assert "_NormOfBf16" in output.grad_fn.name()
    found = gradients(output, (x, norm.weight, norm.bias), upstream)
    exact = double(x.detach()).requires_grad_()
    weight, bias = (double(one.detach()).requires_grad_() for one in (norm.weight, norm.bias))
    wanted = gradients(F.group_norm(exact, GROUPS, weight, bias, EPS), (exact, weight, bias), double(upstream))
    assert found[0].is_contiguous(memory_format=LAYOUT)
    assert [one.dtype for one in found] == [torch.bfloat16, torch.float32, torch.float32]
    errors = [((double(ours) - true).norm() / true.norm()).item() for ours, true in zip(found, wanted, strict=True)]
    assert errors[0] < 2**-7  # an entry is rounded a few times
    assert max(errors[1:]) < 2**-6  # sums of products and of rows, which are rounded, and cancel in part


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAYOUT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elsewhere_it_is_torchs_norm(layout, dtype):
    x = torch.randn(2, 8, 6, 6).to(dtype).to(memory_format=layout)
    ours, theirs = GroupNorm(GROUPS, 8), nn.GroupNorm(GROUPS, 8)
    assert torch.equal(ours(x), theirs(x))
    if layout != LAYOUT:
        with torch.no_grad():
            assert torch.equal(ours(x), theirs(x))
    x.requires_grad_()
    if dtype == torch.float32 or layout != LAYOUT:
        assert ours(x).grad_fn.name() == theirs(x).grad_fn.name()
    assert [*ours.state_dict()] == [*theirs.state_dict()]


def test_the_layout_is_chosen_by_what_is_computed():
    x = torch.randn(2, 3, 8, 8)
    assert fastest_layout(x) is x  # float32, with gradients
    assert fastest_layout(x.to("meta")).is_contiguous()
    with torch.no_grad():
        assert fastest_layout(x).is_contiguous(memory_format=LAYOUT)
    with torch.autocast("cpu", torch.bfloat16):
        assert fastest_layout(x).is_contiguous(memory_format=LAYOUT)
    assert fastest_layout(x.bfloat16()).is_contiguous(memory_format=LAYOUT)
    assert torch.equal(fastest_layout(x), x)


@pytest.mark.parametrize("network", [Encoder(1, 16, [1, 2], 1, 4), Decoder(1, 16, [1, 2], 1, 1)])
def test_pictures_and_latents_of_one_channel_are_laid_out_too(network):
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    seen = []
    for norm in norms:
        norm.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].is_contiguous(), output.stride(1))))
    with torch.no_grad():
        network(torch.rand(2, 1, 16, 16))
    assert seen == [(False, 1)] * len(norms)


def make(kind):
    torch.manual_seed(0)
    return {
        "encoder": lambda: Encoder(3, 16, [1, 2], 1, 4, attention_levels=[1]),
        "decoder": lambda: Decoder(3, 16, [1, 2], 1, 4, attention_levels=[1]),
        "lpips": lambda: LPIPS(pretrained=False),
    }[kind]()


def inputs_of(kind):
    return {
        "encoder": [torch.rand(2, 3, 32, 32)],
        "decoder": [torch.randn(2, 4, 16, 16)],
        "lpips": [torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)],
    }[kind]


@pytest.mark.parametrize("kind", ["encoder", "decoder", "lpips"])
def test_networks_compute_the_same_in_either_layout(kind, monkeypatch):
    """Without gradients in float32, and with them in bf16, where both roundings are equally far from float32."""
    network, inputs = make(kind), inputs_of(kind)
    inputs[0].requires_grad_()

    def gradient(bf16):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = network(*inputs)
        return torch.autograd.grad(output.float().square().sum(), inputs[0])[0]

    exact, ours = gradient(False), gradient(True)
    with torch.no_grad():
        fast = network(*inputs)
    module = __import__(type(network).__module__, fromlist=["fastest_layout"])
    monkeypatch.setattr(module, "fastest_layout", lambda x: x)
    with torch.no_grad():
        plain = network(*inputs)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
    error, usual = ((one - exact).norm() / exact.norm() for one in (ours, gradient(True)))
    assert error < 2 * usual
    assert usual < 0.2
