import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from ldm import convolutions
from ldm.autoencoder.lpips import LPIPS
from ldm.autoencoder.networks import ResBlock, Upsample
from ldm.channels_last import LAYOUT
from ldm.convolutions import (
    MANY_CHANNELS,
    MANY_PIXELS,
    convolved,
    convolved_upsampled,
    pointwise,
    transposed_kernel,
    upsampled,
)
from ldm.diffusion.networks import unet

SIDE = 16
MANY = MANY_PIXELS // SIDE**2  # pictures


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def products(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def plain_products(rows, channels_in, channels_out):
    return 2 * rows * (2 * SIDE) ** 2 * channels_in * channels_out * 9


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4), (5, 3)])
def test_the_transposed_convolution_has_its_values_and_gradients(height, width):
    x = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 5, 2 * height, 2 * width, dtype=torch.float64)
    ours = F.conv_transpose2d(x, transposed_kernel(weight), bias, stride=2, padding=1)
    theirs = F.conv2d(upsampled(x), weight, bias, padding=1)
    torch.testing.assert_close(ours, theirs)
    inputs = (x, weight, bias)
    found, wanted = (torch.autograd.grad(one, inputs, upstream) for one in (ours, theirs))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAYOUT])
def test_many_pixels_take_four_ninths_of_the_products(layout):
    convolution = nn.Conv2d(6, 8, 3, padding=1)
    x = torch.randn(MANY, 6, SIDE, SIDE).to(memory_format=layout)
    y = convolved_upsampled(x, convolution)
    torch.testing.assert_close(y, convolution(upsampled(x)), atol=1e-5, rtol=1e-5)
    assert y.is_contiguous(memory_format=layout)
    assert products(lambda: convolved_upsampled(x, convolution)) * 9 == plain_products(MANY, 6, 8) * 4


def test_few_pixels_and_bf16_are_upsampled_first():
    convolution = nn.Conv2d(6, 8, 3, padding=1)
    few, many = torch.randn(MANY - 1, 6, SIDE, SIDE), torch.randn(MANY, 6, SIDE, SIDE)
    assert products(lambda: convolved_upsampled(few, convolution)) == plain_products(MANY - 1, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert products(lambda: convolved_upsampled(many, convolution)) == plain_products(MANY, 6, 8)
    in_bf16 = nn.Conv2d(6, 8, 3, padding=1, dtype=torch.bfloat16)
    assert products(lambda: convolved_upsampled(many.bfloat16(), in_bf16)) == plain_products(MANY, 6, 8)


def operators(call):
    with torch.profiler.profile() as profile:
        call()
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize(("c_in", "c_out"), [(6, 9), (9, 6), (1, 8)])
def test_a_pointwise_convolution_has_its_values_and_gradients(c_in, c_out):
    layer = nn.Conv2d(c_in, c_out, 1, dtype=torch.float64)
    x = torch.randn(3, c_in, 5, 7, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.weight, layer.bias)
    upstream = torch.randn(3, c_out, 5, 7, dtype=torch.float64)
    ours, theirs = pointwise(x, layer), layer(x)
    torch.testing.assert_close(ours, theirs)
    found, wanted = (torch.autograd.grad(one, inputs, upstream) for one in (ours, theirs))
    torch.testing.assert_close(found, wanted)
    assert "aten::baddbmm" in operators(lambda: pointwise(x, layer))


def test_kernels_that_are_large_beside_the_picture_are_convolved():
    """64 x 64 weights, or 4,096, are as many as the (64 + 64) x 32 pixels of both sides."""
    layer = nn.Conv2d(64, 64, 1)
    assert "aten::baddbmm" not in operators(lambda: pointwise(torch.randn(2, 64, 8, 4), layer))
    assert "aten::baddbmm" in operators(lambda: pointwise(torch.randn(2, 64, 8, 5), layer))


def test_pointwise_leaves_channels_last_and_what_is_no_convolution():
    x = torch.randn(2, 4, 8, 8)
    assert pointwise(x, nn.Identity()) is x
    for layer, one in ((nn.Conv2d(4, 8, 1), x.to(memory_format=LAYOUT)), (nn.Conv2d(4, 8, 1, bias=False), x)):
        assert "aten::baddbmm" not in operators(lambda layer=layer, one=one: pointwise(one, layer))
        assert torch.equal(pointwise(one, layer), layer(one))


def test_autocast_computes_both_in_bf16():
    layer, x = nn.Conv2d(4, 8, 1), torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert "aten::baddbmm" in operators(lambda: pointwise(x, layer))
        ours, theirs = pointwise(x, layer), layer(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, atol=2**-6, rtol=2**-7)


def parametrized(layer):
    return parametrizations.weight_norm(layer)


def adapted(layer):
    wrapped = peft.get_peft_model(nn.Sequential(layer), peft.LoraConfig(target_modules=["0"], init_lora_weights=False))
    return wrapped.base_model.model[0]


@pytest.fixture
def narrow_vectors(monkeypatch):
    """As where a processor has AVX2 alone."""
    monkeypatch.setattr(convolutions, "AVX2_ALONE", True)


def in_tiles(layer, x):
    return "_Convolution" in operators(lambda: convolved(x, layer))


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAYOUT])
def test_many_channels_are_convolved_in_tiles(layout, narrow_vectors):
    layer = nn.Conv2d(MANY_CHANNELS, MANY_CHANNELS + 1, 3, padding=1)
    x = torch.randn(4, MANY_CHANNELS, 8, 16).to(memory_format=layout)  # 32 tiles
    assert in_tiles(layer, x)
    torch.testing.assert_close(convolved(x, layer), layer(x), atol=2e-5, rtol=1e-5)
    assert convolved(x, layer).is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    "change",
    [
        {"stride": 2},
        {"padding": 0},
        {"dilation": 2},
        {"padding_mode": "reflect"},
        {"groups": 2},
        {"kernel_size": 1, "padding": 0},
        {"kernel_size": 5, "padding": 2},
    ],
    ids=str,
)
def test_other_convolutions_of_many_channels_are_not(change, narrow_vectors):
    layer = nn.Conv2d(2 * MANY_CHANNELS, 2 * MANY_CHANNELS, **{"kernel_size": 3, "padding": 1} | change)
    x = torch.randn(8, 2 * MANY_CHANNELS, 8, 8)
    assert not in_tiles(layer, x)
    assert torch.equal(convolved(x, layer), layer(x))


