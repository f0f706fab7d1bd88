"""Latent diffusion models in CompVis' names: exact both ways, strict, and as they were published."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file, save_file

from ldm.config.load import build
from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.networks.unet_attention import SelfAttention
from ldm.errors import CheckpointError, ConfigError, LdmError
from ldm.interop.compvis import model as compvis_model
from ldm.interop.compvis import unet as compvis_unet
from ldm.interop.convert import convert, recognized
from ldm.interop.models import Request
from ldm.interop.tables import Entry, to_theirs, under
from ldm.randomness import Draws
from ldm.sampling.guidance import Guidance
from ldm.sampling.pipeline import Pipeline
from tests.interop.compvis_files import KINDS, SIZES, inventory, source, tiny, unet_params, yaml_of
from tests.tiny_text import save_bert_vocabulary

TWO = SIZES["two levels"]

# Millions of the UNet's parameters.
PUBLISHED = {
    "celeba": 274.1,
    "lsun_churches": 295.0,
    "cin": 395.0,
    "cin256-v2": 400.9,
    "bsr_sr": 113.6,
    "semantic_synthesis256": 215.2,
    "inpainting_big": 387.2,
    "text2img256": 403.6,
    "txt2img-1p4B": 872.3,
    "layout2img": 246.3,
    "rdm768": 1335.5,
    "sd1": 859.5,
    "sd1-inpainting": 859.5,
    "sd2-base": 865.9,
    "sd2-inpainting": 865.9,
}
# What shapes leave open.
SAID = {
    "semantic_synthesis256": {"image_size": 64},
    "sd2-base": {"parameterization": "eps"},
}
REQUEST = Request(text_encoder=Path("encoder"))


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A request with the words of a BERT, which is enough for CLIP as long as no file is written."""
    return Request(text_encoder=save_bert_vocabulary(tmp_path_factory.mktemp("words") / "vocab.txt"))


def converted(file, config=None, request=REQUEST):
    (denoiser,) = compvis_model.convert(source(file, config), request)
    return denoiser


