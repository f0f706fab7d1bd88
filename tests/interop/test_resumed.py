"""A converted model is trained further by the name of its run and that of some pictures, and then goes on exactly."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import main
from ldm.checkpoints import store
from ldm.config.load import build, to_yaml
from ldm.interop import runs
from ldm.interop.models import Denoiser, FirstStage, Origin, Request, node
from ldm.interop.sources import Source
from ldm.latents.manifest import Manifest
from tests.training.test_init_from import started  # noqa: F401
from tests.training.test_resume import as_killed_after, assert_same, only

SIZES = {"base_channels": 8, "channel_mult": [1, 1], "num_res_blocks": 1, "latent_channels": 2}
UNET = {"model_channels": 8, "channel_mult": [1, 1], "num_res_blocks": 1, "num_heads": 1, "vector_channels": 8}
SCALE = {"mean": [0.5, -0.5], "std": [2.0, 4.0]}
FEW = ["lightning.trainer.accelerator=cpu", "lightning.logger=[]", "lightning.callbacks.images=null"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def random(parts: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    named = {name: build(one).state_dict() for name, one in parts.items()}
    return {
        f"{name}.{key}": torch.randn_like(value) * 0.1 for name, state in named.items() for key, value in state.items()
    }


SOURCE = Source(Path("foreign.safetensors"), {}, sha256={"foreign.safetensors": "0" * 64})


@pytest.fixture
def first_stage() -> FirstStage:
    parts = {
        "encoder": node("autoencoder.networks.Encoder", in_channels=3, **SIZES),
        "decoder": node("autoencoder.networks.Decoder", out_channels=3, **SIZES),
    }
    loss = {"loss": node("autoencoder.losses.AutoencoderLoss", kl_weight=1e-6, learn_logvar=False)}
    weights = random(parts, 1) | {"loss.logvar": torch.zeros(())}
    return FirstStage("small", parts | loss, weights, 16, Origin("test", license="CC0"))


@pytest.fixture
def denoiser(first_stage) -> Denoiser:
    parts = {
        "network": node("diffusion.networks.unet.UNet", in_channels=2, **UNET),
        "conditioner": node("diffusion.conditioners.classes.ClassVector", num_classes=5, channels=8),
    }
    objective = node("diffusion.objectives.DDPM", schedule=node("diffusion.noise_schedules.SqrtLinear"))
    params = {**parts, "objective": objective, "label_dropout": 0.1}
    weights, average = random(parts, 2), random(parts, 3)
    own = replace(first_stage, name="own")
    return Denoiser("small", params, weights, average, SCALE["mean"], SCALE["std"], (8, 8), Origin("test"), own)


def pictures(image_folder: Path) -> list[str]:
    return [f"data.params.train.params.root={image_folder}", "data.params.num_validation=4", *FEW]


def steps(number: int, every: int = 2) -> list[str]:
    saves = f"{{target: ldm.training.callbacks.checkpoints.Checkpoints, params: {{every: {every}, keep: 9}}}}"
    trainer = [f"lightning.trainer.max_steps={number}", "lightning.trainer.val_check_interval=2"]
    return [*trainer, f"lightning.callbacks.checkpoints={saves}"]


def last(folder: Path, step: int) -> dict[str, Any]:
    state = store.load(folder / "checkpoints" / f"step={step:08d}.ckpt")
    return {key: value for key, value in state.items() if key not in ("loops", "epoch")}


def check(folder: Path, image_folder: Path, started: Any, here: Path, *words: str) -> dict[str, Any]:  # noqa: F811
    """Trains four steps, and again from what is there after two; returns the last state."""
    converted = store.load(folder / "checkpoints" / "step=0.ckpt")
    assert main.main(["-r", str(folder), *pictures(image_folder), *steps(4), *words]) == 0
    for key, value in converted["state_dict"].items():
        assert not torch.is_tensor(value) or torch.equal(started[0][key], value), key
    state = last(folder, 4)
    assert (state["global_step"], state["ldm"]["images_seen"]) == (4, 32)
    assert all(one["step"] == 4 for one in state["optimizer_states"][0]["state"].values())
    assert state["ldm"]["origin"] == converted["ldm"]["origin"]
    assert json.loads((folder / "configs" / "facts.json").read_text())["num_items"] == 16
    killed = as_killed_after(folder, 2, here / "killed")
    assert main.main(["-r", str(killed)]) == 0
    assert_same(last(killed, 4), state)
    assert (folder / "checkpoints" / "step=0.ckpt").is_file()
    return state


def test_a_first_stage(first_stage, image_folder, started, here):  # noqa: F811
    (folder,) = runs.write(first_stage, SOURCE, Request(), here / "logs", None)
    check(folder.path, image_folder, started, here)


def test_a_first_stage_with_a_discriminator_of_its_own(first_stage, image_folder, started, here):  # noqa: F811
    (folder,) = runs.write(first_stage, SOURCE, Request(), here / "logs", None)
    discriminator = (
        "{target: ldm.autoencoder.discriminator.PatchDiscriminator, params: {in_channels: 3, channels: 8, layers: 1}}"
    )
    key = "model.params.loss.params"
    words = [f"{key}.discriminator={discriminator}", f"{key}.disc_start=0", "model.params.train_encoder=false"]
    state = check(folder.path, image_folder, started, here, *words)
    then = store.load(folder.path / "checkpoints" / "step=0.ckpt")["state_dict"]
    same = {key for key, value in then.items() if torch.equal(value, state["state_dict"][key])}
    assert {key for key in then if key.startswith("encoder.")} <= same
    assert "decoder.conv_out.weight" not in same


def test_a_denoiser(denoiser, image_folder, started, here):  # noqa: F811
    _, folder = runs.write(denoiser, SOURCE, Request(), here / "logs", None)
    state = check(folder.path, image_folder, started, here)
    manifest = Manifest.from_dict(state["ldm"]["latents"])
    assert (manifest.mean, manifest.std) == (SCALE["mean"], SCALE["std"])
    caches = [Manifest.read(file.parent) for file in Path("cache").glob("*/manifest.json")]
    assert caches
    assert all(cache.mean != SCALE["mean"] for cache in caches)


def test_the_file_alone_starts_a_new_run(first_stage, image_folder, started, here):  # noqa: F811
    (folder,) = runs.write(first_stage, SOURCE, Request(), here / "logs", None)
    file = (folder.path / "checkpoints" / "step=0.ckpt").rename(here / "alone.ckpt")
    assert main.main(["-r", str(file), "--logdir", "new", *pictures(image_folder), *steps(2)]) == 0
    assert last(only(Path("new")), 2)["global_step"] == 2


def test_what_its_weights_were_made_for_is_bound(denoiser, image_folder, here, capsys):
    _, folder = runs.write(denoiser, SOURCE, Request(), here / "logs", None)
    words = ["-r", str(folder.path), *pictures(image_folder), *steps(2)]
    scale = "data.params.statistics.std=[1.0, 1.0]"
    for change in ("model.params.network.params.num_heads=2", scale, "init_from=logs/another"):
        assert main.main([*words, change]) == 2
        error = capsys.readouterr().err
        assert f"--allow-change {change.partition('=')[0]}" in error
        assert "data.params.train" not in error


def test_an_autoencoder_that_was_trained_since_is_another(denoiser, image_folder, here, capsys):
    first, folder = runs.write(denoiser, SOURCE, Request(), here / "logs", None)
    assert main.main(["-r", str(first.path), *pictures(image_folder), *steps(2)]) == 0
    assert main.main(["-r", str(folder.path), *pictures(image_folder), *steps(2)]) == 2
    assert "--allow-change data" in capsys.readouterr().err


def test_once_begun_it_is_bound_like_any_run(first_stage, image_folder, here, capsys):
    (folder,) = runs.write(first_stage, SOURCE, Request(), here / "logs", None)
    assert main.main(["-r", str(folder.path), *pictures(image_folder), *steps(2)]) == 0
    assert main.main(["-r", str(folder.path), "data.params.train.params.root=elsewhere", *steps(4)]) == 2
    assert "--allow-change data.params.train.params.root" in capsys.readouterr().err


def test_a_new_run_starts_from_it(denoiser, image_folder, diffusion_tree, here):
    """With a conversion's own scale of latents; what is known of its origin goes with it."""
    first, folder = runs.write(denoiser, SOURCE, Request(), here / "logs", None)
    network = diffusion_tree["model"]["params"]["network"]["params"]
    network.clear()
    network |= {"in_channels": "${data:channels}", **UNET}
    diffusion_tree["init_from"] = {"run": str(folder.path), "resize": ["classes"]}
    diffusion_tree["data"]["params"] |= {"autoencoder": str(first.path), "statistics": SCALE}
    Path("new.yaml").write_text(to_yaml(diffusion_tree))
    assert main.main(["--base", "new.yaml", "--logdir", "new", "lightning.trainer.max_steps=1"]) == 0
    facts = store.record(store.verify(only(Path("new"))).path)
    assert facts["init_from"]["origin"]["family"] == "test"
    assert facts["init_from"]["tensors"]["conditioner"]["resized"] == 1