@pytest.mark.parametrize(
    ("c_in", "c_out", "shape", "pays"),
    [
        pytest.param(MANY_CHANNELS - 1, 256, (8, 16, 16), False, id="few inputs"),
        pytest.param(256, MANY_CHANNELS - 1, (8, 16, 16), False, id="few outputs"),
        pytest.param(128, 128, (8, 10, 8), False, id="height"),
        pytest.param(128, 128, (8, 8, 10), False, id="width"),
        pytest.param(128, 128, (4, 8, 12), False, id="24 tiles"),
        pytest.param(512, 512, (7, 16, 16), False, id="2340 weights a tile"),
        pytest.param(512, 512, (8, 16, 16), True, id="2048 weights a tile"),
        pytest.param(128, 256, (1, 96, 96), False, id="2359296 outputs"),
        pytest.param(256, 128, (1, 88, 92), True, id="2072576 inputs"),
    ],
)
def test_only_sizes_that_pay_are(c_in, c_out, shape, pays, narrow_vectors):
    assert in_tiles(nn.Conv2d(c_in, c_out, 3, padding=1), torch.randn(shape[0], c_in, *shape[1:])) is pays


def test_nothing_is_convolved_in_tiles_in_bf16_or_with_wider_vectors(narrow_vectors, monkeypatch):
    layer, x = nn.Conv2d(MANY_CHANNELS, MANY_CHANNELS, 3, padding=1), torch.randn(8, MANY_CHANNELS, 8, 8)
    assert in_tiles(layer, x)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert not in_tiles(layer, x)
    assert not in_tiles(layer.bfloat16(), x.bfloat16())
    monkeypatch.setattr(convolutions, "AVX2_ALONE", False)
    assert not in_tiles(layer.float(), x)