def params(node):
    return node["params"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trips_are_exact(kind, size):
    kind, size = KINDS[kind], SIZES[size]
    file = tiny(kind, size)
    found = converted(file, yaml_of(kind, size))
    expected = unet_params(kind, size)
    assert {key: one for key, one in expected.items() if one is not None} == params(found.params["network"])
    table = under(compvis_unet.table(expected, linear=kind.linear, by_head=kind.by_head), "network.")
    for weights, name in (
        (found.weights, "model.diffusion_model.{}".format),
        (found.average, compvis_model.average_name),
    ):
        theirs = [Entry(one.ours, tuple(map(name, one.theirs)), one.change) for one in table]
        network = {key: one for key, one in weights.items() if key.startswith("network.")}
        for key, one in to_theirs(theirs, network).items():
            torch.testing.assert_close(one, file[key], rtol=0, atol=0)
    assert found.first_stage is not None
    assert found.size == (8, 8)


def test_rows_of_plain_attention_are_those_of_their_heads():
    """Their attention, computed from their rows: (heads, 3, d)."""
    heads, width = 2, 32
    ours = SelfAttention(width, heads, 32)
    qkv, x = torch.randn(3 * width, width, 1), torch.randn(1, width, 4, 4)
    entries = compvis_unet.table(
        unet_params(KINDS["celeba"], SIZES["one level"]) | {"num_heads": heads}, linear=False, by_head=True
    )
    entry = next(one for one in entries if one.ours == "middle.1.qkv.weight")
    with torch.no_grad():
        ours.qkv.weight.copy_(entry.change.ours([qkv]))
        ours.qkv.bias.zero_()
        torch.nn.init.eye_(ours.out.weight[:, :, 0, 0])
        rows = (qkv[:, :, 0] @ ours.norm(x).flatten(2)[0]).unflatten(0, (heads, 3, -1))  # (heads, 3, d, HW)
        q, k, v = rows.unbind(1)
        weights = (q.transpose(1, 2) @ k / math.sqrt(width / heads)).softmax(-1)  # (heads, HW, HW)
        expected = x + (v @ weights.transpose(1, 2)).reshape_as(x)
        torch.testing.assert_close(ours(x, x, None), expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_fit_by_names_and_shapes(name, named):
    file = inventory(name)
    config = {"model": {"params": SAID[name]}} if name in SAID else {}
    whole = source(file, config)
    assert recognized(whole) is compvis_model.FAMILY
    (found,) = recognized(whole).convert(whole, Request() if name == "layout2img" else named)
    network = {key: one for key, one in found.weights.items() if key.startswith("network.")}
    assert sum(one.numel() for one in network.values()) / 1e6 == pytest.approx(PUBLISHED[name], abs=0.05)
    assert (found.average is not None) == any(key.startswith("model_ema.diffusion") for key in file)
    assert found.first_stage is not None
    with torch.device("meta"):
        build(found.params["network"])


def test_what_was_published_is_known_without_a_yaml():
    churches = converted(inventory("lsun_churches"))
    assert params(churches.params["network"])["num_heads"] == 8
    assert params(churches.params["objective"])["distance"]["target"].endswith("Absolute")
    assert churches.std == [2.0] * 4
    assert churches.size == (32, 32)
    classes = converted(inventory("cin256-v2"))
    assert params(classes.params["conditioner"]) == {"num_classes": 1000, "channels": 512}
    assert classes.params["label_dropout"] == 0.1
    assert classes.average is None
    without_null = converted(inventory("cin"))
    assert params(without_null.params["conditioner"]) == {"num_classes": 1000, "channels": 512}
    assert without_null.params["label_dropout"] == 0
    assert without_null.weights["conditioner.table.weight"].shape == (1001, 512)
    stable = converted(inventory("sd1"))
    assert stable.std == [pytest.approx(1 / 0.18215)] * 4
    assert stable.first_stage.resolution == 512
    retrieval = converted(inventory("rdm768"))
    assert retrieval.std == [pytest.approx(1 / 0.22765929)] * 16
    assert retrieval.first_stage.resolution == 768
    schedule = {"target": "ldm.diffusion.noise_schedules.SqrtLinear", "params": {"start": 0.00085, "end": 0.012}}
    assert params(stable.params["objective"]) == {"schedule": schedule, "steps": 1000}


def test_inpainting_keeps_its_first_stage_once():
    found = converted(inventory("inpainting_big"))
    assert found.origin.dropped["the first stage once more, as the encoder of pictures"] > 100
    assert params(found.params["conditioner"]) == {"channels": 3, "outside": -1.0}
    assert found.params["label_dropout"] == 0


def test_what_neither_shapes_nor_publications_say_is_asked_for():
    with pytest.raises(ConfigError, match=r"model\.params\.parameterization.*eps or v.*--config"):
        converted(inventory("sd2-base"))
    with pytest.raises(ConfigError, match=r"model\.params\.image_size.*64 or 128"):
        converted(inventory("semantic_synthesis256"))
    assert converted(inventory("semantic_synthesis256"), request=Request(resolution=512)).size == (128, 128)
    with pytest.raises(ConfigError, match=r"unet_config\.params\.num_heads.*no published model"):
        converted(tiny(KINDS["celeba"], TWO))
    whole = yaml_of(KINDS["celeba"], TWO)
    del whole["model"]["params"]["image_size"]
    with pytest.raises(ConfigError, match=r"image_size.*--resolution"):
        converted(tiny(KINDS["celeba"], TWO), whole)


def test_stable_diffusion_2_with_v_has_768_pixels_though_its_yaml_says_64_latents():
    said = {"parameterization": "v", "image_size": 64}
    found = converted(inventory("sd2-base"), {"model": {"params": said}})
    assert found.size == (96, 96)
    assert params(found.params["objective"])["prediction"]["target"].endswith(".V")
    smaller = converted(inventory("sd2-base"), {"model": {"params": said}}, replace(REQUEST, resolution=512))
    assert smaller.size == (64, 64)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, {}),
        ({"parameterization": "x0"}, {"prediction": "ldm.diffusion.predictions.X0"}),
        ({"parameterization": "v", "loss_type": "l1"}, {"distance": "ldm.diffusion.weightings.Absolute"}),
        ({"original_elbo_weight": 0.001}, {"weighting": "ldm.diffusion.weightings.PlainAndVLB"}),
        ({"linear_start": "1.5e-3"}, {}),
    ],
)
def test_the_objective_is_that_of_the_yaml(said, expected):
    kind = KINDS["celeba"]
    objective = converted(tiny(kind, TWO), yaml_of(kind, TWO, **said)).params["objective"]
    for key, target in expected.items():
        assert params(objective)[key]["target"] == target
    path = build(objective).path
    file = tiny(kind, TWO)
    torch.testing.assert_close(path.alpha(torch.arange(1.0, 1001)).square(), file["alphas_cumprod"], rtol=1e-5, atol=0)


