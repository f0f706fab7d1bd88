"""CompVis' first stages: published inventories fit, round trips are exact, and outputs are those of a run."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.autoencoder.codec import Codec
from ldm.config.load import build
from ldm.errors import CheckpointError, ConfigError
from ldm.interop.compvis import first_stage_training
from ldm.interop.compvis.first_stage import FAMILY, PREFIXES, first_stage
from ldm.interop.compvis.first_stage_table import table
from ldm.interop.convert import convert, recognized
from ldm.interop.models import Request
from ldm.interop.sources import Source
from ldm.interop.tables import to_theirs
from tests.interop import foreign

INVENTORIES = Path(__file__).parents[1] / "inventories"
PUBLISHED = sorted(path.name.removesuffix(".json.gz") for path in INVENTORIES.glob("first_stage_*"))
COMPVIS = [name for name in PUBLISHED if "tae" not in name]

# What is said of the published models: down factor, channels of the latent, codes.
FACTS = {
    "kl-f4": (4, 3, 0),
    "kl-f8": (8, 4, 0),
    "kl-f16": (16, 16, 0),
    "kl-f32": (32, 64, 0),
    "vq-f4": (4, 3, 8192),
    "vq-f4-noattn": (4, 3, 8192),
    "vq-f8": (8, 4, 16384),
    "vq-f8-n256": (8, 4, 256),
    "vq-f16": (16, 8, 16384),
    "taming-imagenet": (16, 256, 1024),
    "taming-imagenet-16384": (16, 256, 16384),
    "taming-imagenetdepth": (16, 256, 1024),
    "va-vae-f16d32": (16, 32, 0),
    "flux-ae": (8, 16, 0),
}


def inventory(name: str) -> dict[str, torch.Tensor]:
    """The tensors of a published file, without memory."""
    shapes = json.loads(gzip.decompress((INVENTORIES / f"{name}.json.gz").read_bytes()))
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def of(tensors, path: str = "a.ckpt", config=None, rest=None) -> Source:
    return Source(Path(path), tensors, rest or {}, config or {})


def model(tensors, **about):
    (converted,) = FAMILY.convert(of(tensors, **about), Request())
    return converted


def in_theirs(converted, quant_convs: bool = True):
    own = {name: one for name, one in converted.weights.items() if not name.startswith("loss.")}
    return to_theirs(table(converted.params, quant_convs), own)


def without_loss(tensors):
    beside = ("loss.", "foundation_model.", "linear_proj.")
    return {name: one for name, one in tensors.items() if not name.startswith(beside)}


@pytest.mark.parametrize("name", COMPVIS)
def test_a_published_file_fits_and_goes_out_again(name):
    tensors = inventory(name)
    assert recognized(of(tensors)) is FAMILY
    converted = model(tensors)
    back = in_theirs(converted, quant_convs="quant_conv.weight" in tensors)
    assert {key: one.shape for key, one in back.items()} == {k: v.shape for k, v in without_loss(tensors).items()}
    factor, latent, codes = FACTS[name.removeprefix("first_stage_")]
    encoder = converted.params["encoder"]["params"]
    assert 2 ** (len(encoder["channel_mult"]) - 1) == factor
    assert encoder["latent_channels"] == latent
    assert "norm_groups" not in encoder
    book = converted.params.get("quantizer", {"params": {"size": 0}})
    assert book["params"]["size"] == codes


@pytest.mark.parametrize("name", [name for name in COMPVIS if "flux" not in name])
def test_its_discriminator_comes_along(name):
    tensors = inventory(name)
    converted = model(tensors)
    theirs = {key: one.shape for key, one in tensors.items() if key.startswith("loss.discriminator.")}
    ours = {key: one.shape for key, one in converted.weights.items() if key.startswith("loss.discriminator.")}
    assert {key.replace(".layers.", ".main."): shape for key, shape in ours.items()} == theirs
    with torch.device("meta"):
        loss = build({**converted.params["loss"], "params": {**converted.params["loss"]["params"], "perceptual": None}})
    assert {f"loss.{key}" for key in loss.state_dict()} == {key for key in converted.weights if key.startswith("loss.")}


def test_the_rest_of_a_file_is_counted_by_its_reason():
    dropped = model(inventory("first_stage_va-vae-f16d32")).origin.dropped
    assert set(dropped) == {
        "LPIPS, which is read from its own file",
        "the vision model that VA-VAE was aligned with",
        "the projection to the features of that model",
    }


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_within_a_larger_model_and_the_counts_of_an_average(prefix):
    """Stable Diffusion's autoencoder, as published alone: a kl-f8 without loss, with two counts."""
    tensors = without_loss(inventory("first_stage_kl-f8"))
    tensors |= {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
    named = {f"{prefix}{name}": one for name, one in tensors.items()}
    assert recognized(of(named)) is FAMILY
    converted = model(named)
    assert converted.origin.dropped == {"the count of a moving average": 2}
    assert "discriminator" not in converted.params["loss"]["params"]
    assert any("0.18215" in note for note in converted.origin.notes)


SMALL = {
    "kl": {},
    "attention on a level": {"attention_levels": [1]},
    "no attention": {"middle_attention": False, "num_res_blocks": 2},
    "vq": {"codes": 16, "channel_mult": [1, 1, 2]},
    "gray": {"channels": 1},
    "no quant convolutions": {"quant_convs": False},
}


@pytest.mark.parametrize("name", SMALL)
def test_round_trips_are_exact(name):
    tensors = foreign.first_stage(**SMALL[name])
    back = in_theirs(model(tensors), SMALL[name].get("quant_convs", True))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], one) for key, one in tensors.items())