def test_blocks_and_lpips_convolve_in_tiles(narrow_vectors):
    x, embedding = torch.randn(2, MANY_CHANNELS, 16, 16), torch.randn(2, 8)
    for layer in (unet.ResBlock(MANY_CHANNELS, MANY_CHANNELS, 8), unet.ResBlock(MANY_CHANNELS, 128, 8, resize=0.5)):
        assert number_in_tiles(lambda layer=layer: layer(x.repeat(4, 1, 1, 1), embedding.repeat(4, 1), None)) == 2
    assert number_in_tiles(lambda: ResBlock(MANY_CHANNELS, MANY_CHANNELS)(x)) == 2
    assert number_in_tiles(lambda: LPIPS(pretrained=False).features(torch.rand(2, 3, 64, 64))) == 4


def test_gradients_reach_the_pictures_through_lpips(narrow_vectors, monkeypatch):
    """Whose activations are made in place."""
    lpips, (a, b) = LPIPS(pretrained=False), torch.rand(2, 2, 3, 64, 64)
    b.requires_grad_()
    (found,) = torch.autograd.grad(lpips(a, b).sum(), b)
    monkeypatch.setattr(convolutions, "AVX2_ALONE", False)
    (wanted,) = torch.autograd.grad(lpips(a, b).sum(), b)
    assert not torch.equal(found, wanted)
    torch.testing.assert_close(found, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=0)


def number_in_tiles(call):
    with torch.profiler.profile() as profile:
        call()
    return sum(event.count for event in profile.key_averages() if event.key == "_Convolution")


def test_torch_compile_and_exported_programs_hold_convolutions(narrow_vectors):
    layer, x = ResBlock(MANY_CHANNELS, MANY_CHANNELS), torch.randn(2, MANY_CHANNELS, 16, 16)
    program = torch.export.export(layer, (x,))
    assert [str(node.target) for node in program.graph.nodes].count("aten.conv2d.default") == 2
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert number_in_tiles(lambda: compiled(x)) == 0
    torch.testing.assert_close(compiled(x), layer(x), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("more", [parametrized, adapted])
@pytest.mark.parametrize("way", [convolved_upsampled, pointwise, convolved])
def test_a_layer_that_is_more_than_its_weight_is_called(more, way, narrow_vectors):
    upsample = way is convolved_upsampled
    size, padding = (1, 0) if way is pointwise else (3, 1)
    layer = more(nn.Conv2d(MANY_CHANNELS, MANY_CHANNELS, size, padding=padding))
    x = torch.randn(MANY, MANY_CHANNELS, SIDE, SIDE)
    assert not operators(lambda: way(x, layer)) & {"aten::conv_transpose2d", "aten::baddbmm", "_Convolution"}
    assert torch.equal(way(x, layer), layer(upsampled(x) if upsample else x))


@pytest.mark.parametrize("layer", [Upsample(6), ResBlock(6, 12)])
def test_exported_programs_hold_convolutions_for_any_size(layer):
    anything = torch.export.Dim.DYNAMIC
    shapes = ({0: anything, 2: anything, 3: anything},)
    program = torch.export.export(layer, (torch.randn(2, 6, 4, 5),), dynamic_shapes=shapes)
    called = {str(node.target) for node in program.graph.nodes}
    assert "aten.conv2d.default" in called
    assert not called & {"aten.conv_transpose2d.input", "aten.baddbmm.default"}
    for rows in (2, MANY, 2 * MANY):
        x = torch.randn(rows, 6, SIDE, SIDE)
        torch.testing.assert_close(program.module()(x), layer(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [Upsample(6), ResBlock(6, 12)])
def test_torch_compile_sees_them_whole(layer):
    x = torch.randn(MANY, 6, SIDE, SIDE)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("layer", [unet.Upsample(8), unet.ResBlock(8, 8, 16, resize=2)])
def test_the_unet_upsamples_so(layer):
    """As one batch, and in halves of too few pixels each: the same but for the products of the four ninths."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x, embedding = torch.randn(MANY, 8, SIDE, SIDE), torch.randn(MANY, 16)
    halves = list(zip(x.chunk(2), embedding.chunk(2), strict=True))
    one = layer(x, embedding, None)
    two = torch.cat([layer(*half, None) for half in halves])
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    saved = products(lambda: [layer(*half, None) for half in halves]) - products(lambda: layer(x, embedding, None))
    assert saved * 9 == plain_products(MANY, 8, 8) * 5
