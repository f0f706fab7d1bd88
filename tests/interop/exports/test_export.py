"""`ldm export --to safetensors`: what comes back as runs is what went out, bit for bit; and what is refused."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from ldm.autoencoder.codec import Codec
from ldm.autoencoder.losses import AutoencoderLoss
from ldm.autoencoder.module import AutoencoderKL
from ldm.checkpoints import store
from ldm.cli import convert, export
from ldm.config.load import build
from ldm.config.randomness import STANDARD
from ldm.diffusion.module import LatentDiffusion
from ldm.interop.exports.export import FORMATS
from ldm.latents.manifest import CacheSpec, Manifest
from ldm.optim.ema import EMA, FixedDecay
from ldm.sampling.pipeline import Pipeline
from tests.diffusion.conditioners.test_pictures import clip, painting, saved
from tests.tiny_runs import ADAM, node, save_run
from tests.tiny_text import LONGEST, WIDTH, save_text_encoder

UNCONDITIONAL = node("diffusion.conditioners.base.Unconditional")
DOG = [{"class_label": 1}] * 2


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Hashes of text encoders are remembered in the working folder."""
    monkeypatch.chdir(tmp_path)


def exported(run: Path, out: Path, *words: str) -> Path:
    assert export.main([str(run), "--to", "safetensors", "--out", str(out), *words]) == 0
    return out


def converted(folder: Path, logs: Path) -> list[Path]:
    assert convert.main([str(folder), "--logdir", str(logs)]) == 0
    return sorted(logs.iterdir(), key=lambda run: not run.name.endswith("autoencoder"))


def state(run: Path) -> dict[str, Any]:
    return store.load(store.verify(run))


def images(run: Path, **given: Any) -> list[bytes]:
    return [image.tobytes() for image in Pipeline.load(run, **given).generate([3, 4], DOG, steps=3)]


def test_a_diffusion_model_comes_back_with_its_autoencoder(runs, tmp_path):
    folder = exported(runs.diffusion, tmp_path / "out")
    autoencoder, diffusion = converted(folder, tmp_path / "logs")
    assert images(diffusion) == images(runs.diffusion)
    assert images(diffusion) != images(runs.diffusion, ema=False)
    assert Codec.load(autoencoder).weight_hash() == Codec.load(runs.autoencoder).weight_hash()
    ours, theirs = Pipeline.load(diffusion), Pipeline.load(runs.diffusion)
    assert ours.manifest.plan.class_names == theirs.manifest.plan.class_names
    assert (ours.label_dropout, ours.num_classes) == (theirs.label_dropout, theirs.num_classes)
    assert state(diffusion)["ldm"]["origin"]["family"] == "ldm export"


def test_a_model_that_does_not_say_what_makes_its_noise_keeps_its_pictures(runs, tmp_path):
    """It is from before there was a choice."""
    former = tmp_path / runs.diffusion.name
    shutil.copytree(runs.diffusion, former)
    whole = state(former)
    del whole["ldm"]["config"]["randomness"]
    store.save(store.verify(former).path, whole)
    _, diffusion = converted(exported(former, tmp_path / "out"), tmp_path / "logs")
    assert images(diffusion) == images(former) != images(runs.diffusion)


def test_the_weights_of_the_last_step_go_out_where_they_are_asked_for(runs, tmp_path):
    folder = exported(runs.diffusion, tmp_path / "out", "--raw")
    assert json.loads((folder / "config.json").read_text())["weights"] == "raw"
    _, diffusion = converted(folder, tmp_path / "logs")
    assert images(diffusion) == images(runs.diffusion, ema=False)


def test_an_autoencoder_comes_back(runs, tmp_path):
    folder = exported(runs.autoencoder, tmp_path / "out")
    (run,) = converted(folder, tmp_path / "logs")
    assert Codec.load(run).weight_hash() == Codec.load(runs.autoencoder).weight_hash()
    names = load_file(folder / "model.safetensors")
    assert {name.split(".")[1] for name in names} == {"encoder", "decoder"}


def test_a_codebook_goes_along(tmp_path):
    sizes = {"base_channels": 8, "channel_mult": [1, 1], "num_res_blocks": 1, "latent_channels": 3}
    params = {
        "encoder": node("autoencoder.networks.Encoder", in_channels=3, moments=False, **sizes),
        "decoder": node("autoencoder.networks.Decoder", out_channels=3, **sizes),
        "quantizer": node("autoencoder.quantizer.VectorQuantizer", size=16, channels=3),
    }
    encoder, decoder, quantizer = (build(params[name]) for name in ("encoder", "decoder", "quantizer"))
    module = AutoencoderKL(encoder, decoder, AutoencoderLoss(), ADAM, quantizer=quantizer)
    statistics = {"mean": [0.0, 1.0, 2.0], "std": [1.0, 2.0, 3.0]}
    config = {"model": {"params": params}, "data": {"params": {"resolution": [16, 32]}}}
    run = save_run(tmp_path / "run", module, {"kind": "autoencoder", "config": config, "latents": statistics})
    (again,) = converted(exported(run, tmp_path / "out"), tmp_path / "logs")
    first, second = Codec.load(run), Codec.load(again)
    assert first.weight_hash() == second.weight_hash()
    assert (second.size, second.statistics) == ((16, 32), statistics)


