"""Autoencoders of diffusers as first stages: what the library computes, in every place where a run of ours serves."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import main
from ldm.autoencoder.codec import Codec
from ldm.checkpoints import store
from ldm.cli import sample
from ldm.config.load import to_yaml
from ldm.errors import CheckpointError, ConfigError, DataError
from ldm.interop.diffusers import FirstStage
from ldm.interop.models import Denoiser, Origin, Request
from ldm.interop.runs import write
from ldm.interop.sources import Source
from ldm.latents.datamodule import LatentDataModule
from ldm.latents.manifest import Manifest
from ldm.latents.reader import LatentCache
from ldm.runtime import distributed
from ldm.sampling.pipeline import Pipeline
from tests.conftest import node
from tests.latents.test_datamodule import Pictures

diffusers = pytest.importorskip("diffusers")

TARGET = "ldm.interop.diffusers.FirstStage"
UP_DOWN = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
SIZES = {**UP_DOWN, "block_out_channels": [8, 8], "norm_num_groups": 4}
EACH_WAY = {"encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8]}
DEEP = {
    f"{way}_{key}": value
    for way in ("encoder", "decoder")
    for key, value in {
        "block_types": ["ResBlock", "EfficientViTBlock"],
        "layers_per_block": [1, 1],
        "qkv_multiscales": [[], [5]],
    }.items()
}
MADE = {
    "AutoencoderKL": {**SIZES, "latent_channels": 4},
    "VQModel": {**SIZES, "latent_channels": 3, "num_vq_embeddings": 16, "vq_embed_dim": 2},
    "AutoencoderDC": {**EACH_WAY, **DEEP, "latent_channels": 4, "attention_head_dim": 4},
    "AutoencoderTiny": {**EACH_WAY, "num_encoder_blocks": [1, 1], "num_decoder_blocks": [1, 1]},
    "AsymmetricAutoencoderKL": {
        **UP_DOWN,
        "down_block_out_channels": [8, 8],
        "up_block_out_channels": [8, 12],
        "norm_num_groups": 4,
    },
}
CHANNELS = {name: {"VQModel": 2}.get(name, 4) for name in MADE}


def save(folder: Path, name: str = "AutoencoderKL", seed: int = 0) -> Path:
    torch.manual_seed(seed)
    getattr(diffusers, name)(**MADE[name]).save_pretrained(folder)
    return folder


@pytest.fixture(params=MADE)
def kind(request):
    return request.param


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "vae")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


# ---- the codec ------------------------------------------------------------------------------------------------------


def test_it_computes_what_the_library_computes(kind, tmp_path, images):
    codec = Codec.load(save(tmp_path / "vae", kind))
    assert isinstance(codec, FirstStage)
    theirs = getattr(diffusers, kind).from_pretrained(tmp_path / "vae").eval()
    theirs.requires_grad_(False)  # where weights want a gradient, torch picks other kernels
    with torch.no_grad():
        output = theirs.encode(images)
    mean, std = codec.encode(images)
    if "KL" in kind:
        expected = output.latent_dist.mean, output.latent_dist.std
    else:
        (latents,) = output.to_tuple()
        expected = latents, torch.zeros_like(latents)
    assert torch.equal(mean, expected[0])
    assert torch.equal(std, expected[1])
    assert codec.deterministic is not bool(std.any())
    latents = mean + std
    with torch.no_grad():
        decoded = theirs.decode(latents).sample
    assert torch.equal(codec.decode(latents), decoded.clamp(-1, 1))
    assert codec.latent_shape((16, 24)) == tuple(mean.shape[1:]) == (CHANNELS[kind], 8, 12)
    assert (codec.in_channels, codec.latent_channels, codec.down_factor) == (3, CHANNELS[kind], 2)


def test_a_codebook_is_looked_up_where_latents_are_decoded(tmp_path, images):
    codec = Codec.load(save(tmp_path / "vq", "VQModel"))
    mean, _ = codec.encode(images)
    codes, *_ = codec.model.quantize(mean)
    assert not torch.allclose(codes, mean)
    torch.testing.assert_close(codec.decode(mean), codec.decode(codes))


def test_encodes_in_true_fp32_and_decodes_as_its_surroundings(folder, images):
    codec = Codec.load(folder)
    expected = codec.encode(images)
    latents = 30 * torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found, decoded = codec.encode(images), codec.decode(latents)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert decoded.dtype == torch.float32
    assert decoded.abs().max() <= 1
    assert not torch.equal(decoded, codec.decode(latents))


def test_it_decodes_in_bf16_with_the_weights_as_they_are(kind, tmp_path, images):
    codec = Codec.load(save(tmp_path / "vae", kind))
    latents = sum(codec.encode(images))
    expected = codec.decode(latents)
    with torch.autocast("cpu", torch.bfloat16):
        found = codec.decode(latents)
    layers = sum(not [*module.children()] for module in codec.modules())
    # Each rounds by 2^-8 of its values, independently of the others.
    assert 0 < (found - expected).square().mean().sqrt() < 2**-8 * layers**0.5 * expected.square().mean().sqrt()
    assert codec.decoders == (), "nobody knows what else the library does with its weights"


def test_it_is_frozen_and_stays_in_eval_mode(folder):
    codec = Codec.load(folder)
    torch.nn.Sequential(codec).train()
    assert not any(module.training for module in codec.modules())
    assert not any(parameter.requires_grad for parameter in codec.parameters())


def test_what_it_says_of_itself_names_the_class_and_not_the_place(folder, tmp_path):
    described = Codec.load(folder).describe()
    assert described["path"] == str(folder)
    assert (described["config"]["target"], described["config"]["params"]) == (TARGET, {})
    architecture = described["config"]["architecture"]
    assert architecture["_class_name"] == "AutoencoderKL"
    assert not {"_diffusers_version", "_name_or_path"} & architecture.keys()
    json.dumps(described)
    moved = Codec.of(described["config"], shutil.copytree(folder, tmp_path / "moved"))
    assert moved.describe() == {**described, "path": str(tmp_path / "moved")}
    assert Codec.load(save(tmp_path / "other", seed=1)).weight_hash() != described["weights"]


def test_files_in_half_precision_are_read_into_float32(folder, images):
    diffusers.AutoencoderKL.from_pretrained(folder).half().save_pretrained(folder)
    mean, _ = Codec.load(folder).encode(images)
    assert mean.dtype == torch.float32


# ---- what is refused ------------------------------------------------------------------------------------------------


def rewrite(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_another_class_is_refused_by_name(folder):
    rewrite(folder, _class_name="AutoencoderKLWan")
    with pytest.raises(ConfigError, match=r"_class_name: expected one of AutoencoderKL, .*, found AutoencoderKLWan"):
        Codec.load(folder)


def test_folders_that_hold_none(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder; expected one of diffusers"):
        FirstStage(tmp_path / "nowhere")
    (tmp_path / "run").mkdir()
    with pytest.raises(CheckpointError, match=r"run: expected a folder of diffusers .*; there is no config.json in it"):
        FirstStage(tmp_path / "run")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=rf"a whole pipeline; name the autoencoder in it: {folder}$"):
        Codec.load(tmp_path)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config.json: does not describe a model of diffusers"):
        Codec.load(folder)


def test_weights_that_are_missing_or_do_not_fit(folder):
    rewrite(folder, layers_per_block=2)
    with pytest.raises(CheckpointError, match=r"vae: .*(missing|cannot be read as AutoencoderKL)"):
        Codec.load(folder)
    rewrite(folder, layers_per_block=1, block_out_channels=[8, 16])
    with pytest.raises(CheckpointError, match=r"vae: .*(mismatched|cannot be read as AutoencoderKL)"):
        Codec.load(folder)
    rewrite(folder, block_out_channels=[8, 8], mid_block_add_attention=False)
    with pytest.raises(CheckpointError, match=r"vae: its weights do not fit its config.json: \d+ unexpected"):
        Codec.load(folder)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"vae: cannot be read as AutoencoderKL"):
        Codec.load(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"vae: cannot be read as AutoencoderKL"):
        Codec.load(folder)


def test_a_model_of_depth_is_no_autoencoder(tmp_path):
    diffusers.AutoencoderKL(**MADE["AutoencoderKL"], out_channels=1).save_pretrained(tmp_path / "depth")
    with pytest.raises(ConfigError, match=r"depth/config.json: out_channels: expected 3, as in_channels, found 1"):
        Codec.load(tmp_path / "depth")


def test_without_diffusers_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"vae: .* need the package diffusers: pip install -e .\[interop\]"):
        Codec.load(folder)


# ---- the cache ------------------------------------------------------------------------------------------------------


def data(autoencoder, **params) -> LatentDataModule:
    made = LatentDataModule(Pictures(10), autoencoder, batch_size=4, resolution=16, seed=3, **params)
    made.setup()
    return made


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", MADE)
def test_a_cache_is_the_same_of_one_rank_and_of_two(name, tmp_path, forked):
    folder = save(tmp_path / "vae", name)

    def build(rank: int) -> None:
        data(FirstStage(folder), cache=tmp_path / str(distributed.world_size()), encode_batch_size=2)

    forked(1, build)
    forked(2, build)
    assert content(tmp_path / "1") == content(tmp_path / "2")
    cache = LatentCache(tmp_path / "1" / "train")
    assert cache.plan.shape == (CHANNELS[name], 8, 8)
    assert cache.plan.autoencoder["config"]["target"] == TARGET


def test_a_cache_is_found_again_and_that_of_other_weights_is_refused(folder, tmp_path, monkeypatch):
    first = data(FirstStage(folder), cache="cache")
    assert first._codec is first._given is None, "freed before training"
    facts = first.facts()
    with monkeypatch.context() as now:
        now.setattr(Codec, "encode", lambda *args: pytest.fail("encoded again"))
        data(folder, cache="cache")  # its path alone means the same
        moved = shutil.copytree(folder, tmp_path / "moved")
        assert data(FirstStage(moved), cache="cache").facts() == facts
    with pytest.raises(DataError, match=r"made for something else:\n  autoencoder.weights: expected .*, found"):
        data(FirstStage(save(tmp_path / "other", seed=1)), cache="cache")
    rewrite(folder, norm_num_groups=2)  # of the same weights
    with pytest.raises(DataError, match=r"autoencoder.config.architecture.norm_num_groups: expected 2, found 4"):
        data(FirstStage(folder), cache="cache")


def test_a_resolution_must_be_stated_and_divide(folder):
    with pytest.raises(ConfigError, match=r"data.params.resolution: .*vae does not state its resolution"):
        LatentDataModule(Pictures(10), FirstStage(folder), batch_size=4).facts()
    with pytest.raises(ConfigError, match="multiple of the autoencoder's down factor 2, found 15"):
        LatentDataModule(Pictures(10), FirstStage(folder), batch_size=4, resolution=15).facts()


# ---- from pictures to pictures --------------------------------------------------------------------------------------


def run(name: str) -> Path:
    (folder,) = Path("logs").glob(f"*_{name}")
    return folder


def train(tree, *words: str) -> int:
    tree["lightning"]["trainer"] |= {"max_steps": 4, "val_check_interval": 4, "log_every_n_steps": 2}
    Path("config.yaml").write_text(to_yaml(tree))
    return main.main(["--base", "config.yaml", *words])


@pytest.fixture
def tree(diffusion_tree, folder):
    diffusion_tree["data"]["params"] |= {"autoencoder": node(TARGET, path=str(folder)), "resolution": 16}
    diffusion_tree["lightning"]["callbacks"] = {
        "images": node("ldm.training.callbacks.previews.SampleLogger", every_n_steps=2, classes=[0], seeds=[1], steps=2)
    }
    return diffusion_tree


@pytest.mark.slow
def test_a_run_is_trained_resumed_sampled_and_evaluated(tree, folder, tmp_path, capsys):
    assert train(tree, "--dry-run") == 0
    assert train(tree) == 0
    assert train(tree, "-n", "parts", "lightning.trainer.max_steps=2", "lightning.trainer.val_check_interval=2") == 0
    assert main.main(["-r", str(run("parts")), "lightning.trainer.max_steps=4"]) == 0
    whole, parts = (store.load(store.verify(run(name)).path)["state_dict"] for name in ("tiny_diffusion", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole if isinstance(whole[name], torch.Tensor))
    assert [*run("tiny_diffusion").glob("images/val/samples_*.png")]

    pipeline = Pipeline.load(run("tiny_diffusion"))
    assert isinstance(pipeline.codec, FirstStage)
    made = pipeline.generate([0], [{"class_label": 1}], steps=2)
    assert sample.main(["-r", "logs/*_tiny_diffusion", "-n", "1", "--steps", "2"]) == 0
    (picture,) = Path("logs").glob("*_tiny_diffusion/samples/*/001-000000.png")
    assert list(Image.open(picture).getdata()) == list(made[0].getdata())

    moved = folder.rename(tmp_path / "moved")
    command = ["-r", "logs/*_tiny_diffusion", "-n", "2", "--steps", "2"]
    capsys.readouterr()
    assert sample.main(command) == 4
    said = capsys.readouterr().err
    assert f"{folder}: no such folder" in said
    assert "Name that autoencoder's run folder, checkpoint or folder with --autoencoder PATH" in said
    assert sample.main([*command, "--autoencoder", str(moved)]) == 0
    assert sample.main([*command, "--autoencoder", str(save(tmp_path / "other", seed=1))]) == 4
    assert "other: not the autoencoder that made the latents of" in capsys.readouterr().err
    assert sample.main([*command, "--autoencoder", str(run("parts"))]) == 4
    assert "expected a folder of diffusers" in capsys.readouterr().err


def test_another_first_stage_is_refused_when_a_run_goes_on(tree, folder, tmp_path, capsys):
    assert train(tree) == 0
    shutil.rmtree(folder)
    save(folder, seed=1)
    assert main.main(["-r", str(run("tiny_diffusion")), "lightning.trainer.max_steps=6"]) == 2
    assert "data (autoencoder): the run has" in capsys.readouterr().err


def test_a_pipeline_of_ours_cannot_take_a_folder_of_other_weights(runs, folder):
    with pytest.raises(CheckpointError, match=r"vae: not the autoencoder that made the latents of"):
        Pipeline.load(runs.diffusion, autoencoder=folder)


def test_a_manifest_that_names_a_stranger_s_class_is_refused(runs, tmp_path):
    state = store.load(store.verify(runs.diffusion))
    manifest = Manifest.from_dict(state["ldm"]["latents"])
    manifest.plan.autoencoder["config"] = {"target": "subprocess.Popen", "params": {"args": "true"}}
    state["ldm"]["latents"] = manifest.to_dict()
    store.save(tmp_path / "evil.ckpt", state)
    with pytest.raises(ConfigError, match=r"autoencoder.target: 'subprocess.Popen' is refused"):
        Pipeline.load(tmp_path / "evil.ckpt")


def test_a_converted_denoiser_takes_such_a_folder(runs, folder):
    state = store.load(store.verify(runs.diffusion))
    params = state["ldm"]["config"]["model"]["params"]
    weights = {name.removeprefix("denoiser."): value for name, value in state["state_dict"].items()}
    weights = {name: value for name, value in weights.items() if name.startswith(("network.", "conditioner."))}
    converted = Denoiser("foreign", params, weights, None, [0.0] * 4, [2.0] * 4, (8, 8), Origin("a test"))
    source = Source(Path("foreign.pt"), {}, {}, {}, {})
    (written,) = write(converted, source, Request(autoencoder=folder), Path("logs"), None)
    pipeline = Pipeline.load(written.path)
    assert isinstance(pipeline.codec, FirstStage)
    (image,) = pipeline.generate([0], [{"class_label": 1}], steps=2)
    assert image.size == (16, 16)