def test_names_of_schedules_are_the_wrong_way_round():
    kind = KINDS["celeba"]
    file = {name: one for name, one in tiny(kind, TWO).items() if name != "alphas_cumprod"}
    objective = converted(file, yaml_of(kind, TWO, beta_schedule="sqrt_linear")).params["objective"]
    assert params(objective)["schedule"]["target"] == "ldm.diffusion.noise_schedules.Linear"
    cosine = converted(file, yaml_of(kind, TWO, beta_schedule="cosine", timesteps=500)).params["objective"]
    assert params(cosine)["steps"] == 500
    with pytest.raises(ConfigError, match=r"beta_schedule: expected linear or sqrt_linear or cosine, found 'sqrt'"):
        converted(file, yaml_of(kind, TWO, beta_schedule="sqrt"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"linear_end": 0.012}, r"linear_end.*not those of the file.*0\.0015 to 0\.0195"),
        ({"linear_end": "steep"}, r"linear_end: expected a number above 0, found 'steep'"),
        ({"parameterization": "mu"}, r"parameterization: expected eps or x0 or v, found 'mu'"),
        ({"scale_by_std": True}, r"scale_factor: this model's latents were scaled by their own deviation"),
        ({"given_betas": [0.1]}, r"given_betas"),
    ],
)
def test_a_yaml_that_does_not_fit_is_refused(wrong, message):
    kind = KINDS["celeba"]
    with pytest.raises(ConfigError, match=message):
        converted(tiny(kind, TWO), yaml_of(kind, TWO, **wrong))


@pytest.mark.parametrize(
    "wrong",
    [
        {"model_channels": 64},
        {"attention_resolutions": [1]},
        {"resblock_updown": True},
        {"disable_self_attentions": [True, False]},
        {"num_heads_upsample": 4},
    ],
)
def test_a_yaml_of_another_unet_is_refused(wrong):
    kind = KINDS["celeba"]
    config = yaml_of(kind, TWO)
    config["model"]["params"]["unet_config"]["params"] |= wrong
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        converted(tiny(kind, TWO), config)