def test_files_of_more_than_the_limit_are_several_with_an_index(runs, tmp_path, monkeypatch):
    save = partial(huggingface_hub.save_torch_state_dict, max_shard_size=200_000)
    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", save)
    folder = exported(runs.diffusion, tmp_path / "out")
    assert len([*folder.glob("model-*-of-*.safetensors")]) > 2
    assert (folder / "model.safetensors.index.json").is_file()
    assert images(converted(folder, tmp_path / "logs")[1]) == images(runs.diffusion)


def test_no_path_of_this_machine_goes_out(runs, tmp_path):
    folder = exported(runs.diffusion, tmp_path / "out")
    for file in folder.rglob("*"):
        assert str(runs.diffusion.parent).encode() not in file.read_bytes()


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    facts = json.loads((folder / "config.json").read_text())
    edit(facts)
    (folder / "config.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda facts: facts.update(format=2), "format: expected 1, found 2"),
        (lambda facts: facts.pop("latents"), "expected the keys latents"),
        (lambda facts: facts["latents"]["plan"]["autoencoder"].update(weights="0" * 64), "not the one that made"),
        (lambda facts: facts["model"]["network"]["params"].update(model_channels=32), "its tensors do not fit"),
        (lambda facts: facts["model"]["network"].update(target="os.system"), "os"),
    ],
)
def test_a_damaged_folder_is_one_message_and_makes_no_run(runs, tmp_path, capsys, edit, told):
    folder = exported(runs.diffusion, tmp_path / "out")
    change(folder, edit)
    capsys.readouterr()
    assert convert.main([str(folder), "--logdir", str(tmp_path / "logs")]) in (2, 4)
    said = capsys.readouterr().err
    assert told in said
    assert said.count("error:") == 1
    assert [*(tmp_path / "logs").glob("*")] == []


def save_denoiser(
    folder: Path,
    codec: Codec,
    objective: dict[str, Any],
    channels: int,
    size: int,
    conditioner: dict[str, Any] = UNCONDITIONAL,
    context_dim: int | None = None,
) -> Path:
    """A UNet on the latents of a codec, or on pixels."""
    torch.manual_seed(1)
    sizes = {"model_channels": 16, "channel_mult": [1, 1], "num_res_blocks": 1, "num_heads": 1}
    params = {
        "network": node("diffusion.networks.unet.UNet", in_channels=channels, context_dim=context_dim, **sizes),
        "conditioner": conditioner,
        "objective": objective,
    }
    parts = [build(params[name]) for name in ("network", "conditioner", "objective")]
    module = LatentDiffusion(*parts, optimizer=ADAM, ema=partial(EMA, profile=FixedDecay()))
    for denoiser in (module.denoiser, module.ema.average, module.objective):
        for weight in denoiser.parameters():
            torch.nn.init.normal_(weight.data, std=0.05)
    plan = CacheSpec(
        shape=(channels, size, size),
        num_items=10,
        source="",
        pixels={"resolution": size * codec.down_factor, "channels": codec.in_channels},
        autoencoder=codec.describe(),
    )
    manifest = Manifest(plan, mean=[0.5] * channels, std=[2.0] * channels, broken=[], shards=[])
    config = {"randomness": STANDARD, "model": {"params": params}}
    record = {"kind": "diffusion", "config": config, "latents": manifest.to_dict()}
    return save_run(folder, module, record)


def test_a_model_of_pixels_and_a_learned_weighting_come_back(tmp_path):
    weighting = node("diffusion.weightings.Uncertainty", weighting=node("diffusion.weightings.Plain"))
    run = save_denoiser(tmp_path / "run", Codec.pixels(3), node("diffusion.objectives.EDM", weighting=weighting), 3, 8)
    (again,) = converted(exported(run, tmp_path / "out"), tmp_path / "logs")
    first, second = Pipeline.load(run), Pipeline.load(again)
    assert first.objective.state_dict()
    for key, one in first.objective.state_dict().items():
        assert torch.equal(one, second.objective.state_dict()[key])
    samples = [[image.tobytes() for image in one.generate([1, 2], steps=2)] for one in (first, second)]
    assert samples[0] == samples[1]


