import pytest
import torch
import torch.nn.functional as F

from ldm import winograd
from ldm.winograd import convolve


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("part", [1, 2 * 7 * 8 * 12, winograd.PART])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("channels_in", "channels_out"), [(5, 7), (7, 5), (1, 1)])
def test_its_values_and_gradients_are_those_of_a_convolution(part, layout, channels_in, channels_out, monkeypatch):
    """With each picture by itself, two and one, and all at once."""
    monkeypatch.setattr(winograd, "PART", part)
    x = torch.randn(3, channels_in, 8, 12, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    weight = torch.randn(channels_out, channels_in, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(channels_out, dtype=torch.float64, requires_grad=True)
    ours, theirs = convolve(x, weight, bias), F.conv2d(x, weight, bias, padding=1)
    torch.testing.assert_close(ours, theirs)
    assert ours.is_contiguous(memory_format=layout)
    inputs, upstream = (x, weight, bias), torch.randn_like(theirs)
    found, wanted = (torch.autograd.grad(one, inputs, upstream) for one in (ours, theirs))
    torch.testing.assert_close(found, wanted)


def test_one_tile_without_a_bias():
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    ours, theirs = convolve(x, weight, None), F.conv2d(x, weight, padding=1)
    torch.testing.assert_close(ours, theirs)
    found, wanted = (torch.autograd.grad(one.square().sum(), (x, weight)) for one in (ours, theirs))
    torch.testing.assert_close(found, wanted)


def test_a_slice_of_the_channels_and_gradients_in_any_layout():
    x = torch.randn(2, 9, 8, 8, dtype=torch.float64)[:, 2:6].requires_grad_()
    weight = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    ours, theirs = convolve(x, weight, None), F.conv2d(x, weight, padding=1)
    torch.testing.assert_close(ours, theirs)
    for upstream in (
        torch.randn(8, 8, 6, 2, dtype=torch.float64).permute(3, 2, 1, 0),
        torch.ones(()).expand(2, 6, 8, 8),
    ):
        found, wanted = (torch.autograd.grad(y, x, upstream.to(y.dtype), retain_graph=True) for y in (ours, theirs))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("trained", "operators"), [("x", {"bmm"}), ("weight", {"baddbmm_"}), ("bias", set())])
def test_only_the_gradient_that_is_asked_for_is_made(trained, operators):
    inputs = {"x": torch.randn(2, 4, 8, 8), "weight": torch.randn(6, 4, 3, 3), "bias": torch.randn(6)}
    inputs[trained].requires_grad_()
    y = convolve(**inputs)
    with torch.profiler.profile() as profile:
        (found,) = torch.autograd.grad(y.sum(), inputs[trained])
    (wanted,) = torch.autograd.grad(F.conv2d(**inputs, padding=1).sum(), inputs[trained])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)
    called = {event.key for event in profile.key_averages()}
    assert {name for name in ("bmm", "baddbmm_") if f"aten::{name}" in called} == operators


def test_autocast_around_the_backward_pass_changes_nothing():
    x, weight = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(6, 4, 3, 3, requires_grad=True)
    y = convolve(x, weight, None)
    wanted = torch.autograd.grad(y.sum(), (x, weight), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y.sum(), (x, weight))
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_float32_is_rounded_about_ten_times_as_much():
    x, weight = torch.randn(2, 256, 16, 16), torch.randn(256, 256, 3, 3) / 48
    precise = F.conv2d(x.double(), weight.double(), padding=1)
    errors = [
        (y - precise).norm() / precise.norm() for y in (convolve(x, weight, None), F.conv2d(x, weight, padding=1))
    ]
    assert errors[0] < 4e-6
    assert errors[1] < 1e-6


def test_it_cannot_be_differentiated_twice():
    weight = torch.randn(2, 2, 3, 3, requires_grad=True)
    y = convolve(torch.randn(1, 2, 4, 4, requires_grad=True), weight, None)
    (gradient,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
