"""Latents in windows: the whole, where what is denoised is the same for each; one window is no windows."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from ldm.autoencoder.tiling import Tiling, decode
from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.conditioners.given import Field, Given
from ldm.diffusion.networks.dit import DiT
from ldm.diffusion.networks.edm2 import MagnitudePreservingUNet
from ldm.diffusion.networks.unet import UNet
from ldm.diffusion.objectives import Flow
from ldm.errors import ConfigError
from ldm.images import to_arrays
from ldm.sampling.generate import generate
from ldm.sampling.guidance import Guidance
from ldm.sampling.pipeline import Pipeline
from ldm.sampling.tiled import tiled


@pytest.fixture(scope="module")
def pipeline(runs):
    return Pipeline.load(runs.diffusion)


def pictures(pipeline, tile, size, seeds=(1, 2), **options):
    conditions = [{"class_label": 0}, {"class_label": 2}]
    made = generate(pipeline, seeds, conditions, steps=3, guidance=Guidance(2.0), size=size, tile=tile, **options)
    return np.stack([one.image for one in made]).astype(int)


def test_a_denoiser_of_single_positions_gives_the_whole_and_reads_its_conditions_there():
    """With spatial conditions cut with their window, of which a null's may have sides of 1."""
    calls = []

    def denoise(x, t, conditioning):
        calls.append(x.shape)
        assert x.shape[2:] == conditioning.spatial.shape[2:]
        return x * t + conditioning.spatial + conditioning.vector[..., None, None] + conditioning.tokens.mean()

    x, t = torch.randn(2, 4, 20, 28), torch.tensor(0.5)
    told = Conditioning(torch.randn(2, 4), torch.ones(2, 3, 4), torch.randn(2, 4, 20, 28))
    cut = tiled(denoise, Tiling((32, 32), 8).windows((80, 112), 4), at_once=5)
    torch.testing.assert_close(cut(x, t, told), denoise(x, t, told))
    assert {tuple(shape[1:]) for shape in calls[:-1]} == {(4, 8, 8)}
    assert max(shape[0] for shape in calls[:-1]) == 5
    null = replace(told, spatial=torch.zeros(2, 4, 1, 1))
    torch.testing.assert_close(cut(x, t, null), denoise(x, t, replace(null, spatial=torch.zeros(2, 4, 20, 28))))


SIZES = {"model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1}
NETWORKS = {
    "unet": lambda: UNet(in_channels=3, spatial_channels=2, attention_levels=[1], num_heads=2, **SIZES),
    "dit": lambda: DiT(3, 2, hidden_size=32, depth=1, num_heads=2, spatial_channels=2),
    "edm2": lambda: MagnitudePreservingUNet(3, attention_levels=[1], **SIZES),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_each_network_sees_windows_as_it_saw_its_training_latents(name):
    """Where windows do not overlap with another's weights, the estimate is that of the window alone."""
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    objective, t = Flow(), torch.tensor(0.5)
    x, spatial = torch.randn(1, 3, 8, 14), None if name == "edm2" else torch.randn(1, 2, 8, 14)  # it reads none
    denoise = partial(objective.denoise, network)
    windows = Tiling((8, 8), 2).windows((8, 14), 1)
    assert len(windows) == 2
    with torch.no_grad():
        found = tiled(denoise, windows, 8)(x, t, Conditioning(spatial=spatial))
        for window, kept in zip(windows, (slice(0, 6), slice(8, 14)), strict=True):
            alone = denoise(window.of(x), t, Conditioning(spatial=None if spatial is None else window.of(spatial)))
            place = slice(kept.start - window.columns.start, kept.stop - window.columns.start)
            torch.testing.assert_close(found[..., kept], alone[..., place], atol=1e-5, rtol=1e-5)


def test_one_window_is_no_windows_bit_for_bit(pipeline):
    assert np.array_equal(pictures(pipeline, Tiling((16, 16), 8), None), pictures(pipeline, None, None, batch_size=1))


def test_a_large_picture_depends_on_its_seed_alone_and_not_on_how_many_tiles_are_made_at_once(pipeline):
    tile, size = Tiling((16, 16), 8), (24, 40)
    made = pictures(pipeline, tile, size)
    assert made.shape == (2, 24, 40, 3)
    assert np.array_equal(made, pictures(pipeline, tile, size))
    assert np.abs(made - pictures(pipeline, replace(tile, at_once=3), size)).max() <= 1
    assert np.abs(made[1] - made[0]).max() > 8


def test_the_network_never_meets_more_than_a_window(pipeline, monkeypatch):
    """A whole that it could not divide is fine: 28 pixels are 7 positions, an odd number."""
    network, seen = pipeline.denoiser["network"], []
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda x, *rest: seen.append(x.shape) or forward(x, *rest))
    tile = Tiling((16, 16), 8, at_once=4)
    assert pictures(pipeline, tile, (28, 28)).shape == (2, 28, 28, 3)
    assert {tuple(shape[1:]) for shape in seen} == {(4, 4, 4)}
    assert max(shape[0] for shape in seen) == 4


def test_super_resolution_reads_the_low_resolution_picture_where_it_lies(pipeline, monkeypatch):
    """A denoiser that gives back its spatial condition draws it, whatever the tiles are."""
    conditioner = Given(spatial=Field("picture", [4, None, None]))
    drawn = replace(pipeline, denoiser=torch.nn.ModuleDict({**pipeline.denoiser, "conditioner": conditioner}))
    monkeypatch.setattr(type(drawn.objective), "denoise", lambda self, network, x, t, told: told.spatial)
    picture = torch.rand(4, 6, 10) - 0.5
    tile = Tiling((16, 16), 8)
    conditions = [{"picture": picture}]
    (made,) = generate(drawn, [1], conditions, steps=2, size=(24, 40), tile=tile)
    expected = to_arrays(decode(drawn.codec, drawn.manifest.unstandardize(picture[None]), tile))
    assert np.abs(made.image.astype(int) - expected[0]).max() <= 1


def test_tiles_that_do_not_fit_are_refused_before_anything_is_made(pipeline):
    for tile, size, message in (
        (Tiling((18, 16), 4), (32, 32), "tile 18 x 16: expected multiples of the autoencoder's down factor 4"),
        (Tiling((32, 32), 8), None, "tile 32: is larger than the picture, 16"),
        (Tiling((20, 20), 8), (40, 40), "tile 20: "),  # 5 positions, which the network cannot halve
        (Tiling((16, 16), 6), (40, 40), "tile overlap 6: expected a multiple"),
    ):
        with pytest.raises(ConfigError, match=message):
            pictures(pipeline, tile, size)
    with pytest.raises(ConfigError, match="tiles at once: expected 1 or more, found 0"):
        Tiling((16, 16), 8, 0)