@pytest.mark.parametrize(
    ("said", "key"),
    [
        ({"scale_factor": 0}, "scale_factor"),
        ({"scale_factor": -1.0}, "scale_factor"),
        ({"image_size": [8, 8]}, "image_size"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": 7.5}, "image_size"),
        ({"timesteps": 0}, "timesteps"),
        ({"linear_start": -1.0}, "linear_start"),
        ({"parameterization": ["eps"]}, "parameterization"),
        ({"ucg_rate": "abc"}, "ucg_rate"),
        ({"ucg_rate": 3}, "ucg_rate"),
        ({"unet_config": {"params": {"num_heads": "x"}}}, "unet_config.params.num_heads"),
        ({"unet_config": {"params": {"num_heads": None}}}, "unet_config.params.num_heads"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(said, key):
    kind = KINDS["cin"]
    with pytest.raises(ConfigError, match=rf"model\.ckpt: model\.params\.{key}: expected .*, found"):
        converted(tiny(kind, TWO), yaml_of(kind, TWO, **said))


@pytest.mark.parametrize("factor", [torch.tensor(0.0), torch.ones(2)])
def test_a_buffer_that_is_no_scale_is_named(factor):
    kind = KINDS["celeba"]
    with pytest.raises(ConfigError, match="its tensor scale_factor: expected a number above 0"):
        converted(tiny(kind, TWO) | {"scale_factor": factor}, yaml_of(kind, TWO))


def test_the_scale_is_the_buffers_before_the_yamls():
    kind = KINDS["cin"]
    config = yaml_of(kind, TWO, scale_factor=0.18215)
    assert converted(tiny(kind, TWO), config).std == [pytest.approx(1 / 0.18215)] * 2
    file = tiny(kind, TWO) | {"scale_factor": torch.tensor(0.25)}
    found = converted(file, config)
    assert (found.mean, found.std) == ([0.0, 0.0], [4.0, 4.0])


@pytest.mark.parametrize("kind", ["celeba", "cin"])
def test_each_missing_tensor_is_noticed(kind):
    kind = KINDS[kind]
    config, file = yaml_of(kind, TWO), tiny(kind, TWO)
    needed = [name for name in file if name.startswith(("model.", "model_ema.diffusion", "cond_stage_model."))]
    for name in needed[::7] + [name for name in needed if "out_layers.3.weight" in name or "to_k" in name]:
        lacking = {key: one for key, one in file.items() if key != name}
        if name == "cond_stage_model.embedding.weight":
            continue  # then tokens are given ready-made
        with pytest.raises(LdmError, match=r"missing|there is no|expected as many|another model's"):
            converted(lacking, config)


def test_what_is_left_over_or_of_another_shape_is_refused():
    kind = KINDS["celeba"]
    config, file = yaml_of(kind, TWO), tiny(kind, TWO)
    for more in (
        {"model.diffusion_model.label_emb.weight": torch.zeros(4, 128)},
        {"control_model.input_hint_block.0.weight": torch.zeros(4)},
        {"model_ema.diffusion_modelout3weight": torch.zeros(4)},
        {"model.diffusion_model.out.2.bias": torch.zeros(5)},
    ):
        with pytest.raises(CheckpointError, match="do not fit"):
            converted(file | more, config)


def test_a_file_without_average_has_one_set_of_weights():
    kind = KINDS["celeba"]
    found = converted(tiny(kind, TWO, average=False), yaml_of(kind, TWO))
    assert found.average is None
    averaged = converted(tiny(kind, TWO), yaml_of(kind, TWO))
    assert not torch.equal(averaged.average["network.conv_in.weight"], averaged.weights["network.conv_in.weight"])


def test_a_class_table_has_a_null_row_only_if_it_was_trained_with_one():
    kind = KINDS["cin"]
    file = tiny(kind, TWO)
    table = file["cond_stage_model.embedding.weight"]
    plain = converted(file, yaml_of(kind, TWO))
    assert params(plain.params["conditioner"])["num_classes"] == 4
    assert torch.equal(plain.weights["conditioner.table.weight"], torch.cat([table, torch.zeros(1, 8)]))
    embedder = {"target": "nowhere.ClassEmbedder", "params": {"ucg_rate": 0.2}}
    dropped = converted(file, yaml_of(kind, TWO, cond_stage_config=embedder))
    assert params(dropped.params["conditioner"])["num_classes"] == 3
    assert dropped.params["label_dropout"] == 0.2
    assert torch.equal(dropped.weights["conditioner.table.weight"], table)


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_run_samples_and_trains(kind, tmp_path):
    kind = KINDS[kind]
    path = tmp_path / "tiny.safetensors"
    save_file({name: one.contiguous() for name, one in tiny(kind, TWO).items()}, path)
    path.with_suffix(".yaml").write_text(yaml.safe_dump(yaml_of(kind, TWO, parameterization="v")))
    lines = [*convert(path, Request(), config=None, license=None, name=None, logdir=tmp_path / "logs")]
    assert len(lines) == 2
    run = Path(lines[1].split("  ")[0])
    pipeline = Pipeline.load(run)
    conditions = None if kind.condition is None else [kind.condition] * 2
    images = pipeline.generate([0, 1], conditions, steps=2)
    assert [image.size for image in images] == [(16, 16)] * 2
    own = {f"cond_stage_model.{name}" for name in kind.encoder if name != "embedding.weight"}
    kept = run / "conditioner.safetensors"
    assert kept.is_file() == bool(own)
    if own:
        assert load_file(kept).keys() == own
    if conditions is not None:
        with pytest.raises(ConfigError, match="never trained without its conditions"):
            pipeline.generate([0, 1], conditions, steps=2, guidance=Guidance(2.0))
    batch = {"draws": Draws(0, [0, 1], 2)}
    for key, one in (kind.condition or {}).items():
        batch[key] = torch.stack([torch.as_tensor(one)] * 2)
    network = pipeline.denoiser["network"].requires_grad_(True)
    conditioning = pipeline.conditioner(batch)
    pipeline.objective.loss(network, torch.randn(2, 2, 8, 8), conditioning, batch["draws"]).mean().backward()
    assert all(one.grad is not None for one in network.parameters())


@torch.no_grad()
@pytest.mark.parametrize("linear", [False, True])
def test_a_stable_diffusion_unet_is_the_one_that_diffusers_reads(linear):
    """diffusers' own reading of the same file, an independent implementation of names and layers."""
    size = {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1}
    kind = replace(KINDS["sd2 without its encoder"], linear=linear)
    found = converted(file := tiny(kind, size), yaml_of(kind, size))
    config = {
        "in_channels": 2,
        "out_channels": 2,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 8,
        "attention_head_dim": (1, 2),  # diffusers' name for the number of heads
        "use_linear_projection": linear,
    }
    theirs = UNet2DConditionModel(**config).eval()
    theirs.load_state_dict(convert_ldm_unet_checkpoint(dict(file), theirs.config))
    ours = build(found.params["network"]).eval()
    prefix = "network."
    ours.load_state_dict({name.removeprefix(prefix): one for name, one in found.weights.items()})
    x, t, context = torch.randn(2, 2, 8, 8), torch.tensor([3.0, 871.0]), torch.randn(2, 5, 8)
    expected = theirs(x, t, context).sample
    torch.testing.assert_close(ours(x, t, Conditioning(tokens=context)), expected, rtol=1e-4, atol=1e-5)
