"""Norms of tiles with the mean and variance of the whole: exact for the first of them, near for others."""

import pytest
import torch
from torch import nn

from ldm.autoencoder.codec import AutoencoderCodec, Codec
from ldm.autoencoder.networks import Decoder, Encoder
from ldm.autoencoder.tiling import Tiling, decode, encode
from ldm.autoencoder.whole_norms import WholeNorms


class Normed(Codec):
    """One norm, in the latent's resolution or in pixels, of places in a row or not."""

    deterministic = True

    def __init__(self, in_a_row: bool, affine: bool) -> None:
        super().__init__((4, 4), 2, {})
        self.norm = nn.GroupNorm(2, 4, affine=affine)
        for weight in self.norm.parameters():
            nn.init.normal_(weight)
        self.in_a_row = in_a_row
        self.freeze()

    def pictures(self, latents):
        large = latents.repeat_interleave(2, 2).repeat_interleave(2, 3)
        if self.in_a_row:
            return 0.1 * self.norm(large.flatten(2)).reshape(large.shape)
        return 0.1 * self.norm(large)

    def moments(self, images):
        small = self.norm(images[..., ::2, ::2])
        return small, small.abs()


def of_another_brightness(*shape):
    torch.manual_seed(0)
    return torch.randn(shape) + torch.linspace(0, 5, shape[-1])


@pytest.mark.parametrize("in_a_row", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_a_single_norm_is_exact(in_a_row, affine):
    codec, latents = Normed(in_a_row, affine), of_another_brightness(2, 4, 32, 48)
    whole, tiling = codec.decode(latents), Tiling((32, 32), 8)
    torch.testing.assert_close(decode(codec, latents, tiling), whole, atol=2e-3, rtol=0)
    own = decode(codec, latents, Tiling((32, 32), 8, surveys=0))
    assert (own - whole).abs().max() > 0.1
    assert not codec.norm._forward_hooks
    for found, expected in zip(encode(codec, latents, tiling), codec.encode(latents), strict=True):
        torch.testing.assert_close(found, expected, atol=5e-2, rtol=0)


def test_what_is_measured_of_the_whole_is_measured_in_float32():
    codec, latents, tiling = Normed(False, True), of_another_brightness(1, 4, 32, 48), Tiling((32, 32), 8)
    with torch.autocast("cpu", torch.bfloat16):  # which leaves the norm itself in float32
        found = decode(codec, latents, tiling)
    assert torch.equal(found, decode(codec, latents, tiling))


def test_hooks_are_gone_after_a_failure():
    codec = Normed(False, True)
    norms = WholeNorms(codec)
    with pytest.raises(RuntimeError), norms.measuring():
        raise RuntimeError
    assert not codec.norm._forward_hooks


def test_an_autoencoder_in_tiles_comes_nearer_to_the_whole():
    torch.manual_seed(0)
    sizes = {
        "base_channels": 16,
        "channel_mult": [1, 1],
        "num_res_blocks": 1,
        "latent_channels": 4,
        "middle_attention": False,
    }
    codec = AutoencoderCodec(Encoder(3, **sizes), Decoder(3, **sizes), {})
    for weight in codec.parameters():
        weight.mul_(1.5)
    latents = of_another_brightness(1, 4, 32, 96)
    whole = codec.decode(latents)
    own, shared = (
        (decode(codec, latents, Tiling((64, 64), 32, surveys=surveys)) - whole).abs().mean() for surveys in (0, 1)
    )
    assert shared < own / 2
