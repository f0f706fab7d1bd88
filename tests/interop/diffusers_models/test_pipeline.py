"""Folders for diffusers: of every kind of model, the library makes the picture that ldm makes of the same noise."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ldm.autoencoder.codec import AutoencoderCodec, Codec, Pixels
from ldm.config.load import build
from ldm.errors import ConfigError, NumericError
from ldm.images import to_arrays
from ldm.interop import sources
from ldm.interop.diffusers import FirstStage
from ldm.interop.diffusers_models import check as diffusers_check
from ldm.interop.diffusers_models import first_stage as diffusers_first_stage
from ldm.interop.diffusers_models import folder as diffusers_folder
from ldm.interop.diffusers_models import pipeline as diffusers_pipeline
from ldm.interop.diffusers_models.check import drawn, loaded, ours, theirs
from ldm.interop.diffusers_models.regular import Regular
from ldm.interop.exports.trained import Diffusion, Trained
from ldm.interop.exports.usage import Choices
from ldm.interop.models import Request, node
from ldm.latents.manifest import CacheSpec, Manifest
from ldm.randomness import Draws
from ldm.sampling.generate import SEED, generate
from ldm.sampling.guidance import Guidance
from ldm.sampling.pipeline import Pipeline
from tests.tiny_text import LONGEST, WIDTH, save_text_encoder

diffusers = pytest.importorskip("diffusers")

CLOSE = 1e-4
OWN = ["pipeline", "LatentDiffusionPipeline"]
LATENTS = ([0.3, -0.2, 0.1, 0.0], [0.7, 1.1, 0.9, 2.0])
UNCHECKED = Choices(check=False)

SQRT = node("diffusion.noise_schedules.SqrtLinear")
DDPM = node("diffusion.objectives.DDPM", schedule=SQRT, prediction=node("diffusion.predictions.V"))
EPS = node("diffusion.objectives.DDPM", schedule=SQRT)
EDM = node("diffusion.objectives.EDM", sigma_max=20.0)
FLOW = node("diffusion.objectives.Flow")
OBJECTIVES = {"DDPM": DDPM, "eps": EPS, "EDM": EDM, "flow": FLOW}

EDM2 = node(
    "diffusion.networks.edm2.MagnitudePreservingUNet",
    in_channels=4,
    model_channels=16,
    channel_mult=[1, 1],
    num_res_blocks=1,
    attention_levels=[],
)

UNCONDITIONAL = node("diffusion.conditioners.base.Unconditional")
VECTOR = node("diffusion.conditioners.classes.ClassVector", num_classes=3, channels=16)
TOKEN = node("diffusion.conditioners.classes.ClassToken", num_classes=3, channels=16)
OF_DIT = node("diffusion.conditioners.classes.ClassVector", num_classes=3, channels=32)


def unet(**more: Any) -> dict[str, Any]:
    """All of its norms have the same number of groups, as in the library."""
    sizes = {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_levels": [1]}
    return node(
        "diffusion.networks.unet.UNet", **{"in_channels": 4, "num_head_channels": 16, "norm_groups": 8, **sizes, **more}
    )


def dit(**more: Any) -> dict[str, Any]:
    sizes = {"patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 2}
    return node("diffusion.networks.dit.DiT", **{"in_channels": 4, **sizes, **more})


def joint(**parts: Mapping[str, Any]) -> dict[str, Any]:
    return node("diffusion.conditioners.joint.Joint", conditioners=parts)


def first_stage(quantized: bool = False, **more: Any) -> AutoencoderCodec:
    sizes = {"base_channels": 16, "channel_mult": [1, 1], "num_res_blocks": 1, "latent_channels": 4, **more}
    parts = {
        "encoder": node("autoencoder.networks.Encoder", in_channels=3, moments=not quantized, **sizes),
        "decoder": node("autoencoder.networks.Decoder", out_channels=3, **sizes),
    }
    if quantized:
        parts["quantizer"] = node("autoencoder.quantizer.VectorQuantizer", size=4, channels=4)
    made = {name: build(one) for name, one in parts.items()}
    if quantized:
        nn.init.normal_(made["quantizer"].codebook.weight)
    return AutoencoderCodec(made["encoder"], made["decoder"], parts, 16, quantizer=made.get("quantizer"))


def trained(
    network: Mapping[str, Any],
    conditioner: Mapping[str, Any],
    objective: Mapping[str, Any],
    codec: Codec | None = None,
    scale: tuple[list[float], list[float]] = LATENTS,
    size: tuple[int, int] = (8, 8),
) -> Trained:
    """A model of random weights that are large enough for every part to matter."""
    torch.manual_seed(0)
    codec = codec or first_stage()
    params = {"network": network, "conditioner": conditioner, "objective": objective, "label_dropout": 0.1}
    denoiser = nn.ModuleDict({name: build(params[name]) for name in ("network", "conditioner")})
    for weight in denoiser.parameters():
        if weight.ndim > 1 and not weight.any():
            nn.init.normal_(weight, std=0.05)
    channels = network["params"]["in_channels"]
    classes = 3 if "class_label" in denoiser["conditioner"].keys else None
    plan = CacheSpec(
        shape=(channels, *size),
        num_items=0,
        source="",
        pixels={"resolution": [2 * side for side in size], "channels": 3},
        autoencoder={"weights": "", "config": codec.config, "path": ""},
        num_classes=classes,
        class_names=["cat", "dog", "boat"] if classes else None,
    )
    manifest = Manifest(plan, *scale, broken=[], shards=[])
    denoiser.requires_grad_(False).eval()
    diffusion = Diffusion(denoiser, build(objective), manifest, "ema")
    return Trained(Path("step=7.ckpt"), {}, {"model": {"params": params}}, codec, diffusion)


def of(model: Trained) -> Diffusion:
    assert model.diffusion is not None
    return model.diffusion


def compared(model: Trained, folder: Path, batches: Sequence[dict[str, Any] | None], scales: Sequence[float]) -> Any:
    """The folder's pictures of these conditions, two each, and the model's; returns the pipeline."""
    diffusion, pipeline = of(model), loaded(folder)
    noise, times = drawn(0, (2, *diffusion.manifest.plan.shape)), diffusion.objective.timesteps(10)
    for batch, scale in product(batches, scales):
        own = ours(model.codec, diffusion, noise, batch, scale, times)
        other = theirs(pipeline, 0, 2, batch, scale, 10)
        assert (own.abs() < 0.99).float().mean() > 0.1, "a picture of clamped values would hide a difference"
        torch.testing.assert_close(other, own, rtol=0, atol=CLOSE)
    return pipeline


def written(model: Trained, folder: Path) -> str | list[str]:
    """Writes it; the class of its pipeline."""
    diffusers_pipeline.write(model, folder, UNCHECKED)
    name: str | list[str] = json.loads((folder / "model_index.json").read_text())["_class_name"]
    return name


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_unconditional(objective, tmp_path):
    model = trained(unet(), UNCONDITIONAL, objective)
    of_library = objective["target"].endswith("DDPM")
    assert written(model, tmp_path) == ("LDMPipeline" if of_library else OWN)
    compared(model, tmp_path, [None], [1.0])


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize(
    ("network", "conditioner"),
    [
        (unet(vector_channels=16), VECTOR),
        (unet(context_dim=16), TOKEN),
        (dit(), OF_DIT),
        (dit(vector_channels=16), VECTOR),
    ],
    ids=["UNet, vector", "UNet, token", "DiT", "DiT, projected"],
)
def test_classes(network, conditioner, objective, tmp_path):
    model = trained(network, conditioner, objective)
    assert written(model, tmp_path) == OWN
    batches = [{"class_label": torch.tensor(labels)} for labels in ([2, 0], [1, 2])]
    compared(model, tmp_path, batches, [1.0, 2.5])
    pipeline = compared(model, tmp_path, [None], [1.0])
    assert pipeline.config.class_names == ["cat", "dog", "boat"]


@pytest.mark.parametrize("objective", [DDPM, FLOW], ids=["DDPM", "flow"])
@pytest.mark.parametrize(
    ("network", "conditioner"),
    [
        (dit(), UNCONDITIONAL),
        (dit(), node("diffusion.conditioners.classes.ClassVector", num_classes=None, channels=32)),
        (unet(vector_channels=16), node("diffusion.conditioners.classes.ClassVector", num_classes=None, channels=16)),
        (unet(context_dim=16), node("diffusion.conditioners.classes.ClassToken", num_classes=None, channels=16)),
    ],
    ids=["DiT", "DiT, one row", "UNet, one row", "UNet, one token"],
)
def test_networks_of_conditions_without_classes(network, conditioner, objective, tmp_path):
    model = trained(network, conditioner, objective)
    written(model, tmp_path)
    compared(model, tmp_path, [None], [1.0])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Hashes of text encoders are remembered in the working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_text_encoder(tmp_path_factory.mktemp("text") / "text_encoder")


def text(encoder: Path, **more: Any) -> dict[str, Any]:
    return node(
        "diffusion.conditioners.text.FrozenText", encoder=str(encoder), channels=WIDTH, max_length=LONGEST, **more
    )


CAPTIONS = {"caption": ["a red cat", "a photo of a blue boat on a green dog"]}


@pytest.mark.parametrize("layer", [-1, -2])
def test_texts_of_stable_diffusion(encoder, layer, tmp_path):
    """Exact in the library's own pipeline, which any tool of Stable Diffusion reads."""
    model = trained(unet(context_dim=WIDTH), text(encoder, layer=layer), DDPM)
    assert written(model, tmp_path) == "StableDiffusionPipeline"
    compared(model, tmp_path, [CAPTIONS], [1.0, 5.0])