@pytest.mark.parametrize("name", SMALL)
def test_a_run_gives_the_outputs_of_its_networks(name, tmp_path):
    tensors = foreign.first_stage(**SMALL[name])
    torch.save({"state_dict": tensors, "epoch": 3, "callbacks": {}}, tmp_path / "own.ckpt")
    (run,) = converted_runs(tmp_path / "own.ckpt", Request(resolution=32))
    codec = Codec.load(run)
    params, weights = foreign.own(**SMALL[name])
    parts = {part: build(made).eval() for part, made in params.items()}
    for part, module in parts.items():
        module.load_state_dict({key: weights[f"{part}.{key}"] for key in module.state_dict()})
    images = torch.rand(1, params["encoder"]["params"]["in_channels"], 32, 32) * 2 - 1
    with torch.no_grad():
        latents = parts["encoder"](images)
        latents = latents if "quantizer" in parts else latents.chunk(2, 1)[0]
        codes = parts["quantizer"](latents).mode() if "quantizer" in parts else latents
        pictures = parts["decoder"](codes).clamp(-1, 1)
    assert torch.equal(codec.encode(images)[0], latents)
    assert torch.equal(codec.decode(latents), pictures)


def converted_runs(path: Path, request: Request, config: Path | None = None) -> list[Path]:
    logs = path.parent / "logs"
    assert len([*convert(path, request, config=config, license="MIT", name=None, logdir=logs)]) == 1
    return [*logs.iterdir()]


def test_norms_of_narrow_networks_have_the_groups_of_theirs():
    """32 everywhere in their code, fewer below 128 channels in ours."""
    assert model(foreign.first_stage()).params["encoder"]["params"]["norm_groups"] == 32
    wide = foreign.first_stage(base_channels=128, channel_mult=[1], norm_groups=None)
    assert "norm_groups" not in model(wide).params["encoder"]["params"]


# ---- what it is trained with ----


def described(**params):
    sizes = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 4, "resolution": 64}
    return {"model": {"base_learning_rate": 1e-5, "target": "os.system", "params": {"ddconfig": sizes, **params}}}


def test_the_training_is_that_of_the_original(tmp_path):
    loss = {"params": {"disc_start": 50001, "kl_weight": 2e-6, "disc_weight": 0.7, "disc_loss": "vanilla"}}
    tensors = foreign.first_stage() | foreign.discriminator(2) | {"loss.logvar": torch.tensor(0.5)}
    converted = model(tensors, config=described(lossconfig=loss), rest={"global_step": 50000})
    assert converted.resolution == 64
    params = converted.params["loss"]["params"]
    assert (params["logvar"], params["learn_logvar"], params["kl_weight"]) == (0.5, False, 2e-6)
    assert (params["adversarial_weight"], params["disc_start"]) == (0.7, 1)
    assert params["adversarial"]["target"].endswith("Vanilla")
    assert params["discriminator"]["params"] == {"in_channels": 3, "channels": 8, "layers": 2}
    optimizer = converted.params["optimizer"]["params"]
    assert (optimizer["lr"], optimizer["betas"]) == (pytest.approx(8e-5), [0.5, 0.9])


