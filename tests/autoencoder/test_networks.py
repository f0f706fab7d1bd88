"""Encoder and decoder: published sizes, parity with diffusers, shapes."""

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from ldm.autoencoder.networks import Attention, Decoder, Downsample, Encoder, ResBlock, Upsample

# channel multipliers, latent channels, attention levels; encoder and decoder in millions (Rombach et al. 2022's models)
PUBLISHED = {
    "kl_f4": ((1, 2, 4), 3, (), 22.4, 33.0),
    "kl_f8": ((1, 2, 4, 4), 4, (), 34.2, 49.5),
    "kl_f16": ((1, 1, 2, 2, 4), 16, (4,), 28.3, 41.3),
    "kl_f32": ((1, 1, 2, 2, 4, 4), 64, (4, 5), 42.6, 61.2),
}


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    multipliers, latent, attention, encoder_size, decoder_size = PUBLISHED[name]
    with torch.device("meta"):
        encoder = Encoder(3, 128, multipliers, 2, latent, attention)
        decoder = Decoder(3, 128, multipliers, 2, latent, attention)
    assert round(size(encoder) / 1e6, 1) == encoder_size
    assert round(size(decoder) / 1e6, 1) == decoder_size
    factor = int(name.removeprefix("kl_f"))
    assert encoder.down_factor == decoder.up_factor == factor
    moments = encoder(torch.empty(2, 3, 64, 64, device="meta"))
    assert moments.shape == (2, 2 * latent, 64 // factor, 64 // factor)
    assert decoder(moments[:, :latent]).shape == (2, 3, 64, 64)


def test_the_published_model_without_attention():
    """vq-f4-noattn of Rombach et al. 2022; the figures are those of the authors' code. Block names stay as they are."""
    for middle_attention, sizes in ((True, (22_337_423, 32_960_783)), (False, (21_285_775, 31_909_135))):
        with torch.device("meta"):
            encoder = Encoder(3, 128, (1, 2, 4), 2, 3, moments=False, middle_attention=middle_attention)
            decoder = Decoder(3, 128, (1, 2, 4), 2, 3, middle_attention=middle_attention)
        assert (size(encoder), size(decoder)) == sizes
        for network in (encoder, decoder):
            names = {name.split(".")[1] for name in network.state_dict() if name.startswith("middle.")}
            assert names == ({"0", "1", "2"} if middle_attention else {"0", "2"})


def block_names(block: nn.Module, place: str) -> dict[str, str]:
    """Our names within one block -> diffusers'."""
    if isinstance(block, ResBlock):
        parts = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "shortcut": "conv_shortcut"}
    elif isinstance(block, Attention):
        parts = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
    else:
        parts = {"conv": "conv"}
    return {ours: f"{place}.{theirs}" for ours, theirs in parts.items()}