def test_a_first_stage_of_others_stays_where_it_is(tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = diffusers.AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4, **blocks)
    vae.save_pretrained(tmp_path / "vae")
    objective = node("diffusion.objectives.Flow")
    run = save_denoiser(tmp_path / "run", Codec.load(tmp_path / "vae"), objective, 4, 8)
    folder = exported(run, tmp_path / "out")
    assert not any(name.startswith("autoencoder") for name in load_file(folder / "model.safetensors"))
    assert convert.main([str(folder), "--logdir", str(tmp_path / "logs")]) == 2
    assert "--autoencoder" in capsys.readouterr().err
    words = ["--logdir", str(tmp_path / "logs"), "--autoencoder", str(tmp_path / "vae")]
    assert convert.main([str(folder), *words]) == 0
    (again,) = (tmp_path / "logs").iterdir()
    samples = [[image.tobytes() for image in Pipeline.load(one).generate([1, 2], steps=2)] for one in (run, again)]
    assert samples[0] == samples[1]


@pytest.mark.parametrize("as_feature", [False, True])
def test_a_model_of_captions_goes_out_without_its_text_encoder(as_feature, runs, tmp_path, capsys):
    """Which is named again where the model comes in; no path of this machine is in the folder."""
    encoder = save_text_encoder(tmp_path / "encoder")
    params = {"encoder": str(encoder), "channels": WIDTH, "max_length": LONGEST}
    text = node("diffusion.conditioners.text.FrozenText", **params)
    if as_feature:
        feature = node("diffusion.conditioners.text.TextEncoder", **params)
        text = node("diffusion.conditioners.text.FeatureText", feature=feature)
    run = save_denoiser(
        tmp_path / "run", Codec.load(runs.autoencoder), node("diffusion.objectives.Flow"), 4, 4, text, WIDTH
    )
    folder = exported(run, tmp_path / "out")
    assert str(tmp_path) not in (folder / "config.json").read_text()
    assert "--name NAME --text-encoder DIR" in (folder / "README.md").read_text()
    captions = [{"caption": "a red cat"}, {"caption": "a blue boat"}]
    own = [image.tobytes() for image in Pipeline.load(run).generate([1, 2], captions, steps=2)]
    elsewhere = encoder.rename(tmp_path / "elsewhere")
    assert convert.main([str(folder), "--logdir", str(tmp_path / "logs")]) == 2
    assert "--text-encoder DIR" in capsys.readouterr().err
    another = save_text_encoder(tmp_path / "another", seed=1)
    assert convert.main([str(folder), "--logdir", str(tmp_path / "logs"), "--text-encoder", str(another)]) == 4
    assert "not the text encoder that this model was trained with" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()
    assert convert.main([str(folder), "--logdir", str(tmp_path / "logs"), "--text-encoder", str(elsewhere)]) == 0
    (again,) = (tmp_path / "logs").glob("*_run")
    assert [image.tobytes() for image in Pipeline.load(again).generate([1, 2], captions, steps=2)] == own


def test_a_model_of_pictures_goes_out_without_its_vision_model(runs, tmp_path, capsys):
    """As of captions: the folder may go to any machine."""
    encoder = saved(tmp_path / "encoder", clip())
    feature = node("diffusion.conditioners.pictures.PictureEncoder", encoder=str(encoder), vector=False, tokens=True)
    picture = node("diffusion.conditioners.pictures.FeaturePicture", feature=feature)
    run = save_denoiser(
        tmp_path / "run", Codec.load(runs.autoencoder), node("diffusion.objectives.Flow"), 4, 4, picture, 32
    )
    folder = exported(run, tmp_path / "out")
    assert str(tmp_path) not in (folder / "config.json").read_text()
    assert "--name NAME --picture-encoder DIR" in (folder / "README.md").read_text()
    conditions = [{"image": painting(seed)} for seed in (1, 2)]
    own = [image.tobytes() for image in Pipeline.load(run).generate([1, 2], conditions, steps=2)]
    elsewhere = encoder.rename(tmp_path / "elsewhere")
    command = [str(folder), "--logdir", str(tmp_path / "logs")]
    assert convert.main(command) == 2
    assert "its pictures are read by a vision model, which is not in it" in capsys.readouterr().err
    another = saved(tmp_path / "another", clip(), seed=1)
    assert convert.main([*command, "--picture-encoder", str(another)]) == 4
    assert "not the vision model that this model was trained with" in capsys.readouterr().err
    assert convert.main([*command, "--picture-encoder", str(elsewhere)]) == 0
    (again,) = (tmp_path / "logs").glob("*_run")
    assert [image.tobytes() for image in Pipeline.load(again).generate([1, 2], conditions, steps=2)] == own