def feature(encoder: Path, **more: Any) -> dict[str, Any]:
    params = {"encoder": str(encoder), "channels": WIDTH, "max_length": LONGEST, "padding": True} | more
    made = node("diffusion.conditioners.text.TextEncoder", **params)
    return node("diffusion.conditioners.text.FeatureText", feature=made)


@pytest.mark.parametrize("beside", [False, True])
def test_texts_that_a_cache_keeps(encoder, beside, tmp_path):
    """Which are rounded there: the folder reads those of the encoder, as its tools do."""

    def made(captions):
        if not beside:
            return trained(unet(context_dim=WIDTH), captions, DDPM)
        return trained(unet(context_dim=WIDTH, vector_channels=16), joint(captions=captions, classes=VECTOR), DDPM)

    diffusers_pipeline.write(made(feature(encoder, layer=-2)), tmp_path, Choices())
    batch = CAPTIONS | ({"class_label": torch.tensor([2, 0])} if beside else {})
    compared(made(text(encoder, layer=-2)), tmp_path, [batch], [1.0, 5.0])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"padding": False}, "padding: expected True, as the library's pipelines read texts, found False"),
        ({"prefix": "query: "}, "prefix: expected '', .* found 'query: '"),
        ({"pooling": node("diffusion.conditioners.pooling.Mean")}, "pooling: expected None"),
    ],
)
def test_texts_that_are_read_in_another_way_are_refused(encoder, more, said, tmp_path):
    width = {"vector_channels": WIDTH} if "pooling" in more else {}
    with pytest.raises(ConfigError, match=f"TextEncoder: {said}"):
        written(trained(unet(context_dim=WIDTH, **width), feature(encoder, **more), DDPM), tmp_path)


