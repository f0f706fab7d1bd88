"""Folders that diffusers saved become runs that compute the same; of those that cannot, one message each."""

import json
import shutil

import diffusers
import pytest
import torch
import transformers

from ldm.autoencoder.codec import Codec
from ldm.cli import convert as program
from ldm.diffusion.conditioners.base import Conditioning
from ldm.errors import CheckpointError, ConfigError
from ldm.interop.convert import convert
from ldm.interop.models import Request
from ldm.sampling.guidance import Guidance
from ldm.sampling.pipeline import Pipeline
from tests.interop.diffusers_files import difference, randomized
from tests.tiny_text import WIDTH, clip_config, save_tokenizer

CLOSE = 1e-5
TIMES = torch.tensor([4.0, 800.0])
BLOCKS = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
LEVELS = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
SIZES = {"block_out_channels": [16, 32], "norm_num_groups": 8, "sample_size": 16}


def vae(**settings):
    return randomized(diffusers.AutoencoderKL(**LEVELS, **SIZES, **settings))


def vqvae(**settings):
    return randomized(diffusers.VQModel(**LEVELS, **SIZES, num_vq_embeddings=20, **settings))


def unet(**settings):
    return randomized(diffusers.UNet2DModel(**{"sample_size": 8, **BLOCKS, **settings}))


def text_unet(**settings):
    kinds = {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }
    sizes = BLOCKS | kinds | {"cross_attention_dim": WIDTH, "attention_head_dim": 4, "sample_size": 8}
    return randomized(diffusers.UNet2DConditionModel(**{**sizes, **settings}))


def dit(**settings):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "num_embeds_ada_norm": 5}
    made = randomized(diffusers.DiTTransformer2DModel(**{**sizes, "sample_size": 8, "out_channels": 8, **settings}))
    for block in made.transformer_blocks:
        block.norm1.emb.load_state_dict(made.transformer_blocks[0].norm1.emb.state_dict())
    return made


def clip(folder):
    """A tiny text encoder and its tokenizer."""
    save_tokenizer(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    return randomized(transformers.CLIPTextModel(clip_config())), tokenizer


def saved(model, folder, **settings):
    model.save_pretrained(folder, **settings)
    return folder


def runs(folder, tmp_path, **request):
    """The run folders that become of it, the first stage's first."""
    lines = convert(folder, Request(**request), config=None, license="MIT", name=None, logdir=tmp_path / "logs")
    return [line.partition("  from ")[0] for line in lines]


def edited(folder, part, **changes):
    """The folder with these settings in the config.json of one of its parts."""
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize("settings", [{}, {"safe_serialization": False}, {"max_shard_size": "20KB"}])
@pytest.mark.parametrize("make", [vae, vqvae])
def test_an_autoencoder(make, settings, tmp_path):
    theirs = make()
    [run] = runs(saved(theirs, tmp_path / "model", **settings), tmp_path)
    codec = Codec.load(run)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    encoded = theirs.encode(images)
    expected = encoded.latents if make is vqvae else encoded.latent_dist.mean
    found, _ = codec.encode(images)
    assert difference(found, expected) < CLOSE
    assert difference(codec.decode(found), theirs.decode(found).sample.clamp(-1, 1)) < CLOSE
    assert codec.size == (16, 16)
    assert codec.statistics["std"] == [1 / 0.18215] * found.shape[1]


@pytest.mark.parametrize("kind", [diffusers.DDPMPipeline, diffusers.DDIMPipeline])
def test_pixels(kind, tmp_path):
    theirs = unet(sample_size=(8, 16))
    folder = saved(kind(theirs, diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")), tmp_path / "ddpm")
    [run] = runs(folder, tmp_path)
    pipeline = Pipeline.load(run)
    x = torch.randn(2, 3, 8, 16)
    assert difference(pipeline.denoiser["network"](x, TIMES, Conditioning()), theirs(x, TIMES).sample) < CLOSE
    assert pipeline.manifest.plan.shape == (3, 8, 16)
    assert pipeline.generate([0], steps=2)[0].size == (16, 8)


def test_latent_diffusion_without_conditions(tmp_path):
    theirs = diffusers.LDMPipeline(vqvae(scaling_factor=0.5), unet(), diffusers.DDIMScheduler())
    first, run = runs(saved(theirs, tmp_path / "ldm"), tmp_path)
    pipeline = Pipeline.load(run)
    x = torch.randn(2, 3, 8, 8)
    assert difference(pipeline.denoiser["network"](x, TIMES, Conditioning()), theirs.unet(x, TIMES).sample) < CLOSE
    assert (pipeline.manifest.mean, pipeline.manifest.std) == ([0.0] * 3, [2.0] * 3)
    expected = theirs.vqvae.decode(x / 0.5).sample.clamp(-1, 1)
    assert difference(pipeline.codec.decode(pipeline.manifest.unstandardize(x)), expected) < CLOSE
    assert Codec.load(first).weight_hash() == pipeline.codec.weight_hash()


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "Transformer2DModel"])
def test_dit(name, tmp_path):
    theirs = diffusers.DiTPipeline(dit(), vae(), diffusers.DDIMScheduler())
    folder = saved(theirs, tmp_path / "dit")
    if name == "Transformer2DModel":  # as it was called before there was a class of its own
        edited(folder, "transformer", _class_name=name, cross_attention_dim=None, attention_type="default")
    _, run = runs(folder, tmp_path)
    pipeline = Pipeline.load(run)
    for block in theirs.transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 5])
    given = pipeline.conditioner({"class_label": torch.tensor([3, 0])})
    null = pipeline.conditioner.null(2)
    conditioning = Conditioning(torch.stack([given.vector[0], null.vector[1]]))
    expected = theirs.transformer(x, TIMES, class_labels=labels).sample[:, :4]
    assert difference(pipeline.denoiser["network"](x, TIMES, conditioning), expected) < CLOSE
    assert pipeline.num_classes == 5
    assert pipeline.knows_null
    origin = json.loads((tmp_path / "logs" / run / "origin.json").read_text())
    assert any("frequencies" in note for note in origin["notes"])
    pipeline.generate([0], [{"class_label": 4}], steps=2, guidance=Guidance(2.0))


