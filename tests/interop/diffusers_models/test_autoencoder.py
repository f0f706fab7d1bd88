"""AutoencoderKL and VQModel: their outputs by our networks, and ours by theirs; what neither can express."""

import inspect
import random

import diffusers
import pytest
import torch

from ldm.autoencoder.codec import AutoencoderCodec
from ldm.errors import CheckpointError, ConfigError
from ldm.interop.diffusers_models import autoencoder as module
from ldm.interop.models import Request, node
from ldm.interop.sources import Source
from tests.interop.diffusers_files import built, difference, of_diffusers, plain

CLOSE = 1e-5
SIZES = {
    "two levels": {"base_channels": 32, "channel_mult": [1, 1], "num_res_blocks": 1, "attention_levels": [1]},
    "three levels": {"base_channels": 128, "channel_mult": [1, 1, 2], "num_res_blocks": 1},
    "32 groups": {"base_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 2, "norm_groups": 32},
}


def nodes(quantized, latent_channels=3, decoder=(), **sizes):
    sizes["latent_channels"] = latent_channels
    made = {
        "encoder": node("autoencoder.networks.Encoder", in_channels=3, moments=not quantized, **sizes),
        "decoder": node("autoencoder.networks.Decoder", out_channels=3, **{**sizes, **dict(decoder)}),
    }
    book = node("autoencoder.quantizer.VectorQuantizer", size=19, channels=latent_channels)
    return made | ({"quantizer": book} if quantized else {})


def parts(params):
    return {name: built(one) for name, one in params.items()}


def state(modules):
    return {f"{name}.{key}": one for name, made in modules.items() for key, one in made.state_dict().items()}


def compare(modules, theirs):
    images = torch.randn(2, 3, 16, 16)
    encoded = theirs.encode(images)
    found = encoded.latents if "quantizer" in modules else encoded.latent_dist.parameters
    assert difference(modules["encoder"](images), found) < CLOSE
    latents = torch.randn(2, modules["decoder"].latent_channels, 4, 4)
    codes = modules["quantizer"](latents).mode() if "quantizer" in modules else latents
    assert difference(modules["decoder"](codes), theirs.decode(latents).sample) < CLOSE


@pytest.mark.parametrize("name", module.DEFAULTS)
def test_every_setting_is_known_with_its_default(name):
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    defaults = {key: one.default for key, one in parameters.items() if key != "self"}
    assert plain(defaults) == module.DEFAULTS[name]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_ours_computes_the_same_there(sizes, quantized):
    params = nodes(quantized, **sizes)
    modules = parts(params)
    out = module.exported(params, state(modules), resolution=16)
    theirs = of_diffusers(out.class_name, out.config, out.tensors)
    assert plain(theirs.config) == out.config
    compare(modules, theirs)


@pytest.mark.parametrize("name", module.DEFAULTS)
@pytest.mark.parametrize("number", range(3))
def test_theirs_computes_the_same_here_and_goes_back_to_the_bit(name, number, tmp_path):
    config = [
        {"block_out_channels": [32], "norm_num_groups": 8},
        {
            "block_out_channels": [32, 64],
            "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
            "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
            "layers_per_block": 2,
        },
        {
            "block_out_channels": [128, 128, 256],
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
            "mid_block_add_attention": False,
        },
    ][number]
    theirs = of_diffusers(name, config)
    full = plain(theirs.config) | {"_class_name": name}
    source = Source(tmp_path, theirs.state_dict(), {}, full)
    [stage] = module.convert(source, Request())
    modules = parts({part: stage.params[part] for part in ("encoder", "decoder", "quantizer") if part in stage.params})
    for part, made in modules.items():
        own = {key.removeprefix(f"{part}."): one for key, one in stage.weights.items() if key.startswith(f"{part}.")}
        made.load_state_dict(own)
    compare(modules, theirs)
    out = module.exported(
        stage.params, stage.weights, stage.resolution, stage.statistics["mean"], stage.statistics["std"]
    )
    assert out.class_name == name
    ignored = {"force_upcast": full["force_upcast"]} | ({"vq_embed_dim": None} if name == "VQModel" else {})
    assert out.config | ignored | {"_class_name": name} == full
    assert out.tensors.keys() == theirs.state_dict().keys()
    assert all(torch.equal(out.tensors[key], one) for key, one in theirs.state_dict().items())


def test_whatever_is_accepted_computes_the_same():
    draws = random.Random(5)
    accepted = 0
    for _ in range(12):
        levels = draws.randint(1, 3)
        sizes = {
            "base_channels": draws.choice([4, 32, 128]),
            "channel_mult": [draws.choice([1, 1, 2]) for _ in range(levels)],
            "num_res_blocks": draws.randint(1, 2),
            "attention_levels": [level for level in range(levels) if draws.random() < 0.4],
            "middle_attention": draws.random() < 0.5,
            "norm_groups": draws.choice([None, 4]),
        }
        decoder = {"attention_levels": [level for level in range(levels) if draws.random() < 0.4]}
        params = nodes(draws.random() < 0.5, decoder=decoder, **sizes)
        modules = parts(params)
        try:
            out = module.exported(params, state(modules))
        except ConfigError as error:
            assert "norm_groups" in str(error) or "channel_mult" in str(error)  # noqa: PT017
            continue
        accepted += 1
        compare(modules, of_diffusers(out.class_name, out.config, out.tensors))
        again = module.from_config(out.config | {"_class_name": out.class_name}, "config.json")
        assert module.to_config(again) == (out.class_name, out.config)
    assert accepted > 3


def test_a_model_without_the_convolutions_around_the_latent(tmp_path):
    theirs = of_diffusers(
        "AutoencoderKL", {"block_out_channels": [32], "use_quant_conv": False, "use_post_quant_conv": False}
    )
    full = plain(theirs.config) | {"_class_name": "AutoencoderKL"}
    [stage] = module.convert(Source(tmp_path, theirs.state_dict(), {}, full), Request())
    codec = codec_of(stage)
    images = torch.randn(1, 3, 8, 8)
    assert difference(codec.encode(images)[0], theirs.encode(images).latent_dist.mean) < CLOSE


def codec_of(stage):
    modules = parts({part: stage.params[part] for part in ("encoder", "decoder")})
    for part, made in modules.items():
        own = {key.removeprefix(f"{part}."): one for key, one in stage.weights.items() if key.startswith(f"{part}.")}
        made.load_state_dict(own)
    return AutoencoderCodec(modules["encoder"], modules["decoder"], {})


def test_former_names_of_attention(tmp_path):
    theirs = of_diffusers("AutoencoderKL", {"block_out_channels": [32]})
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    former = {}
    for key, one in theirs.state_dict().items():
        for present, name in names.items():
            key = key.replace(f".{present}.", f".{name}.")
        former[key] = one
    assert former.keys() != theirs.state_dict().keys()
    full = plain(theirs.config) | {"_class_name": "AutoencoderKL"}
    [expected] = module.convert(Source(tmp_path, theirs.state_dict(), {}, full), Request())
    [found] = module.convert(Source(tmp_path, former, {}, full), Request())
    assert all(torch.equal(found.weights[key], one) for key, one in expected.weights.items())


@pytest.mark.parametrize(
    ("mean", "std"),
    [([0.0] * 4, [1 / 0.18215] * 4), ([0.0609] * 4, [1 / 1.5305] * 4), ([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0])],
)
def test_the_scale_of_latents_comes_back(mean, std):
    _, config = module.to_config(nodes(False, 4, **SIZES["two levels"]), 16, mean, std)
    assert module.scale(config | {"_class_name": "AutoencoderKL"}) == (mean, std)
    if len({*std}) == 1:
        assert len(str(config["scaling_factor"])) < 8  # as published, not 0.18215000000000003


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("AutoencoderKL", {"act_fn": "gelu"}, "act_fn='gelu': expected 'silu'"),
        ("AutoencoderKL", {"norm_num_groups": 24}, "norm_num_groups=24: does not divide 64 channels"),
        ("AutoencoderKL", {"block_out_channels": [64, 96], "down_block_types": 2}, "block_out_channels=[64, 96]"),
        (
            "AutoencoderKL",
            {"down_block_types": ["KDownBlock2D"]},
            "down_block_types=['KDownBlock2D']",
        ),
        ("AutoencoderKL", {"layers_per_block": 10**9}, "layers_per_block=1000000000: expected a whole number"),
        ("AutoencoderKL", {"latent_channels": "4"}, "latent_channels='4'"),
        ("AutoencoderKL", {"scaling_factor": 0}, "scaling_factor=0"),
        ("AutoencoderKL", {"latents_mean": [0.0, 1.0]}, "latents_mean=[0.0, 1.0]: expected 4 finite numbers"),
        ("AutoencoderKL", {"new_thing": 3}, "new_thing: a setting that is not known here"),
        ("VQModel", {"norm_type": "spatial"}, "norm_type='spatial'"),
        ("VQModel", {"vq_embed_dim": 8}, "vq_embed_dim=8"),
    ],
)
def test_settings_that_ours_cannot_express(name, changes, words):
    with pytest.raises(ConfigError) as error:
        module.from_config({"_class_name": name, **changes}, "folder/config.json")
    assert "folder/config.json" in str(error.value)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch_size": 2}, "encoder.patch_size=2"),
        ({"channel_mult": [2, 2]}, "channel_mult=[2, 2]"),
        ({"channel_mult": [1, 2]}, "norm_groups=None: one number for all norms in diffusers; ours have 8 for 32"),
        ({"decoder": {"num_res_blocks": 3}}, "num_res_blocks: the encoder's 1 and the decoder's 3 are one"),
    ],
)
def test_parameters_that_theirs_cannot_express(changes, words):
    with pytest.raises(ConfigError) as error:
        module.to_config(nodes(False, **{**SIZES["two levels"], **changes}))
    assert words in str(error.value)


def test_a_class_of_another_package_is_named():
    params = nodes(False, **SIZES["two levels"])
    params["decoder"] = {"target": "mine.Decoder", "params": {}}
    with pytest.raises(ConfigError, match=r"decoder=mine\.Decoder"):
        module.to_config(params)


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    theirs = of_diffusers("VQModel", {"block_out_channels": [32]})
    tensors = {key: one for key, one in theirs.state_dict().items() if key != "quantize.embedding.weight"}
    source = Source(tmp_path, tensors, {}, plain(theirs.config) | {"_class_name": "VQModel"})
    with pytest.raises(CheckpointError, match=r"(?s)VQModel.*missing \(1\):\s+quantize\.embedding\.weight"):
        module.convert(source, Request())
