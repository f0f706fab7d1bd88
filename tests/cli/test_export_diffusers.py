"""`ldm export --to diffusers`: from a run folder to one that the library loads; and what it refuses."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm.autoencoder.codec import Codec
from ldm.cli import convert, export
from ldm.config.load import build
from ldm.config.randomness import STANDARD
from ldm.diffusion.module import LatentDiffusion
from ldm.images import to_arrays
from ldm.interop.diffusers_models.check import loaded
from ldm.latents.manifest import CacheSpec, Manifest
from ldm.optim.ema import EMA, FixedDecay
from ldm.randomness import Draws
from ldm.sampling.generate import SEED
from ldm.sampling.guidance import Guidance
from ldm.sampling.pipeline import Pipeline
from tests.tiny_runs import ADAM, CLASSES, node, save_autoencoder, save_run

pytest.importorskip("diffusers")


def made(root: Path, **more: Any) -> Path:
    """The run of a DiT of random weights, trained as a flow on classes."""
    autoencoder = save_autoencoder(root / "2026-01-01T00-00-00_tiny_autoencoder")
    sizes = {"in_channels": 4, "patch_size": 2, "hidden_size": 32, "depth": 1, "num_heads": 2}
    classes = {"num_classes": len(CLASSES), "channels": 32}
    params = {
        "network": node("diffusion.networks.dit.DiT", **sizes, **more),
        "conditioner": node("diffusion.conditioners.classes.ClassVector", **classes),
        "objective": node("diffusion.objectives.Flow"),
        "label_dropout": 0.1,
    }
    torch.manual_seed(0)
    parts = [build(params[name]) for name in ("network", "conditioner", "objective")]
    module = LatentDiffusion(*parts, optimizer=ADAM, ema=partial(EMA, profile=FixedDecay()), label_dropout=0.1)
    for weight in module.ema.average.parameters():
        if weight.ndim > 1 and not weight.any():
            torch.nn.init.normal_(weight.data, std=0.05)
    codec = Codec.load(autoencoder)
    made_by = {"weights": codec.weight_hash(), "config": codec.config, "path": str(autoencoder)}
    pixels = {"resolution": 16, "channels": 3}
    plan = CacheSpec((4, 4, 4), 10, "", pixels, made_by, len(CLASSES), CLASSES)
    manifest = Manifest(plan, mean=[0.5, 0.0, -0.5, 0.1], std=[2.0, 1.0, 0.5, 1.5], broken=[], shards=[])
    config = {"randomness": STANDARD, "model": {"params": params}}
    record = {"kind": "diffusion", "config": config, "latents": manifest.to_dict()}
    return save_run(root / "2026-01-01T00-00-01_tiny_diffusion", module, record)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made(tmp_path_factory.mktemp("logs"))


def test_the_folder_makes_the_pictures_of_ldm_sample(run, tmp_path, capsys):
    out = tmp_path / "folder"
    assert export.main([str(run), "--to", "diffusers", "--out", str(out)]) == 0
    assert "pipeline.py" in capsys.readouterr().out
    seeds, labels = [3, 4], [2, 0]
    own = Pipeline.load(run).generate(
        seeds, [{"class_label": label} for label in labels], steps=7, guidance=Guidance(1.5)
    )
    noise = Draws(SEED, seeds, 2).normal("noise", (4, 4, 4))
    found = loaded(out)(
        class_labels=labels, guidance_scale=1.5, num_inference_steps=7, latents=noise, output_type="pt"
    ).images
    difference = to_arrays(found * 2 - 1).astype(int) - np.stack([np.asarray(picture) for picture in own]).astype(int)
    assert np.abs(difference).max() <= 1
    card = (out / "README.md").read_text()
    assert 'from_pretrained("FOLDER", trust_remote_code=True)' in card
    assert "pipeline(class_labels=[0], guidance_scale=2.0)" in card
    assert "the same picture of the same noise" in card


def test_the_folder_comes_back_as_runs(run, tmp_path):
    """With the latents' scale and the row of no class, which our pipeline's file holds."""
    assert export.main([str(run), "--to", "diffusers", "--out", str(tmp_path / "folder"), "--no-check"]) == 0
    assert convert.main([str(tmp_path / "folder"), "--logdir", str(tmp_path / "logs")]) == 0
    (back,) = (path for path in (tmp_path / "logs").iterdir() if not path.name.endswith("_autoencoder"))
    how = {"steps": 5, "guidance": Guidance(1.5)}
    own, again = (Pipeline.load(one).generate([3], [{"class_label": 2}], **how)[0] for one in (run, back))
    assert np.abs(np.asarray(own).astype(int) - np.asarray(again)).max() <= 1


def test_an_autoencoder_alone(run, tmp_path):
    from diffusers import AutoencoderKL

    out = tmp_path / "folder"
    autoencoder = next(run.parent.glob("*_tiny_autoencoder"))
    assert export.main([str(autoencoder), "--to", "diffusers", "--out", str(out)]) == 0
    assert "AutoencoderKL.from_pretrained" in (out / "README.md").read_text()
    assert AutoencoderKL.from_pretrained(out).config.latent_channels == 4


def test_a_folder_that_was_not_compared_says_so(run, tmp_path):
    out = tmp_path / "folder"
    assert export.main([str(run), "--to", "diffusers", "--out", str(out), "--no-check"]) == 0
    assert "was not compared with the model" in (out / "README.md").read_text()


def refused(capsys, *words: str) -> str:
    """The one line of an error of the command line."""
    assert export.main([*map(str, words)]) == 2
    lines = capsys.readouterr().err.strip()
    assert lines.startswith("error: ")
    return lines


def test_a_narrow_unet_of_classes(runs, tmp_path):
    """As the quickstart's, whose norms differ in their number of groups."""
    assert export.main([str(runs.diffusion), "--to", "diffusers", "--out", str(tmp_path / "folder")]) == 0


def test_bad_input_is_one_message_and_leaves_nothing(run, tmp_path, tmp_path_factory, capsys, monkeypatch):
    out = tmp_path / "folder"
    modern = made(tmp_path_factory.mktemp("logs"), rope=True)
    assert "rope=True" in refused(capsys, modern, "--to", "diffusers", "--out", out)
    assert not [*tmp_path.iterdir()]

    with monkeypatch.context() as without:
        without.setitem(sys.modules, "diffusers", None)
        assert "pip install -e .[interop]" in refused(capsys, run, "--to", "diffusers", "--out", out)
    assert not [*tmp_path.iterdir()]

    out.mkdir()
    (out / "mine").touch()
    assert "is already there" in refused(capsys, run, "--to", "diffusers", "--out", out)
    assert [*out.iterdir()] == [out / "mine"]


def test_a_library_that_may_not_run_the_folders_code_is_told_of_no_check(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.DIFFUSERS_DISABLE_REMOTE_CODE", True)
    assert "--no-check" in refused(capsys, run, "--to", "diffusers", "--out", tmp_path / "folder")
    assert not [*tmp_path.iterdir()]
