"""Pictures and their captions, from a folder to samples of texts."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from ldm.checkpoints import store
from ldm.cli import ema, sample
from ldm.config.load import to_yaml
from ldm.diffusion.conditioners import text
from ldm.sampling.guidance import Guidance
from ldm.sampling.pipeline import Pipeline
from ldm.training.metrics_table import read_metrics
from tests.conftest import node
from tests.tiny_text import LONGEST, WIDTH, forget, save_text_encoder

pytest.importorskip("transformers")

SHORT = {"max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1}
WANTED = [{"caption": "a red cat"}, {"caption": "a blue boat"}]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    forget()


@pytest.fixture
def encoder(tmp_path):
    return save_text_encoder(tmp_path / "text")


@pytest.fixture
def pictures(tmp_path):
    """12 pictures of one color, which their captions name."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        color = ("red", "green", "blue")[number % 3]
        pixels = np.full((16, 16, 3), 20 * number, np.uint8)
        pixels[..., number % 3] = 255
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"photo of a {color} {('cat', 'dog', 'boat')[number % 2]}")
    return folder


@pytest.fixture
def tree(diffusion_tree, runs, pictures, encoder):
    model, data = diffusion_tree["model"]["params"], diffusion_tree["data"]["params"]
    model["network"]["params"] |= {
        "vector_channels": None,
        "context_dim": "${model.params.conditioner.params.channels}",
    }
    model["conditioner"] = node(
        "ldm.diffusion.conditioners.text.FrozenText", encoder=str(encoder), channels=WIDTH, max_length=LONGEST
    )
    data |= {"autoencoder": str(runs.autoencoder), "resolution": 16, "num_validation": 2}
    data["train"] = node("ldm.data.sources.folder.ImageFolder", root=str(pictures))
    diffusion_tree["lightning"]["trainer"] |= SHORT
    diffusion_tree["lightning"]["callbacks"] = {
        "images": node(
            "ldm.training.callbacks.previews.SampleLogger",
            every_n_steps=2,
            conditions=WANTED,
            seeds=[1, 2],
            steps=2,
            guidance_scale=2.0,
        )
    }
    return diffusion_tree


def train(tree, *words: str) -> int:
    Path("config.yaml").write_text(to_yaml(tree))
    return main.main(["--base", "config.yaml", *words])


def run(name: str = "tiny_diffusion") -> Path:
    (folder,) = Path("logs").glob(f"*_{name}")
    return folder


def weights(name: str) -> dict[str, torch.Tensor]:
    return store.load(store.verify(run(name)))["state_dict"]


def test_a_dry_run_reads_neither_captions_nor_weights(tree, capsys):
    assert train(tree, "--dry-run") == 0
    assert "latent" in capsys.readouterr().out
    assert text.opened.cache_info().misses == 0


