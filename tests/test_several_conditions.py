"""A transformer of texts with masks, pictures and sizes beside one another, from a folder to samples."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from ldm.checkpoints import store
from ldm.config.load import to_yaml
from ldm.diffusion.conditioners import vision_models
from ldm.sampling.guidance import Guidance
from ldm.sampling.pipeline import Pipeline
from ldm.training.metrics_table import read_metrics
from tests.conftest import node
from tests.diffusion.conditioners.test_pictures import clip, saved
from tests.tiny_text import LONGEST, WIDTH, forget, save_text_encoder

pytest.importorskip("transformers")

SIZES = ["original_size", "crop_top_left", "target_size"]
CONDITIONERS = "ldm.diffusion.conditioners"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vision_models.opened.cache_clear()
    yield tmp_path
    forget()


@pytest.fixture
def pictures(tmp_path):
    """12 pictures of several sizes, with captions of two lengths."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (16 + number, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(("a red cat", "photo of a blue boat on a cat")[number % 2])
    return folder


@pytest.fixture
def tree(diffusion_tree, runs, pictures, tmp_path):
    model, data = diffusion_tree["model"]["params"], diffusion_tree["data"]["params"]
    data |= {"autoencoder": str(runs.autoencoder), "resolution": 16, "num_validation": 2, "numbers": SIZES}
    data["train"] = node("ldm.data.sources.folder.ImageFolder", root=str(pictures))
    text = {"encoder": str(save_text_encoder(tmp_path / "text")), "channels": WIDTH, "max_length": LONGEST}
    data["features"] = {
        "text": node(f"{CONDITIONERS}.text.TextEncoder", **text),
        "picture": node(f"{CONDITIONERS}.pictures.PictureEncoder", encoder=str(saved(tmp_path / "clip", clip()))),
    }
    picture = node(f"{CONDITIONERS}.pictures.FeaturePicture", feature="${data.params.features.picture}")
    parts = {
        "text": node(f"{CONDITIONERS}.text.FeatureText", feature="${data.params.features.text}"),
        "picture": node(f"{CONDITIONERS}.projected.Projected", conditioner=picture, vector=[32, 8]),
        "sizes": node(f"{CONDITIONERS}.numbers.Numbers", counts=dict.fromkeys(SIZES, 2), channels=4),
    }
    dropout = {"text": 0.2, "picture": 0.5, "sizes": 0.1}
    model["conditioner"] = node(f"{CONDITIONERS}.joint.Joint", conditioners=parts, dropout=dropout)
    sizes = {"in_channels": "${data:channels}", "patch_size": 1, "hidden_size": 16, "depth": 2, "num_heads": 2}
    more = {"vector_channels": 8 + 6 * 4, "context_dim": WIDTH, "rope": True, "checkpointing": True}
    model["network"] = node("ldm.diffusion.networks.dit.DiT", **sizes, **more)
    diffusion_tree["lightning"]["trainer"] |= {"max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1}
    return diffusion_tree


def train(tree, *words: str) -> int:
    Path("config.yaml").write_text(to_yaml(tree))
    return main.main(["--base", "config.yaml", *words])


def run(name: str = "tiny_diffusion") -> Path:
    (folder,) = Path("logs").glob(f"*_{name}")
    return folder


def weights(name: str) -> dict[str, torch.Tensor]:
    return store.load(store.verify(run(name)))["state_dict"]


def wanted(seed: int) -> dict:
    picture = np.random.default_rng(seed).integers(0, 256, (20, 16, 3), dtype=np.uint8)
    sizes = {"original_size": [16, 16], "crop_top_left": [0, 0], "target_size": [16, 16]}
    return {"caption": ("a red cat", "photo of a blue boat on a cat")[seed % 2], "image": picture, **sizes}


@pytest.mark.parametrize("in_sequence", [False, True])
def test_from_a_folder_to_samples(tree, in_sequence):
    tree["model"]["params"]["network"]["params"]["tokens_in_sequence"] = in_sequence
    assert train(tree) == 0
    assert torch.isfinite(torch.tensor(float(read_metrics(run() / "metrics.csv")[-1]["val/loss"])))
    pipeline = Pipeline.load(run())
    guided = {"steps": 2, "guidance": Guidance(2.0)}
    first, second = pipeline.generate([1, 1], [wanted(0), wanted(1)], **guided)
    assert first.size == (16, 16)
    (alone,) = pipeline.generate([1], [wanted(1)], **guided)
    difference = np.abs(np.asarray(alone, dtype=int) - np.asarray(second, dtype=int)).max()
    assert difference <= 1, "a picture depends on its own condition alone, whatever the lengths beside it"
    unsaid = {key: value for key, value in wanted(1).items() if key not in SIZES}
    (same,) = pipeline.generate([1], [unsaid], **guided)
    assert np.array_equal(np.asarray(same), np.asarray(alone)), "sizes that nobody says are those of the picture"
    assert pipeline.generate([1], [unsaid], size=(16, 24), **guided)[0].size == (24, 16)


@pytest.mark.slow
@pytest.mark.parametrize("in_sequence", [False, True])
def test_two_ranks_with_shards_train_as_one(tree, forked, in_sequence):
    tree["model"]["params"]["network"]["params"]["tokens_in_sequence"] = in_sequence
    assert forked(1, lambda rank: train(tree, "-n", "alone")) == [0]
    words = ["-n", "both", "lightning.strategy={target: ldm.training.strategies.FSDP2, params: {timeout: 60}}"]
    assert forked(2, lambda rank: train(tree, *words, "lightning.trainer.devices=2")) == [0, 0]
    logged = [float(read_metrics(run(name) / "metrics.csv")[-1]["val/loss"]) for name in ("alone", "both")]
    assert logged[1] == pytest.approx(logged[0], rel=1e-5)
