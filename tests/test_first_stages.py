"""A codebook in the Gaussian's place, and no first stage at all: both stages, from pictures to pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from ldm.autoencoder.codec import Codec
from ldm.checkpoints import store
from ldm.cli import sample
from ldm.config.load import to_yaml
from ldm.sampling.pipeline import Pipeline
from ldm.training.metrics_table import read_metrics
from tests.conftest import node

SHORT = {"max_steps": 4, "val_check_interval": 4, "log_every_n_steps": 2}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(tree, *words: str) -> int:
    tree["lightning"]["trainer"] |= SHORT
    Path("config.yaml").write_text(to_yaml(tree))
    return main.main(["--base", "config.yaml", *words])


def run(name: str) -> Path:
    (folder,) = Path("logs").glob(f"*_{name}")
    return folder


@pytest.fixture
def vq_tree(autoencoder_tree):
    params = autoencoder_tree["model"]["params"]
    params["encoder"]["params"]["moments"] = False
    params["quantizer"] = node("ldm.autoencoder.quantizer.VectorQuantizer", size=32, channels=2)
    return autoencoder_tree


@pytest.mark.slow
def test_a_codebook_from_pictures_to_pictures(vq_tree, diffusion_tree):
    assert train(vq_tree) == 0
    row = read_metrics(run("tiny_autoencoder") / "metrics.csv")[-1]
    assert 1 <= float(row["val/perplexity"]) <= 32
    assert 0 < float(row["val/codes_used"]) <= 1
    assert "val/kl" not in row
    codec = Codec.load(run("tiny_autoencoder"))
    mean, std = codec.encode(torch.zeros(1, 3, 16, 16))
    assert (tuple(mean.shape), bool(std.any())) == ((1, 2, 8, 8), False)
    assert codec.quantizer is not None
    # The latents are the encoder's own; the decoder sees their codes, whichever side of a code they lie on.
    codes = codec.quantizer(mean).mode()
    torch.testing.assert_close(codec.decode(mean), codec.decode(codes))

    assert train(diffusion_tree) == 0
    assert sample.main(["-r", "logs/*_tiny_diffusion", "-n", "1", "--steps", "2"]) == 0
    pipeline = Pipeline.load(run("tiny_diffusion"))
    assert pipeline.codec.weight_hash() == codec.weight_hash()
    assert pipeline.codec.quantizer is not None


@pytest.mark.slow
def test_a_resumed_codebook_is_the_same(vq_tree):
    vq_tree["model"]["params"].pop("schedule")  # which would end with the first part
    assert train(vq_tree) == 0
    assert train(vq_tree, "-n", "parts", "lightning.trainer.max_steps=2", "lightning.trainer.val_check_interval=2") == 0
    assert main.main(["-r", str(run("parts")), "lightning.trainer.max_steps=4"]) == 0
    whole, parts = (store.load(store.verify(run(name)).path)["state_dict"] for name in ("tiny_autoencoder", "parts"))
    assert whole.keys() == parts.keys()
    assert "quantizer.codebook.weight" in whole
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_an_encoder_of_moments_and_a_quantizer_do_not_fit(vq_tree, capsys):
    vq_tree["model"]["params"]["encoder"]["params"]["moments"] = True
    assert train(vq_tree) == 2
    assert "encoder.params.moments: expected False, found True" in capsys.readouterr().err


@pytest.mark.slow
def test_pixels_from_pictures_to_pictures(diffusion_tree, image_folder, capsys):
    diffusion_tree["data"]["params"] |= {"autoencoder": None, "resolution": 16}
    assert train(diffusion_tree, "--dry-run") == 0
    assert train(diffusion_tree) == 0
    pipeline = Pipeline.load(run("tiny_diffusion"))
    assert (pipeline.manifest.plan.shape, pipeline.manifest.plan.autoencoder["config"]) == ((3, 16, 16), {})
    assert sample.main(["-r", "logs/*_tiny_diffusion", "-n", "1", "--steps", "2"]) == 0
    (picture,) = Path("logs").glob("*/samples/*/000-000000.png")
    assert np.asarray(Image.open(picture)).shape == (16, 16, 3)
    assert main.main(["-r", str(run("tiny_diffusion")), "lightning.trainer.max_steps=6"]) == 0


def test_pixels_are_a_codec_that_changes_nothing():
    codec = Codec.pixels(3)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    mean, std = codec.encode(images)
    assert torch.equal(mean, images)
    assert not std.any()
    assert torch.equal(codec.decode(mean), images)
    assert codec.latent_shape(8) == (3, 8, 8)
    assert codec.weight_hash() == Codec.pixels(1).weight_hash()
    assert codec.to("meta").device.type == "meta"