@pytest.mark.slow
def test_captions_from_a_folder_to_samples(tree, encoder, here, capsys):
    assert train(tree) == 0
    assert text.opened.cache_info().misses == 1, "raw and averaged denoiser share it"
    assert [*run().glob("images/val/samples_*.png")]
    saved = weights("tiny_diffusion")
    assert [name for name in saved if "conditioner" in name] == [
        "denoiser.conditioner._extra_state",
        "ema.average.conditioner._extra_state",
    ]

    words = ["-n", "parts", "lightning.trainer.max_steps=2"]
    assert train(tree, *words) == 0
    assert main.main(["-r", str(run("parts")), "lightning.trainer.max_steps=4"]) == 0
    parts = weights("parts")
    assert all(torch.equal(saved[name], parts[name]) for name in saved if isinstance(saved[name], torch.Tensor))

    Path("wanted.json").write_text(json.dumps(WANTED))
    command = ["-r", str(run()), "-n", "2", "--steps", "2", "--guidance", "2"]
    assert sample.main([*command, "--conditions", "wanted.json"]) == 0
    assert len([*run().glob("samples/*/*-00000?.png")]) == 4
    (listing,) = run().glob("samples/*/samples.json")
    assert "a red cat" in listing.read_text()
    pipeline = Pipeline.load(run())
    (made,) = pipeline.generate([1], WANTED[1:], steps=2, guidance=Guidance(2.0))
    (file,) = run().glob("samples/*/a-blue-boat-*-000001.png")
    assert list(Image.open(file).getdata()) == list(made.getdata())
    # The same pictures by their captions on the command line.
    assert sample.main([*command, "--out", "asked", "--prompt", *(one["caption"] for one in WANTED)]) == 0
    Path("prompts.txt").write_text("a red cat\n\n  a blue boat \n")
    assert sample.main([*command, "--out", "listed", "--prompts-file", "prompts.txt"]) == 0
    for name in ("asked", "listed"):
        again = Path(name, file.relative_to(listing.parent))
        assert [*Image.open(file).getdata()] == [*Image.open(again).getdata()]
    assert sample.main([*command, "--out", "negative", "--prompt", "a red cat", "--negative", "a blue boat"]) == 0
    assert json.loads(Path("negative/samples.json").read_text())["settings"]["negative"] == "a blue boat"
    assert sample.main([*command, "--out", "wide", "--prompt", "a red cat", "--size", "16", "32"]) == 0
    assert {Image.open(path).size for path in Path("wide").glob("a-red*.png")} == {(32, 16)}
    capsys.readouterr()
    assert sample.main([*command, "--prompt", "a red cat", "--size", "15"]) == 2
    assert "size 15" in capsys.readouterr().err
    assert sample.main(command) == 2
    assert 'this model reads captions: say what to make, --prompt "..."' in capsys.readouterr().err

    text.opened.cache_clear()
    shutil.rmtree(encoder)
    save_text_encoder(encoder, seed=1)
    assert sample.main([*command, "--conditions", "wanted.json"]) == 4
    assert "not the text encoder that this model was trained with" in capsys.readouterr().err
    assert main.main(["-r", str(run()), "lightning.trainer.max_steps=6"]) == 4
    assert "not the text encoder that this model was trained with" in capsys.readouterr().err
    forget()
    encoder.rename(here / "moved")
    assert sample.main([*command, "--conditions", "wanted.json"]) == 4
    assert f"{encoder}: no text encoder" in capsys.readouterr().err


@pytest.mark.slow
def test_what_a_cache_keeps_is_what_the_encoder_makes_and_then_it_is_not_in_memory(tree, encoder, pictures, capsys):
    pool = node("ldm.diffusion.conditioners.pooling.Mean", normalize=True)
    feature = node(
        "ldm.diffusion.conditioners.text.TextEncoder", encoder=str(encoder), channels=WIDTH, max_length=12, pooling=pool
    )
    model, data = tree["model"]["params"], tree["data"]["params"]
    model["network"]["params"] |= {"vector_channels": WIDTH, "context_dim": WIDTH}
    model["conditioner"] = node("ldm.diffusion.conditioners.text.FeatureText", feature=feature)
    assert train(tree, "-n", "fresh") == 0
    assert text.opened(str(encoder)).is_loaded
    forget()
    data["features"] = {"words": feature}
    model["conditioner"] = node(
        "ldm.diffusion.conditioners.text.FeatureText", feature="${data.params.features.words}", name="words"
    )
    assert train(tree, "-n", "kept") == 0
    assert not text.opened(str(encoder)).is_loaded
    fresh, kept = weights("fresh"), weights("kept")
    assert fresh.keys() == kept.keys()
    assert all(torch.equal(fresh[name], kept[name]) for name in fresh if isinstance(fresh[name], torch.Tensor))
    rows = {name: read_metrics(run(name) / "metrics.csv") for name in ("fresh", "kept")}
    losses = [[{key: row[key] for key in row if "loss" in key} for row in found] for found in rows.values()]
    assert len(losses[0]) >= 4
    assert losses[0] == losses[1]

    Path("wanted.json").write_text(json.dumps(WANTED))
    (made,) = Pipeline.load(run("kept")).generate([1], WANTED[1:], steps=2)
    (same,) = Pipeline.load(run("fresh")).generate([1], WANTED[1:], steps=2)
    assert [*made.getdata()] == [*same.getdata()]
    capsys.readouterr()
    hashes = [text.opened(str(encoder)).weights]
    shutil.rmtree(encoder)
    save_text_encoder(encoder, seed=1)
    forget()
    hashes += [text.opened(str(encoder)).weights]
    assert main.main(["-r", str(run("kept")), "lightning.trainer.max_steps=6"]) == 2
    said = capsys.readouterr().err
    assert "features.words.weights" in said
    assert all(one[:16] in said for one in hashes)
    assert sample.main(["-r", str(run("kept")), "-n", "1", "--steps", "2", "--conditions", "wanted.json"]) == 4
    said = capsys.readouterr().err
    assert "not the text encoder that this model was trained with" in said
    assert all(one[:16] in said for one in hashes)