def test_without_a_description_it_is_the_published_one_and_a_trained_discriminator_goes_on_at_once():
    params = model(foreign.first_stage() | foreign.discriminator()).params
    loss = params["loss"]["params"]
    assert (loss["kl_weight"], loss["adversarial_weight"], loss["disc_start"]) == (1e-6, 0.5, 0)
    assert params["optimizer"]["params"]["lr"] == pytest.approx(3.6e-5)


def test_a_codebook_has_the_published_weights():
    """taming's `legacy` puts its 0.25 on the codebook: commitment 4 at a quarter of the weight, of means."""
    params = model(foreign.first_stage(codes=16) | foreign.discriminator(), config=described()).params
    assert params["quantizer"]["params"] == {"size": 16, "channels": 4, "commitment": 4.0}
    loss = params["loss"]["params"]
    assert loss["kl_weight"] == 0.25 * (3 * 64 * 64) / (4 * 32 * 32)
    assert (loss["adversarial_weight"], loss["max_adversarial_weight"]) == (0.75, 1e4 * 3 * 64 * 64)


def test_the_codebook_loss_is_that_of_the_original():
    """mean (sg(code) - z)^2 + 0.25 mean (code - sg(z))^2, times the values of an image."""
    params = model(foreign.first_stage(codes=16), config=described()).params
    quantizer = build(params["quantizer"])
    latents = torch.randn(1, 4, 32, 32, requires_grad=True)
    posterior = quantizer(latents)
    (params["loss"]["params"]["kl_weight"] * posterior.regularization_loss().mean()).backward()
    own = latents.grad, quantizer.codebook.weight.grad
    latents.grad = quantizer.codebook.weight.grad = None
    codes = torch.nn.functional.embedding(posterior.indices, quantizer.codebook.weight).movedim(-1, 1)
    theirs = (codes.detach() - latents).square().mean() + 0.25 * (codes - latents.detach()).square().mean()
    (theirs * 3 * 64 * 64).backward()
    torch.testing.assert_close(own, (latents.grad, quantizer.codebook.weight.grad))


def test_without_lpips_weights_there_is_a_note_and_no_such_term(monkeypatch):
    def nowhere(_):
        raise CheckpointError("not here")

    assert "perceptual" in model(foreign.first_stage()).params["loss"]["params"]
    monkeypatch.setattr(first_stage_training.cache, "find_any", nowhere)
    converted = model(foreign.first_stage())
    assert "perceptual" not in converted.params["loss"]["params"]
    assert any("ldm weights --fetch" in note for note in converted.origin.notes)


@pytest.mark.parametrize("odd", ["conditional", "actnorm"])
def test_a_discriminator_of_another_kind_is_left_out(odd):
    tensors = foreign.discriminator()
    if odd == "conditional":
        tensors["loss.discriminator.main.0.weight"] = torch.zeros(8, 6, 4, 4)
    else:
        tensors = {name: one for name, one in tensors.items() if "running" not in name}
    converted = model(foreign.first_stage() | tensors)
    assert "discriminator" not in converted.params["loss"]["params"]
    assert converted.origin.dropped == {"the training loss, of another kind than ours": len(tensors)}


# ---- how latents are scaled ----


def test_statistics_that_are_known(tmp_path):
    assert model(foreign.first_stage()).statistics is None
    assert model(foreign.first_stage(codes=16)).statistics == {"mean": [0.0] * 4, "std": [1.0] * 4}
    taken_for_flux = model(foreign.first_stage(quant_convs=False, latent_channels=16))
    assert any("taken to be FLUX.1's; --statistics" in note for note in taken_for_flux.origin.notes)
    flux = taken_for_flux.statistics
    assert flux["mean"] == [0.1159] * 16
    assert flux["std"] == pytest.approx([1 / 0.3611] * 16)
    scaled = model(foreign.first_stage(), config=described(scale_factor=0.18215)).statistics
    assert scaled["std"] == pytest.approx([1 / 0.18215] * 4)
    assert model(foreign.first_stage(), config=described(scale_factor=0.2, scale_by_std=True)).statistics is None
    file = tmp_path / "stats.json"
    file.write_text(json.dumps({"mean": [1, 2, 3, 4], "std": [5, 6, 7, 8]}))
    (given,) = FAMILY.convert(of(foreign.first_stage()), Request(statistics=file))
    assert given.statistics == {"mean": [1, 2, 3, 4], "std": [5, 6, 7, 8]}