@pytest.mark.parametrize("objective", [EDM, FLOW], ids=["EDM", "flow"])
def test_texts_of_other_objectives(encoder, objective, tmp_path):
    model = trained(unet(context_dim=WIDTH), text(encoder), objective)
    assert written(model, tmp_path) == OWN
    pipeline = compared(model, tmp_path, [CAPTIONS], [1.0, 5.0])
    one, two = (
        pipeline(prompt=prompt, batch_size=2, num_inference_steps=2, generator=torch.manual_seed(0), output_type="pt")
        for prompt in ("a red cat", ["a red cat", "a red cat"])
    )
    assert torch.equal(one.images, two.images)


def test_texts_and_classes_at_once(encoder, tmp_path):
    both = joint(captions=text(encoder), classes=VECTOR)
    model = trained(unet(context_dim=WIDTH, vector_channels=16), both, DDPM)
    assert written(model, tmp_path) == OWN
    compared(model, tmp_path, [CAPTIONS | {"class_label": torch.tensor([2, 0])}], [1.0, 2.5])


def test_an_encoder_whose_words_see_all_others(tmp_path):
    """BERT hides its padding, which CLIP need not."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    bert = BertModel(BertConfig(vocab_size=12, max_position_embeddings=LONGEST, **sizes), add_pooling_layer=False)
    folder = save_text_encoder(tmp_path / "bert", network=bert)
    model = trained(unet(context_dim=WIDTH), text(folder), DDPM)
    assert written(model, tmp_path / "out") == OWN
    compared(model, tmp_path / "out", [CAPTIONS], [2.5])


PIXELS = {"in_channels": 3}
OF_PIXELS = ([0.1, 0.0, -0.1], [0.5, 0.4, 0.6])


@pytest.mark.parametrize("scale", [([0.0] * 3, [1.0] * 3), OF_PIXELS], ids=["plain", "scaled"])
def test_models_of_pixels(scale, tmp_path):
    model = trained(unet(**PIXELS), UNCONDITIONAL, DDPM, Pixels(3), scale)
    assert written(model, tmp_path) == ("DDIMPipeline" if scale[1][0] == 1.0 else OWN)
    compared(model, tmp_path, [None], [1.0])


def test_a_dit_of_pixels(tmp_path):
    model = trained(dit(**PIXELS), OF_DIT, FLOW, Pixels(3), OF_PIXELS)
    written(model, tmp_path)
    compared(model, tmp_path, [{"class_label": torch.tensor([2, 0])}], [2.5])


@pytest.mark.parametrize("scale", [([0.0] * 4, [1.5] * 4), LATENTS])
def test_a_codebook(scale, tmp_path):
    """One factor for all channels keeps the nearest codes; else our pipeline has the latents' scale."""
    model = trained(unet(), UNCONDITIONAL, DDPM, first_stage(quantized=True), scale)
    assert written(model, tmp_path) == ("LDMPipeline" if scale[1][0] == 1.5 else OWN)
    compared(model, tmp_path, [None], [1.0])