@pytest.mark.slow
def test_captions_beside_classes_and_several_averages(tree, pictures, capsys):
    for number in range(12):
        folder = pictures / ("even", "odd")[number % 2]
        folder.mkdir(exist_ok=True)
        for file in pictures.glob(f"{number}.*"):
            file.rename(folder / file.name)
    model = tree["model"]["params"]
    classes = node("ldm.diffusion.conditioners.classes.ClassVector", num_classes="${data:num_classes}", channels=8)
    both = {"class": classes, "text": model["conditioner"]}
    model["network"]["params"] |= {"vector_channels": 8, "context_dim": WIDTH}
    model["conditioner"] = node(
        "ldm.diffusion.conditioners.joint.Joint", conditioners=both, dropout={"text": 0.5, "class": 0.1}
    )
    model["label_dropout"] = 0.0
    profile = node("ldm.optim.ema.PowerFunction", std=0.1)
    model["ema"]["params"] = {"profile": profile, "extra": [node("ldm.optim.ema.PowerFunction", std=0.05)]}
    tree["lightning"]["callbacks"] = {
        "images": None,
        "averages": node("ldm.training.callbacks.ema_snapshots.EMASnapshots", every=2),
    }
    assert train(tree) == 0
    wanted = [{"caption": "a red cat", "class_label": 1}]
    Path("wanted.json").write_text(json.dumps(wanted))
    assert sample.main(["-r", str(run()), "-n", "1", "--steps", "2", "--conditions", "wanted.json"]) == 0
    assert ema.main(["-r", str(run()), "--std", "0.075"]) == 0
    (average,) = run().glob("averages/std=*.ckpt")
    assert sample.main(["-r", str(average), "-n", "1", "--steps", "2", "--conditions", "wanted.json"]) == 0


def test_a_run_starts_from_weights_that_name_no_encoder_as_those_of_others_do(tree, capsys):
    assert train(tree, "lightning.trainer.max_steps=1", "lightning.trainer.val_check_interval=1") == 0
    state = store.load(store.verify(run()))
    for key in [key for key in state["state_dict"] if key.endswith("conditioner._extra_state")]:
        del state["state_dict"][key]
    store.save(Path("bare/checkpoints/step=1.ckpt"), state)
    capsys.readouterr()
    tree["init_from"] = "bare"
    assert train(tree, "--dry-run") == 0
    assert "conditioner._extra_state" not in capsys.readouterr().out


def test_data_without_captions_is_refused_before_anything_is_made(tree, image_folder, capsys):
    tree["data"]["params"]["train"] = node("ldm.data.sources.folder.ImageFolder", root=str(image_folder))
    assert train(tree) == 2
    said = capsys.readouterr().err
    assert "FrozenText: the data set has no captions" in said
    assert not Path("cache").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("shards", [", sharded_checkpoints: true", None])
def test_two_ranks_train_as_one(tree, shards, kept, forked):
    """FSDP2 with a file a rank, and DDP: the encoder is whole on each; so with features that a cache keeps."""
    if kept:
        params = tree["model"]["params"]["conditioner"]["params"]
        tree["data"]["params"]["features"] = {"text": node("ldm.diffusion.conditioners.text.TextEncoder", **params)}
        tree["model"]["params"]["network"]["params"]["context_dim"] = WIDTH
        tree["model"]["params"]["conditioner"] = node(
            "ldm.diffusion.conditioners.text.FeatureText", feature="${data.params.features.text}"
        )
    tree["model"]["params"]["network"]["params"]["dropout"] = 0.0  # whose draws are a rank's own
    strategy = "DDP, params: {timeout: 60" if shards is None else f"FSDP2, params: {{timeout: 60{shards}"
    assert forked(1, lambda rank: train(tree, "-n", "alone")) == [0]
    words = ["-n", "both", f"lightning.strategy={{target: ldm.training.strategies.{strategy}}}}}"]
    Path("config.yaml").write_text(to_yaml(tree))
    assert forked(2, lambda rank: main.main(["--base", "config.yaml", *words, "lightning.trainer.devices=2"])) == [0, 0]
    one, two = weights("alone"), weights("both")
    assert one.keys() == two.keys()
    assert torch.equal(one["denoiser.conditioner._extra_state"], two["denoiser.conditioner._extra_state"])
    logged = [float(read_metrics(run(name) / "metrics.csv")[-1]["val/loss"]) for name in ("alone", "both")]
    assert logged[1] == pytest.approx(logged[0], rel=1e-5)
    made = Pipeline.load(run("both")).generate([1], WANTED[:1], steps=2)
    assert made[0].size == (16, 16)
