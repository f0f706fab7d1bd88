"""The frozen autoencoder: what stage 1 wrote is what stage 2 encodes and decodes with."""

import copy
from typing import Any

import pytest
import torch

from ldm.autoencoder.codec import AutoencoderCodec, Codec
from ldm.autoencoder.networks import Decoder, Encoder
from ldm.autoencoder.posterior import DiagonalGaussian
from ldm.checkpoints import store
from ldm.config.load import build
from ldm.errors import CheckpointError, ConfigError
from ldm.latents.manifest import CacheSpec


@pytest.fixture(scope="module")
def codec(runs):
    return Codec.load(runs.autoencoder)


@pytest.fixture
def state(runs):
    """The stage-1 checkpoint's content."""
    return store.load(store.verify(runs.autoencoder).path)


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_encodes_and_decodes_with_the_weights_of_the_checkpoint(codec, state, images):
    sizes = {"base_channels": 8, "channel_mult": [1, 1, 1], "num_res_blocks": 1, "latent_channels": 4}
    encoder, decoder = Encoder(in_channels=3, **sizes).eval(), Decoder(out_channels=3, **sizes).eval()
    for name, network in (("encoder.", encoder), ("decoder.", decoder)):
        weights = state["state_dict"].items()
        network.load_state_dict({key.removeprefix(name): value for key, value in weights if key.startswith(name)})
    with torch.no_grad():
        posterior = DiagonalGaussian(encoder(images))
        decoded = decoder(posterior.mean)
    mean, std = codec.encode(images)
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(std, posterior.std)
    torch.testing.assert_close(codec.decode(mean), decoded.clamp(-1, 1))


def test_latent_shape_is_the_encoder_s(codec, images):
    assert codec.latent_shape(16) == tuple(codec.encode(images)[0].shape[1:]) == (4, 4, 4)


def test_height_and_width_are_two_facts(codec, state, tmp_path):
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = codec.encode(images)
    assert codec.latent_shape((16, 24)) == tuple(mean.shape[1:]) == tuple(std.shape[1:]) == (4, 4, 6)
    assert codec.decode(mean).shape == images.shape
    state["ldm"]["config"]["data"] = {"target": "x", "params": {"resolution": [16, 24]}}
    store.save(tmp_path / "wide.ckpt", state)
    assert Codec.load(tmp_path / "wide.ckpt").size == (16, 24)
    with pytest.raises(ConfigError, match=r"found 16 x 30. Use width 28 or 32\."):
        codec.latent_shape((16, 30))


def test_a_resolution_that_does_not_divide_is_refused(codec):
    with pytest.raises(ConfigError, match=r"data.params.resolution: .*multiple of .* 4, found 30. Use 28 or 32"):
        codec.latent_shape(30)
    with pytest.raises(ConfigError, match=r"found 3. Use 4\."):
        codec.latent_shape(3)