@pytest.mark.parametrize("word", ["--autoencoder", "--text-encoder", "--picture-encoder"])
def test_what_the_folder_holds_or_does_not_read_is_not_named(runs, tmp_path, capsys, word):
    folder = exported(runs.diffusion, tmp_path / "out")
    assert convert.main([str(folder), "--logdir", str(tmp_path / "logs"), word, str(runs.autoencoder)]) == 2
    assert f"leave out {word}" in capsys.readouterr().err


def test_every_file_is_as_readable_as_the_umask_says(runs, tmp_path):
    former = os.umask(0o027)
    try:
        folder = exported(runs.diffusion, tmp_path / "out")
    finally:
        os.umask(former)
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o640}


# ---- what is refused ----


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = export.main([*words])
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "Traceback" not in said
    return code, said


def test_help_names_every_format(capsys):
    assert all(name in export.FORMATS for name in FORMATS)


def test_wrong_words_are_answered(runs, tmp_path, capsys):
    run, out = str(runs.diffusion), str(tmp_path / "out")
    assert refused(capsys, run)[0] == 2
    assert refused(capsys, run, "--to", "onnx")[0] == 2
    code, said = refused(capsys, run, "--to", "safetensor", "--out", out)
    assert (code, "did you mean safetensors?" in said) == (2, True)
    code, said = refused(capsys, run, "--to", "safetensors", "--out", out, "--private")
    assert (code, "belongs to --push" in said) == (2, True)
    code, said = refused(capsys, out, "--push", "me/model", "--no-pictures", "--license", "mit")
    assert (code, "--license, --no-pictures: decides how a folder is written" in said) == (2, True)


def test_a_folder_that_exists_is_kept_unless_it_is_an_export_that_may_be_replaced(runs, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    words = [str(runs.diffusion), "--to", "safetensors", "--out", str(out)]
    code, said = refused(capsys, *words)
    assert (code, "have it replaced with --force" in said) == (2, True)
    code, said = refused(capsys, *words, "--force")
    assert (code, "this is another" in said) == (2, True)
    assert (out / "README.md").read_text() == "mine"
    (out / "README.md").unlink()
    exported(runs.autoencoder, out, "--force")
    (out / "more.txt").write_text("of the former one")
    exported(runs.diffusion, out, "--force")
    assert not (out / "more.txt").exists()
    assert [*tmp_path.iterdir()] == [out]


def test_what_was_there_is_there_again_where_the_new_one_cannot_take_its_place(runs, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    exported(runs.autoencoder, out)
    kept = {path: path.read_bytes() for path in out.glob("*")}
    rename = Path.rename

    def fails_for_new_ones(path: Path, target: Path) -> Path:
        if target == out and not path.name.endswith(".before"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails_for_new_ones)
    assert refused(capsys, str(runs.diffusion), "--to", "safetensors", "--out", str(out), "--force")[0] == 6
    assert {path: path.read_bytes() for path in out.glob("*")} == kept
    assert [*tmp_path.iterdir()] == [out]


def test_a_run_without_a_checkpoint_is_named(tmp_path, capsys):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    code, said = refused(capsys, str(run), "--to", "safetensors", "--out", str(tmp_path / "out"))
    assert (code, "no checkpoint" in said) == (4, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("before", [False, True])
def test_a_full_disk_leaves_what_was_there(runs, tmp_path, capsys, monkeypatch, before):
    out = tmp_path / "out"
    if before:
        exported(runs.autoencoder, out)
        capsys.readouterr()
    kept = {path: path.read_bytes() for path in out.glob("*")}

    def full(state: Any, folder: Path) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, os.strerror(28), str(folder))

    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", full)
    code, said = refused(capsys, str(runs.diffusion), "--to", "safetensors", "--out", str(out), "--force")
    assert (code, "No space left" in said) == (6, True)
    assert {path: path.read_bytes() for path in out.glob("*")} == kept
    assert [*tmp_path.iterdir()] == ([out] if before else [])


def test_a_disk_without_room_is_noticed_before_anything_is_written(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    code, said = refused(capsys, str(runs.diffusion), "--to", "safetensors", "--out", str(tmp_path / "out"))
    assert (code, "1.0 kB are free" in said) == (6, True)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("to", "package", "extra"),
    [
        ("safetensors", "huggingface_hub", "interop"),
        ("onnx", "onnxruntime", "onnx"),
        ("torch", "huggingface_hub", "interop"),
    ],
)
def test_a_missing_package_names_its_extra_before_anything_is_computed(
    runs, tmp_path, capsys, monkeypatch, to, package, extra
):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(torch.export, "export", None)
    code, said = refused(capsys, str(runs.diffusion), "--to", to, "--out", str(tmp_path / "out"))
    assert (code, f"pip install -e .[{extra}]" in said) == (2, True)
    assert [*tmp_path.iterdir()] == []