@pytest.mark.parametrize("network", [unet(norm_groups=None), dit()], ids=["UNet", "DiT"])
def test_narrow_networks_and_patches_of_pixels(network, tmp_path):
    """Of which the library's classes know nothing, so that our pipeline has the norms' groups and the patches."""
    conditioner = OF_DIT if network["target"].endswith("DiT") else UNCONDITIONAL
    model = trained(network, conditioner, DDPM, first_stage(base_channels=8, channel_mult=[1, 4], patch_size=2))
    assert written(model, tmp_path) == OWN
    pipeline = compared(model, tmp_path, [None], [1.0])
    assert pipeline.config.norm_groups["vae"] == {"8": 2, "32": 8}
    assert pipeline(num_inference_steps=1).images[0].size == (32, 32)
    with pytest.raises(ConfigError, match="norm_groups, patch_size"):
        diffusers_folder.convert(sources.read(tmp_path), Request())


@pytest.mark.parametrize("scale", [([0.0] * 4, [1 / 0.18215] * 4), LATENTS], ids=["its own", "measured"])
def test_a_first_stage_of_the_library_stays_as_it_is(scale, tmp_path):
    diffusers_pipeline.loaded(exported(first_stage(), ([0.0] * 4, [1 / 0.18215] * 4))).save_pretrained(tmp_path / "vae")
    codec = FirstStage(tmp_path / "vae")
    model = trained(unet(), UNCONDITIONAL, DDPM, codec, scale)
    own = scale[1][0] == 1 / 0.18215
    assert written(model, tmp_path / "out") == ("LDMPipeline" if own else OWN)
    compared(model, tmp_path / "out", [None], [1.0])


def exported(codec: AutoencoderCodec, scale: tuple[list[float], list[float]]) -> Any:
    return diffusers_first_stage.exported(codec, Regular(codec.config), dict(zip(("mean", "std"), scale, strict=True)))


def test_pictures_that_are_no_square(tmp_path):
    model = trained(unet(), UNCONDITIONAL, DDPM, size=(4, 8))
    assert written(model, tmp_path) == OWN
    compared(model, tmp_path, [None], [1.0])