def test_encodes_in_fp32_under_autocast(codec, images):
    expected = codec.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = codec.encode(images)
    for a, b in zip(expected, found, strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_encodes_in_true_fp32_whatever_setting_surrounds_it(codec, images, precision):
    expected = codec.encode(images)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert torch.equal(codec.encode(images)[0], expected[0])
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_decoded_images_are_fp32_within_range(codec):
    latents = 1e3 * torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        images = codec.decode(latents)
    assert images.dtype == torch.float32
    assert images.shape == (2, 3, 16, 16)
    assert images.abs().max() == 1.0


def test_it_is_frozen_and_stays_in_eval_mode(codec, images):
    parent = torch.nn.Sequential(codec).train()
    assert parent.training
    assert not any(module.training for module in codec.modules())
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    assert not codec.decode(codec.encode(images.requires_grad_())[0]).requires_grad


def test_weight_hash_follows_the_weights_alone(codec, state, runs, other_autoencoder, tmp_path):
    state["ldm"]["step"] = 99
    state["optimizer_states"] = [{"x": torch.ones(3)}]
    store.save(tmp_path / "moved.ckpt", state)
    moved = Codec.load(tmp_path / "moved.ckpt")
    assert moved.weight_hash() == codec.weight_hash() == Codec.load(runs.autoencoder).weight_hash()
    assert Codec.load(other_autoencoder).weight_hash() != codec.weight_hash()
    for name in list(moved.state_dict())[::20]:
        changed = copy.deepcopy(moved)
        weight = changed.state_dict()[name].view(-1)
        weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
        assert changed.weight_hash() != codec.weight_hash(), name


def test_it_knows_its_configuration_resolution_and_statistics(codec, state, tmp_path):
    assert set(codec.config) == {"encoder", "decoder"}
    assert codec.config["encoder"]["params"]["latent_channels"] == 4
    assert (codec.size, codec.statistics) == (None, None)
    state["ldm"]["latents"] = {"mean": [0.0] * 4, "std": [1.0] * 4}
    state["ldm"]["config"]["data"] = {"target": "x", "params": {"resolution": 64}}
    store.save(tmp_path / "more.ckpt", state)
    more = Codec.load(tmp_path / "more.ckpt")
    assert (more.size, more.statistics) == ((64, 64), {"mean": [0.0] * 4, "std": [1.0] * 4})
    assert more.path == str(tmp_path / "more.ckpt")


def test_a_stage_2_checkpoint_is_refused_for_what_it_is(runs):
    with pytest.raises(CheckpointError, match=r"step=7.ckpt: expected the checkpoint of an autoencoder.*'diffusion'"):
        Codec.load(runs.diffusion)


def test_a_foreign_checkpoint_is_refused_for_what_it_is(tmp_path):
    store.save(tmp_path / "foreign.ckpt", {"state_dict": {}})
    with pytest.raises(CheckpointError, match=r"foreign.ckpt: expected .* autoencoder .*one that was not saved"):
        Codec.load(tmp_path / "foreign.ckpt")


def test_a_missing_run_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        Codec.load(tmp_path / "nowhere")


@pytest.mark.parametrize("change", ["lacks", "has more", "has another shape"])
def test_weights_that_do_not_fit_are_an_error(state, tmp_path, change):
    weights, name = state["state_dict"], "decoder.conv_out.bias"
    if change == "lacks":
        del weights[name]
    elif change == "has more":
        weights["decoder.more"] = torch.zeros(1)
    else:
        weights[name] = torch.zeros(7)
    store.save(tmp_path / "odd.ckpt", state)
    with pytest.raises(CheckpointError, match=r"odd.ckpt: the weights of the decoder do not fit"):
        Codec.load(tmp_path / "odd.ckpt")


def test_a_target_outside_the_allow_list_is_refused(state, tmp_path):
    state["ldm"]["config"]["model"]["params"]["decoder"] = {"target": "os.system", "params": {"command": "true"}}
    store.save(tmp_path / "evil.ckpt", state)
    with pytest.raises(ConfigError, match=r"evil.ckpt: .*model.params.decoder.target: .*os.system"):
        Codec.load(tmp_path / "evil.ckpt")


def node(target: str, **params: Any) -> dict[str, Any]:
    return {"target": f"ldm.autoencoder.{target}", "params": params}


@pytest.mark.parametrize(
    ("codes", "weights", "plan"),
    [
        (None, "1548205da9dc2a1f1573e9abf90550169bcb18f6a1be653f9b77a0dc25b7215c", "2f417c98f54b48a0"),
        (8, "9b894e471a799635946051cf4055c7e88a4b171d2896eafdb7490c9f0767256b", "abf9713628b6772d"),
    ],
)
def test_caches_and_checkpoints_know_an_autoencoder_by_the_hashes_that_they_always_had(codes, weights, plan):
    sizes = {"base_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "latent_channels": 2}
    config = {
        "encoder": node("networks.Encoder", in_channels=3, moments=codes is None, **sizes),
        "decoder": node("networks.Decoder", out_channels=3, **sizes),
    }
    if codes is not None:
        config["quantizer"] = node("quantizer.VectorQuantizer", size=codes, channels=2)
    parts = {name: build(part) for name, part in config.items()}
    codec = AutoencoderCodec(parts["encoder"], parts["decoder"], config, path="x", quantizer=parts.get("quantizer"))
    for tensor in codec.state_dict().values():
        tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) % 7 / 16 - 0.2)
    assert codec.weight_hash() == weights
    described = codec.describe()
    assert {name: described[name] for name in ("weights", "config", "path")} == {
        "weights": weights,
        "config": config,
        "path": "x",
    }
    assert CacheSpec((2, 8, 8), 3, "s", {}, described).fingerprint() == plan


def test_a_class_that_is_no_codec_is_refused():
    with pytest.raises(ConfigError, match=r"expected a class of first stages .*, found torch.nn.Identity"):
        Codec.of({"target": "torch.nn.Identity", "params": {}}, "")
    with pytest.raises(ConfigError, match=r"autoencoder.target: 'os.system' is refused"):
        Codec.of({"target": "os.system", "params": {}}, "somewhere")