def stable_diffusion(tmp_path, unet=None):
    text_encoder, tokenizer = clip(tmp_path / "words")
    parts = {"vae": vae(), "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet or text_unet()}
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline(**parts, scheduler=scheduler, **nothing)


def test_stable_diffusion(tmp_path):
    theirs = stable_diffusion(tmp_path)
    folder = saved(theirs, tmp_path / "sd")
    _, run = runs(folder, tmp_path)
    shutil.rmtree(folder)  # the run holds all of it
    pipeline = Pipeline.load(run)
    x, captions = torch.randn(2, 4, 8, 8), ["a red cat", ""]
    conditioning = pipeline.conditioner({"caption": captions})
    length = theirs.text_encoder.config.max_position_embeddings
    words = theirs.tokenizer(
        captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids
    tokens = theirs.text_encoder(words).last_hidden_state
    assert difference(conditioning.tokens, tokens) < CLOSE
    expected = theirs.unet(x, TIMES, tokens).sample
    assert difference(pipeline.denoiser["network"](x, TIMES, conditioning), expected) < CLOSE
    assert pipeline.manifest.std == [1 / 0.18215] * 4
    assert pipeline.knows_null
    assert float(pipeline.objective.alpha(torch.tensor(1000.0)) ** 2) == pytest.approx(
        float(theirs.scheduler.alphas_cumprod[-1]), rel=1e-5
    )
    pipeline.generate([0], [{"caption": "a blue boat"}], steps=2, guidance=Guidance(3.0))


def test_captions_and_classes(tmp_path):
    theirs = stable_diffusion(tmp_path, text_unet(num_class_embeds=3))
    _, run = runs(saved(theirs, tmp_path / "sd"), tmp_path)
    pipeline = Pipeline.load(run)
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([2, 0])
    conditioning = pipeline.conditioner({"caption": ["a", "b"], "class_label": labels})
    expected = theirs.unet(x, TIMES, conditioning.tokens, class_labels=labels).sample
    assert difference(pipeline.denoiser["network"](x, TIMES, conditioning), expected) < CLOSE


def test_a_network_alone_finds_its_scheduler_and_takes_an_autoencoder(tmp_path):
    theirs = diffusers.LDMPipeline(vqvae(), unet(), diffusers.DDIMScheduler(num_train_timesteps=200))
    folder = saved(theirs, tmp_path / "ldm")
    [first] = runs(folder / "vqvae", tmp_path)
    with pytest.raises(ConfigError, match="holds no first stage"):
        runs(folder / "unet", tmp_path)
    [run] = runs(folder / "unet", tmp_path, autoencoder=first)
    assert Pipeline.load(run).objective.path.steps == 200


def test_the_resolution_can_be_said(tmp_path):
    theirs = diffusers.LDMPipeline(vqvae(), unet(sample_size=None), diffusers.DDIMScheduler())
    folder = saved(theirs, tmp_path / "ldm")
    with pytest.raises(ConfigError, match=r"sample_size=None: .*--resolution PIXELS"):
        runs(folder, tmp_path)
    with pytest.raises(ConfigError, match=r"--resolution: expected a multiple of 2, found 17"):
        runs(folder, tmp_path, resolution=17)
    _, run = runs(folder, tmp_path, resolution=32)
    assert Pipeline.load(run).manifest.plan.shape == (3, 16, 16)


def test_a_pipeline_that_was_written_here_says_its_scale_and_its_row_of_no_class(tmp_path):
    theirs = unet(num_class_embeds=4, in_channels=4, out_channels=4)
    folder = tmp_path / "ours"
    saved(vae(), folder / "vae")
    saved(theirs, folder / "unet")
    saved(diffusers.DDIMScheduler(), folder / "scheduler")
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    index = {
        "_class_name": ["pipeline", "LatentDiffusionPipeline"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "latents_mean": mean,
        "latents_std": std,
        "num_classes": 3,
        "class_tokens": False,
        "timestep_scale": 1.0,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    _, run = runs(folder, tmp_path)
    pipeline = Pipeline.load(run)
    assert (pipeline.manifest.mean, pipeline.manifest.std, pipeline.num_classes) == (mean, std, 3)
    assert pipeline.knows_null
    x = torch.randn(2, 4, 8, 8)
    null = theirs(x, TIMES, class_labels=torch.tensor([3, 3])).sample
    assert difference(pipeline.denoiser["network"](x, TIMES, pipeline.conditioner.null(2)), null) < CLOSE
    for changes, words in (
        ({"num_classes": 4}, "num_classes=4: expected 3"),
        ({"latents_std": [1.0]}, "expected 4 numbers each"),
        ({"latents_std": [1.0, 0.0, 1.0, 1.0]}, "deviations above 0"),
        ({"timestep_scale": 2.0}, "timestep_scale=2"),
    ):
        (folder / "model_index.json").write_text(json.dumps(index | changes))
        with pytest.raises(ConfigError, match=words):
            runs(folder, tmp_path)


def ldm(tmp_path):
    return saved(diffusers.LDMPipeline(vqvae(), unet(), diffusers.DDIMScheduler()), tmp_path / "ldm")


def truncated(tmp_path):
    file = ldm(tmp_path) / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return file.parent.parent


def of_another_class(tmp_path):
    return edited(ldm(tmp_path), "unet", _class_name="UNet3DConditionModel")


def with_another_first_stage(tmp_path):
    return edited(ldm(tmp_path), "vqvae", _class_name="AutoencoderDC")


def without_a_shard(tmp_path):
    folder = saved(unet(), tmp_path / "shards", max_shard_size="200KB")
    next(folder.glob("*-00002-of-*")).unlink()
    return folder


def without_a_scheduler(tmp_path):
    return saved(unet(), tmp_path / "alone" / "unet")


def without_a_text_encoder(tmp_path):
    folder = saved(stable_diffusion(tmp_path), tmp_path / "sd")
    shutil.rmtree(folder / "text_encoder")
    return folder


def for_inpainting(tmp_path):
    return saved(stable_diffusion(tmp_path, text_unet(in_channels=9)), tmp_path / "sd")


def of_other_sizes(tmp_path):
    return edited(ldm(tmp_path), "unet", block_out_channels=[16, 48])


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (truncated, CheckpointError, "diffusion_pytorch_model.safetensors"),
        (of_another_class, CheckpointError, "the class unet UNet3DConditionModel and vqvae VQModel"),
        (
            with_another_first_stage,
            CheckpointError,
            "vqvae: _class_name='AutoencoderDC': expected one of AutoencoderKL",
        ),
        (without_a_shard, CheckpointError, "-00002-of-"),
        (without_a_scheduler, ConfigError, "expected scheduler/scheduler_config.json"),
        (without_a_text_encoder, ConfigError, "--text-encoder DIR"),
        (for_inpainting, ConfigError, "reads a picture of 5 channels"),
        (of_other_sizes, CheckpointError, "of another shape"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_in_one_message(make, kind, words, tmp_path, capsys):
    folder = make(tmp_path)
    assert program.main([str(folder), "--logdir", str(tmp_path / "logs")]) == (4 if kind is CheckpointError else 2)
    said = capsys.readouterr().err
    assert words in said
    assert str(folder) in said
    assert "Traceback" not in said
    assert not (tmp_path / "logs").exists() or not any((tmp_path / "logs").iterdir())