def test_the_scale_of_stable_diffusion_stays_one_number(encoder, tmp_path):
    """And its autoencoder as it was."""
    codec = first_stage()
    model = trained(unet(context_dim=WIDTH), text(encoder), EPS, codec, ([0.0] * 4, [1 / 0.18215] * 4))
    assert written(model, tmp_path) == "StableDiffusionPipeline"
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert vae.config.scaling_factor == 0.18215
    assert torch.equal(vae.post_quant_conv.weight, codec.decoder.post_quant_conv.weight)
    compared(model, tmp_path, [CAPTIONS], [2.0])


def test_an_autoencoder_that_takes_over_the_scale_encodes_with_it(tmp_path):
    model = trained(unet(), UNCONDITIONAL, DDPM)
    written(model, tmp_path)
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vqvae")
    images = drawn(1, (2, 3, 16, 16)).tanh()
    posterior = vae.encode(images).latent_dist
    mean, std = model.codec.encode(images)
    torch.testing.assert_close(posterior.mean, of(model).manifest.standardize(mean), rtol=0, atol=1e-5)
    scale = torch.tensor(of(model).manifest.std)[:, None, None]
    torch.testing.assert_close(posterior.std, std / scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("quantized", [False, True], ids=["KL", "VQ"])
def test_a_first_stage_alone(quantized, tmp_path):
    codec = first_stage(quantized)
    model = Trained(Path("step=7.ckpt"), {}, {"model": {"params": {}}}, codec)
    diffusers_pipeline.write(model, tmp_path, Choices())
    name = "VQModel" if quantized else "AutoencoderKL"
    theirs = getattr(diffusers, name).from_pretrained(tmp_path)
    latents = drawn(0, (2, 4, 4, 4))
    torch.testing.assert_close(theirs.decode(latents).sample.clamp(-1, 1), codec.decode(latents), rtol=0, atol=1e-5)


def test_noise_of_ones_own_and_outputs(tmp_path):
    """`latents` is the noise; drawn from a generator it is the same."""
    model = trained(dit(), OF_DIT, FLOW)
    written(model, tmp_path)
    pipeline = loaded(tmp_path)
    given = {"class_labels": [0, 1], "num_inference_steps": 2}
    noise = drawn(5, (2, 4, 8, 8))
    pictures = pipeline(**given, latents=noise, output_type="pt").images
    assert torch.equal(pictures, pipeline(**given, generator=torch.manual_seed(5), output_type="pt").images)
    assert pictures.shape == (2, 3, 16, 16)
    assert pipeline(**given, latents=noise, output_type="latent").images.shape == (2, 4, 8, 8)
    (images,) = pipeline(**given, latents=noise, return_dict=False)
    assert images[0].size == (16, 16)
    with pytest.raises(ValueError, match="prompt: this model was trained without texts"):
        pipeline(prompt="a cat")
    for more in ({"batch_size": 4}, {"latents": noise, "batch_size": 4}, {"latents": noise[:1]}):
        with pytest.raises(ValueError, match="expected one for each of"):
            pipeline(class_labels=[0, 1], guidance_scale=2.0, **more)


def test_a_folder_loads_without_a_warning(tmp_path):
    written(trained(dit(), OF_DIT, FLOW), tmp_path)
    said = StringIO()
    handler = logging.StreamHandler(said)
    diffusers.utils.logging.add_handler(handler)
    try:
        diffusers.DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    finally:
        diffusers.utils.logging.remove_handler(handler)
    assert said.getvalue() == ""


def test_a_first_stage_with_two_numbers_of_groups_for_one_width_is_refused(tmp_path):
    """Nothing in the folder could tell these norms apart."""
    codec = first_stage()
    decoder = codec.config["decoder"] | {"params": codec.config["decoder"]["params"] | {"norm_groups": 8}}
    other = AutoencoderCodec(codec.encoder, build(decoder), {**codec.config, "decoder": decoder}, 16)
    for model in (trained(unet(), UNCONDITIONAL, DDPM, other), Trained(Path("a.ckpt"), {}, {}, other)):
        with pytest.raises(ConfigError, match="norms of 16 channels have 4 and 8 groups"):
            diffusers_pipeline.write(model, tmp_path, UNCHECKED)


def test_an_encoder_that_reads_other_pictures_is_refused(tmp_path):
    codec = first_stage()
    encoder = codec.config["encoder"] | {"params": codec.config["encoder"]["params"] | {"unit_range": True}}
    other = AutoencoderCodec(build(encoder), codec.decoder, {**codec.config, "encoder": encoder}, 16)
    for model in (trained(unet(), UNCONDITIONAL, DDPM, other), Trained(Path("a.ckpt"), {}, {}, other)):
        with pytest.raises(ConfigError, match=r"unit_range=True(.|\n)*--to safetensors"):
            diffusers_pipeline.write(model, tmp_path, UNCHECKED)
    assert not [*tmp_path.iterdir()]


def test_the_pictures_compared_are_those_of_ldm_sample():
    """`ours` of diffusers_check.py is what generate.py makes with its defaults."""
    model = trained(unet(vector_channels=16), VECTOR, DDPM)
    diffusion = of(model)
    pipeline = Pipeline(diffusion.denoiser, diffusion.objective, model.codec, diffusion.manifest, 0.1)
    conditions = [{"class_label": 2}, {"class_label": 0}]
    samples = generate(pipeline, [3, 4], conditions, steps=10, guidance=Guidance(2.0))
    noise = Draws(SEED, [3, 4], 2).normal("noise", diffusion.manifest.plan.shape)
    batch = {"class_label": torch.tensor([2, 0])}
    own = ours(model.codec, diffusion, noise, batch, 2.0, diffusion.objective.timesteps(10))
    assert np.array_equal(to_arrays(own), np.stack([sample.image for sample in samples]))


@pytest.mark.parametrize(
    ("network", "conditioner", "objective", "named"),
    [
        (dit(rope=True, swiglu=True), OF_DIT, FLOW, "rope=True"),
        (EDM2, UNCONDITIONAL, EDM, "MagnitudePreservingUNet has no counterpart"),
        (unet(vector_channels=32), joint(one=VECTOR, two=VECTOR), DDPM, "Joint of ClassVector, ClassVector"),
        (unet(), UNCONDITIONAL, node("diffusion.objectives.Flow", prediction=node("diffusion.predictions.X0")),
         "Linear with the prediction X0"),
        (unet(num_heads=2, num_head_channels=None, attention_levels=[0, 1]), UNCONDITIONAL, DDPM, "num_heads: one"),
    ],
    ids=["modern DiT", "EDM2", "two vectors", "flow of x0", "heads"],
)  # fmt: skip
def test_what_has_no_counterpart_is_refused_by_name(network, conditioner, objective, named, tmp_path):
    with pytest.raises(ConfigError, match=named):
        diffusers_pipeline.write(trained(network, conditioner, objective), tmp_path, UNCHECKED)
    assert not [*tmp_path.iterdir()]


def test_what_is_written_is_compared(tmp_path, monkeypatch):
    """With the model as it is; and with one whose decoder was another."""
    model = trained(dit(), OF_DIT, FLOW)
    diffusers_pipeline.write(model, tmp_path / "same", Choices())
    inexact = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    planned = diffusers_pipeline.planned

    def wrong(*given: Any) -> Any:
        plan = planned(*given)
        return replace(plan, settings={**plan.settings, **inexact})

    monkeypatch.setattr(diffusers_pipeline, "planned", wrong)
    diffusers_pipeline.write(model, tmp_path / "unseen", UNCHECKED)
    with pytest.raises(NumericError, match="differ from the model's by"):
        diffusers_pipeline.write(model, tmp_path / "other", Choices())


def test_a_model_that_amplifies_rounding_is_judged_by_how_much():
    at = build(node("diffusion.objectives.DDPM", schedule=node("diffusion.noise_schedules.Cosine")))
    calm = build(DDPM)
    assert diffusers_check._amplification(at, at.timesteps(10)) > 1000
    assert diffusers_check._amplification(calm, calm.timesteps(10)) < 2