def diffusers_names(network: nn.Module, side: str) -> dict[str, str]:
    """Names of our encoder's or decoder's layers -> diffusers'."""
    folders = {ResBlock: "resnets", Attention: "attentions", Downsample: "downsamplers", Upsample: "upsamplers"}
    levels = "down_blocks" if side == "encoder" else "up_blocks"
    names = {"conv_in": f"{side}.conv_in", "norm_out": f"{side}.conv_norm_out", "conv_out": f"{side}.conv_out"}
    names |= {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    groups = [(f"levels.{i}", f"{side}.{levels}.{i}", level) for i, level in enumerate(network.levels)]
    for ours, theirs, blocks in [*groups, ("middle", f"{side}.mid_block", network.middle)]:
        seen = dict.fromkeys(folders.values(), 0)
        for index, block in enumerate(blocks):
            if isinstance(block, nn.Identity):
                continue
            folder = folders[type(block)]
            for part, name in block_names(block, f"{theirs}.{folder}.{seen[folder]}").items():
                names[f"{ours}.{index}.{part}"] = name
            seen[folder] += 1
    return names


def copy_weights(source: AutoencoderKL, target: nn.Module, side: str) -> set[str]:
    """Fill `target` from diffusers' weights; returns the names used."""
    weights, names, state, used = source.state_dict(), diffusers_names(target, side), {}, set()
    for key, value in target.state_dict().items():
        layer, kind = key.rsplit(".", 1)
        theirs = f"{names[layer]}.{kind}"
        state[key] = weights[theirs].reshape(value.shape)
        used.add(theirs)
    target.load_state_dict(state)
    return used


@pytest.mark.parametrize("middle_attention", [True, False])
@pytest.mark.parametrize("attention", [(), (1,)])
@torch.no_grad()
def test_parity_with_diffusers(attention, middle_attention):
    torch.manual_seed(0)
    kinds = ["AttnDownEncoderBlock2D" if level in attention else "DownEncoderBlock2D" for level in range(3)]
    reference = AutoencoderKL(
        down_block_types=tuple(kinds),
        up_block_types=tuple(kind.replace("DownEncoder", "UpDecoder") for kind in reversed(kinds)),
        block_out_channels=(128, 128, 256),
        layers_per_block=1,
        latent_channels=4,
        mid_block_add_attention=middle_attention,
    ).eval()
    # Norms that start as the identity would hide a swap of two of them.
    for parameter in reference.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    encoder = Encoder(3, 128, (1, 1, 2), 1, 4, attention, middle_attention=middle_attention)
    decoder = Decoder(3, 128, (1, 1, 2), 1, 4, attention, middle_attention=middle_attention)
    used = copy_weights(reference, encoder, "encoder") | copy_weights(reference, decoder, "decoder")
    assert used == set(reference.state_dict())

    images, latents = torch.rand(2, 3, 16, 24) * 2 - 1, torch.randn(2, 4, 4, 6)
    torch.testing.assert_close(encoder(images), reference.encode(images).latent_dist.parameters, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decoder(latents), reference.decode(latents).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_last_layer_writes_the_image(patch_size):
    decoder = Decoder(3, 8, (1, 2), 1, 2, patch_size=patch_size)
    written = []
    decoder.last_layer.register_forward_hook(lambda module, args, output: written.append(output))
    image = decoder(torch.randn(1, 2, 4, 4))
    assert torch.equal(image, nn.functional.pixel_shuffle(written[0], patch_size))


def test_dropout_is_active_in_training_alone():
    encoder, images = Encoder(1, 8, (1,), 1, 2, dropout=0.5), torch.randn(1, 1, 8, 8)
    assert not torch.equal(encoder(images), encoder(images))
    encoder.eval()
    assert torch.equal(encoder(images), encoder(images))


def test_attention_mixes_positions_and_residual_blocks_do_not_mix_far():
    torch.manual_seed(0)
    images = torch.randn(1, 8, 8, 8)
    changed = images.clone()
    changed[..., 0, 0] += 1
    # Without the norms, which look at the whole map.
    attention, block = Attention(8), ResBlock(8, 8)
    attention.norm = block.norm1 = block.norm2 = nn.Identity()
    assert not torch.equal(attention(images)[..., 7, 7], attention(changed)[..., 7, 7])
    assert torch.equal(block(images)[..., 7, 7], block(changed)[..., 7, 7])


@pytest.mark.parametrize("patch_size", [2, 4])
def test_patches_take_the_place_of_the_first_levels(patch_size):
    torch.manual_seed(0)
    encoder = Encoder(3, 8, (1, 2), 1, 2, patch_size=patch_size)
    decoder = Decoder(3, 8, (1, 2), 1, 2, patch_size=patch_size)
    assert encoder.down_factor == decoder.up_factor == 2 * patch_size
    images = torch.randn(1, 3, 32, 16)
    moments = encoder(images)
    assert moments.shape == (1, 4, 16 // patch_size, 8 // patch_size)
    assert decoder(moments[:, :2]).shape == images.shape
