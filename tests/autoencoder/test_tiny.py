"""The tiny autoencoder: parity with diffusers, contracts of an encoder and a decoder, and training."""

import pytest
import torch
from diffusers import AutoencoderTiny

import main
from ldm.autoencoder.codec import AutoencoderCodec, Codec
from ldm.autoencoder.posterior import DiagonalGaussian
from ldm.autoencoder.tiny import TinyDecoder, TinyEncoder
from ldm.config.load import to_yaml
from ldm.interop.tables import to_theirs
from ldm.interop.tiny_autoencoder import table
from ldm.sizes import SizeError
from tests.conftest import node


@pytest.mark.parametrize(("channels", "blocks", "size"), [(64, (1, 3, 3, 3), 64), (16, (1, 1, 2), 24), (8, (2, 1), 32)])
def test_equals_diffusers(channels, blocks, size):
    torch.manual_seed(0)
    encoder = TinyEncoder(3, 4, channels, blocks)
    decoder = TinyDecoder(3, 4, channels, blocks[::-1])
    theirs = AutoencoderTiny(
        latent_channels=4,
        encoder_block_out_channels=(channels,) * len(blocks),
        decoder_block_out_channels=(channels,) * len(blocks),
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks[::-1],
    ).eval()
    params = {"encoder": {"params": {"num_blocks": blocks}}, "decoder": {"params": {"num_blocks": blocks[::-1]}}}
    parts = {"encoder": encoder, "decoder": decoder}
    weights = {f"{part}.{name}": one for part, module in parts.items() for name, one in module.state_dict().items()}
    theirs.load_state_dict(to_theirs(table(params, diffusers=True), weights))
    images = torch.rand(2, 3, size, size) * 2 - 1
    with torch.no_grad():
        latents, moments = theirs.encode(images).latents, encoder(images)
        torch.testing.assert_close(moments[:, :4], latents, rtol=1e-6, atol=1e-6)
        draws = 3 * torch.randn_like(latents)
        torch.testing.assert_close(decoder(draws), theirs.decode(draws).sample, rtol=1e-6, atol=1e-6)


def test_its_posterior_is_a_point_and_its_shapes_those_of_the_large_one():
    encoder, decoder = TinyEncoder(3, 16, 8, (1, 1, 1, 1)), TinyDecoder(3, 16, 8, (1, 1, 1, 1))
    assert (encoder.down_factor, decoder.up_factor, encoder.outputs) == (8, 8, 2)
    posterior = DiagonalGaussian(encoder(torch.zeros(2, 3, 32, 48)))
    assert posterior.mean.shape == (2, 16, 4, 6)
    assert bool((posterior.std < 1e-6).all())
    assert decoder(posterior.mean).shape == (2, 3, 32, 48)
    assert decoder.last_layer.weight.shape[0] == 3
    codec = AutoencoderCodec(encoder, decoder, {})
    assert codec.latent_shape((32, 48)) == (16, 4, 6)


def test_published_sizes():
    """2.4M parameters together, as their author says."""
    with torch.device("meta"):
        halves = TinyEncoder(), TinyDecoder()
    assert [sum(one.numel() for one in half.parameters()) for half in halves] == [1_222_532, 1_222_531]


def test_pictures_that_cannot_be_halved_are_refused():
    with pytest.raises(SizeError, match=r"divisible by 8.*found 20x32, which at most 3 levels"):
        TinyEncoder(3, 4, 8)(torch.zeros(1, 3, 20, 32))


def test_stage_1_trains_it(autoencoder_tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"latent_channels": 2, "channels": 8, "num_blocks": [1, 1]}
    autoencoder_tree["model"]["params"] |= {
        "encoder": node("ldm.autoencoder.tiny.TinyEncoder", **sizes),
        "decoder": node("ldm.autoencoder.tiny.TinyDecoder", **sizes),
    }
    autoencoder_tree["lightning"]["trainer"] |= {"max_steps": 4, "val_check_interval": 4}
    (tmp_path / "a.yaml").write_text(to_yaml(autoencoder_tree))
    assert main.main(["--base", "a.yaml"]) == 0
    (run,) = (tmp_path / "logs").iterdir()
    assert Codec.load(run).down_factor == 2
