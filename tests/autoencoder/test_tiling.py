"""Tiles against the whole: exact where a network sees no farther than a quarter of the overlap."""

import pytest
import torch
from torch import nn

from ldm.autoencoder.codec import AutoencoderCodec, Codec
from ldm.autoencoder.tiling import Tiling, decode, encode
from ldm.autoencoder.tiny import TinyDecoder, TinyEncoder
from ldm.errors import ConfigError


class Local(Codec):
    """Convolutions that see 1 latent position, 4 pixels, around: no norm, no attention."""

    deterministic = False

    def __init__(self) -> None:
        super().__init__((3, 2), 4, {})
        self.down = nn.Conv2d(3, 2, 12, stride=4, padding=4)
        self.up = nn.Sequential(nn.Conv2d(2, 48, 3, padding=1), nn.PixelShuffle(4))
        self.freeze()

    def moments(self, images):
        return self.down(images), self.down(images).exp()

    def pictures(self, latents):
        return self.up(latents)


@pytest.mark.parametrize("size", [(64, 64), (68, 132), (100, 64)])
@pytest.mark.parametrize("factor", [1, 4])
@pytest.mark.parametrize("tiling", [Tiling((64, 32), 16), Tiling((32, 64), 4)])
def test_windows_cover_a_picture_with_weights_that_sum_to_one(size, factor, tiling):
    for scale in {1, factor}:
        whole = torch.zeros(1, 1, size[0] // factor * scale, size[1] // factor * scale)
        for window in tiling.windows(size, factor, scale):
            assert window.weights.shape == (tiling.tile[0] // factor * scale, tiling.tile[1] // factor * scale)
            window.add(whole, torch.ones(1, 1, *window.weights.shape))
        torch.testing.assert_close(whole, torch.ones_like(whole))


def test_the_outer_quarter_of_an_overlap_counts_for_nothing():
    first, second = Tiling((32, 32), 16).windows((32, 48), 1)
    assert (second.columns.start, second.columns.stop) == (16, 48)
    assert not first.weights[:, -4:].any()
    assert not second.weights[:, :4].any()
    assert (first.weights[:, :20] == 1).all()
    assert (first.weights[:, 20:28].diff() < 0).all()


@pytest.mark.parametrize("size", [(64, 64), (68, 100)])
def test_what_sees_no_farther_than_a_quarter_of_the_overlap_is_exact(size):
    torch.manual_seed(0)
    codec, images, tiling = Local(), torch.rand(2, 3, *size) * 2 - 1, Tiling((48, 32), 16)
    whole, tiles = codec.encode(images), encode(codec, images, tiling)
    torch.testing.assert_close(tiles, whole)
    torch.testing.assert_close(decode(codec, whole[0], tiling), codec.decode(whole[0]))
    # A smaller overlap hides nothing of the tiles' edges.
    assert (decode(codec, whole[0], Tiling((48, 32), 4)) - codec.decode(whole[0])).abs().max() > 0.01


def test_pixels_are_exact():
    images = torch.rand(1, 3, 40, 56) * 2 - 1
    torch.testing.assert_close(decode(Codec.pixels(3), images, Tiling((16, 24), 6)), images)


def test_one_tile_is_the_whole_bit_for_bit():
    codec, images = Local(), torch.rand(2, 3, 32, 48) * 2 - 1
    tiling = Tiling((32, 48), 8)
    for found, expected in zip(encode(codec, images, tiling), encode(codec, images, None), strict=True):
        torch.testing.assert_close(found, expected)
    assert torch.equal(decode(codec, images[:1, :2, :8, :12], tiling), codec.decode(images[:1, :2, :8, :12]))


def test_a_tiny_autoencoder_without_norms_is_exact():
    """Its decoder sees 4 latent positions by convolutions of the latent, and 2.5 by those after the doubling."""
    torch.manual_seed(0)
    sizes = {"channels": 8, "num_blocks": (1, 1)}
    codec = AutoencoderCodec(TinyEncoder(**sizes), TinyDecoder(**sizes), {})
    latents = torch.randn(1, 4, 56, 84)
    torch.testing.assert_close(decode(codec, latents, Tiling((112, 112), 56)), codec.decode(latents))


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        (((30, 32), 8), "tile 30 x 32: expected multiples of the autoencoder's down factor 4: height 28 or 32"),
        (((32, 32), 6), "tile overlap 6: expected a multiple of the autoencoder's down factor 4: 4 or 8"),
        (((128, 32), 8), "tile 128 x 32: is larger than the picture, 64"),
        (((32, 16), 12), "tile overlap: expected 1 pixel to half of a tile's side, 8, found 12"),
        (((32, 32), 0), "tile overlap: expected 1 pixel to half of a tile's side, 16, found 0"),
    ],
)
def test_tiles_that_do_not_fit(tiling, message):
    with pytest.raises(ConfigError, match=message):
        decode(Local(), torch.zeros(1, 2, 16, 16), Tiling(*tiling))
