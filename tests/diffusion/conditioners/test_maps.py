"""Semantic maps: latent diffusion's rescaler by its own operations, unlabeled pixels, and a network that reads them."""

import pytest
import torch
import torch.nn.functional as F

from ldm.diffusion.conditioners.base import require_conditioner
from ldm.diffusion.conditioners.maps import SemanticMap
from ldm.diffusion.networks.dit import DiT
from ldm.errors import ConfigError
from tests.diffusion.conditioners.reading import errors, unet

CLASSES = 5


def batch(n=2, height=16, width=24, factor=4, dtype=torch.uint8, device="cpu"):
    classes = torch.randint(0, CLASSES, (n, height, width), generator=torch.Generator().manual_seed(0)).to(dtype)
    return {"map": classes.to(device), "latent": torch.empty(n, 4, height // factor, width // factor, device="meta")}


def rescaled(classes, weight, stages, mode):
    """SpatialRescaler of CompVis/latent-diffusion: halvings of the one-hot, then a 1x1 convolution without bias."""
    x = F.one_hot(classes.long(), CLASSES).movedim(-1, 1).float()
    for _ in range(stages):
        x = F.interpolate(x, scale_factor=0.5, mode=mode)
    return F.conv2d(x, weight.T[:, :, None, None])


@pytest.mark.parametrize(("nearest", "mode"), [(False, "bilinear"), (True, "nearest")])
@pytest.mark.parametrize("stages", [0, 1, 2, 3])
def test_is_the_rescaler_of_latent_diffusion(nearest, mode, stages):
    conditioner, rows = SemanticMap(CLASSES, 3, nearest), batch(factor=2**stages)
    require_conditioner(conditioner)
    found = conditioner(rows).spatial
    expected = rescaled(rows["map"], conditioner.table.weight, stages, mode)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    assert conditioner.table.weight.grad.any()


def test_the_one_hot_itself():
    found = SemanticMap(CLASSES, None)(rows := batch()).spatial
    torch.testing.assert_close(found, rescaled(rows["map"], torch.eye(CLASSES), 2, "bilinear"))
    assert not [*SemanticMap(CLASSES, None).parameters()]


@pytest.mark.parametrize("channels", [3, None])
@pytest.mark.parametrize(
    ("classes", "dtype", "unlabeled"),
    [
        (5, torch.uint8, 255),
        (5, torch.int16, -1),
        (5, torch.int64, 255),
        (300, torch.int16, -1),
        (300, torch.int64, -7),
    ],
)
def test_pixels_without_a_label_are_zeros_as_the_null_is(channels, classes, dtype, unlabeled):
    conditioner = SemanticMap(classes, channels)
    rows = batch(factor=1, dtype=dtype)
    rows["map"][0, 0, 0] = unlabeled
    rows["map"][1] = unlabeled
    found = conditioner(rows).spatial
    assert not found[0, :, 0, 0].any()
    assert not found[1].any()
    assert found[0].abs().sum(0).count_nonzero() == 16 * 24 - 1
    null = conditioner.null(2).spatial
    assert null.shape == (2, channels or classes, 1, 1)
    assert not null.any()
    assert conditioner(rows).cat(conditioner.null(2)).spatial.shape == (4, channels or classes, 16, 24)


def test_255_is_a_class_where_there_are_more():
    found = SemanticMap(300)({"map": torch.full((1, 4, 4), 255, dtype=torch.int16), "latent": torch.empty(1, 1, 4, 4)})
    assert found.spatial.any()


def test_a_mirrored_map_is_the_mirrored_image():
    conditioner, rows = SemanticMap(CLASSES), batch()
    mirrored = conditioner(rows | {"map": rows["map"].flip(-1)}).spatial
    torch.testing.assert_close(mirrored, conditioner(rows).spatial.flip(-1))


def test_without_values_and_in_half_precision():
    with torch.device("meta"):
        conditioner, hot = SemanticMap(CLASSES), SemanticMap(CLASSES, None)
    assert conditioner(batch(device="meta")).spatial.shape == (2, 3, 4, 6)
    assert hot(batch(device="meta")).spatial.shape == (2, CLASSES, 4, 6)
    half = SemanticMap(CLASSES).bfloat16()
    assert half(batch()).spatial.dtype == half.null(1).spatial.dtype == torch.bfloat16
    assert SemanticMap(CLASSES, None).half()(batch()).spatial.dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"map": None}, r"condition map: expected a tensor \(any, any\) for each row, found none; data.params.aligned"),
        ({"map": torch.zeros(2, 3, 16, 24)}, r"condition map: .*found \(3, 16, 24\)"),
        ({"map": torch.full((2, 16, 24), 5)}, "map: found class 5, expected 0 to 4"),
        ({"map": torch.zeros(2, 18, 24, dtype=torch.uint8)}, "18 x 24 pixels, expected whole multiples .* 4 x 6"),
        ({"map": torch.zeros(2, 2, 3, dtype=torch.uint8)}, "2 x 3 pixels, expected whole multiples"),
        ({"latent": None}, "a batch's latent: expected"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        SemanticMap(CLASSES)(batch() | change)


def painted(random):
    """Coarse maps, and the latents that they decide: each class has its color."""
    palette = torch.randn(CLASSES, 3, generator=torch.Generator().manual_seed(1))
    coarse = torch.randint(0, CLASSES, (32, 4, 4), generator=random)
    classes = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)
    return {"map": classes.to(torch.uint8), "latent": F.avg_pool2d(palette[classes].movedim(-1, 1), 2)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_a_denoiser_reads_it(kind):
    torch.manual_seed(0)
    network = unet(3, spatial_channels=3) if kind == "unet" else DiT(3, 2, 64, 2, 4, spatial_channels=3)
    told, shuffled = errors(network, SemanticMap(CLASSES), painted, 150)
    assert told < 0.1
    assert shuffled > 1