def test_statistics_arrive_in_the_codec(tmp_path):
    save_file(foreign.first_stage(quant_convs=False, latent_channels=16), tmp_path / "ae.safetensors")
    (run,) = converted_runs(tmp_path / "ae.safetensors", Request())
    codec = Codec.load(run)
    assert codec.statistics["mean"] == [0.1159] * 16
    assert codec.size == (256, 256)


def test_trained_convolutions_cannot_go_out_to_flux():
    converted = model(foreign.first_stage(quant_convs=False))
    converted.weights["encoder.quant_conv.weight"][0, 0] += 0.1
    with pytest.raises(CheckpointError, match=r"encoder\.quant_conv\.weight: has been trained"):
        in_theirs(converted, quant_convs=False)


# ---- what does not fit ----


def test_a_description_of_another_model_is_refused():
    other = described()
    other["model"]["params"]["ddconfig"]["ch_mult"] = [1, 2, 4]
    with pytest.raises(ConfigError, match=r"YAML of another model.*ch_mult \[1, 2, 4\] \(\[1, 2\] here\)"):
        model(foreign.first_stage(), config=other)
    with pytest.raises(ConfigError, match=r"tanh_out True"):
        model(foreign.first_stage(), config={"model": {"params": {"ddconfig": {"tanh_out": True}}}})
    with pytest.raises(ConfigError, match=r"ddconfig\.resolution: expected pixels, found 'large'"):
        model(foreign.first_stage(), config={"model": {"params": {"ddconfig": {"resolution": "large"}}}})


def test_descriptions_that_are_no_descriptions_say_nothing():
    for odd in ({"model": 3}, {"model": {"params": [1]}}, {"model": {"params": {"ddconfig": "x", "lossconfig": 1}}}):
        assert model(foreign.first_stage(), config=odd).resolution == 256


def test_another_quantizer_is_named():
    tensors = {name: one for name, one in foreign.first_stage(codes=16).items() if "quantize." not in name}
    with pytest.raises(CheckpointError, match=r"quantize\.embedding\.weight is missing"):
        model(tensors | {"quantize.embed.weight": torch.zeros(16, 4)})


@pytest.mark.parametrize("broken", [torch.zeros(()), torch.zeros(0, 3, 3, 3), torch.zeros(32)])
def test_shapes_that_say_nothing_are_a_message(broken):
    with pytest.raises(CheckpointError):
        model(foreign.first_stage() | {"encoder.conv_in.weight": broken})


def test_one_tensor_too_many_too_few_or_of_another_shape():
    tensors = foreign.first_stage(attention_levels=[1])
    name = "encoder.mid.block_2.conv2.weight"
    rest = {key: one for key, one in tensors.items() if key != name}
    for wrong, said in (
        (rest, f"missing (1):\n    {name}"),
        (
            tensors | {"encoder.temb.weight": torch.zeros(3)},
            "in no place of this model (1):\n    encoder.temb.weight [3]",
        ),
        (tensors | {name: torch.zeros(64, 64, 1, 1)}, f"{name}: expected [64, 64, 3, 3], found [64, 64, 1, 1]"),
        (tensors | {name: tensors[name] * torch.nan}, f"not finite (NaN or infinity) (1):\n    {name}"),
    ):
        with pytest.raises(CheckpointError) as caught:
            model(wrong)
        assert said in str(caught.value)
        assert "a.ckpt (CompVis first stage)" in str(caught.value)


def test_a_part_of_a_larger_file_that_is_not_whole_is_a_message():
    tensors = foreign.first_stage()
    tensors.pop("decoder.conv_in.weight")
    with pytest.raises(CheckpointError, match=r"missing or empty: decoder\.conv_in\.weight"):
        first_stage(tensors, of(tensors), Request())
