"""Captions read by a transformer that is trained with the denoiser: from its tokenizer to samples of texts."""

import json
from pathlib import Path

import pytest
import torch

import main
from ldm.checkpoints import store
from ldm.cli import convert as convert_command
from ldm.cli import ema, export, sample, tokenizer
from ldm.config.load import to_yaml
from ldm.diffusion.conditioners.tokenizer import Tokenizer
from ldm.sampling.guidance import Guidance
from ldm.sampling.pipeline import Pipeline
from ldm.training.metrics_table import read_metrics
from tests.conftest import node

pytest.importorskip("tokenizers")

SHORT = {"max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1}
WANTED = [{"caption": "a red cat"}, {"caption": "a blue dog 🐱"}]
WIDTH, WORDS, LONGEST = 16, 280, 10


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tree(diffusion_tree, runs, own_images):
    for number, picture in enumerate(sorted(own_images.rglob("*.png"))):
        picture.with_suffix(".txt").write_text(f"photo of a {('red', 'green', 'blue')[number % 3]} cat")
    model, data = diffusion_tree["model"]["params"], diffusion_tree["data"]["params"]
    model["network"]["params"] |= {
        "vector_channels": None,
        "context_dim": "${model.params.conditioner.params.channels}",
    }
    model["conditioner"] = node(
        "ldm.diffusion.conditioners.text_transformer.TextTransformer",
        tokenizer="words.json",
        channels=WIDTH,
        depth=2,
        vocab_size=WORDS,
        max_length=LONGEST,
        num_heads=2,
        num_head_channels=8,
    )
    model["label_dropout"] = 0.2
    data |= {"autoencoder": str(runs.autoencoder), "resolution": 16, "num_validation": 2}
    data["train"] = node("ldm.data.sources.folder.ImageFolder", root=str(own_images))
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
    Path("config.yaml").write_text(to_yaml(diffusion_tree))
    return diffusion_tree


def train(*words: str) -> int:
    return main.main(["--base", "config.yaml", *words])


def make_tokenizer(*words: str) -> None:
    assert tokenizer.main(["--base", "config.yaml", "--vocab", str(WORDS), "--out", "words.json", *words]) == 0


def run(name: str = "tiny_diffusion") -> Path:
    (folder,) = Path("logs").glob(f"*_{name}")
    return folder


def weights(path: Path) -> dict[str, torch.Tensor]:
    return store.load(store.verify(path))["state_dict"]


def test_a_missing_tokenizer_is_asked_for_before_anything_is_made(tree, capsys):
    for words in ((), ("--dry-run",)):
        assert train(*words) == 2
        assert "words.json: no such file. Make one of the captions: ldm tokenizer" in capsys.readouterr().err
    assert not [*Path().glob("logs/*")]
    assert not Path("cache").exists()
    make_tokenizer()
    assert train("--dry-run") == 0
    assert train("--dry-run", "model.params.conditioner.params.vocab_size=100") == 2
    assert "vocab_size: words.json has" in capsys.readouterr().err


@pytest.mark.slow
def test_from_captions_to_samples_with_the_checkpoint_alone(tree, caplog):
    make_tokenizer()
    assert train() == 0
    assert [*run().glob("images/val/samples_*.png")]
    assert (run() / "tokenizer.json").read_bytes() == Path("words.json").read_bytes()
    saved = weights(run())
    first, last = (f"denoiser.conditioner.{name}" for name in ("words.weight", "layers.1.fc2.weight"))
    assert not torch.equal(saved[last], saved[last.replace("denoiser", "ema.average")])
    assert train("-n", "parts", "lightning.trainer.max_steps=2") == 0
    assert not torch.equal(weights(run("parts"))[first], saved[first]), "it is trained"

    # As on another machine, where there is no file but the checkpoint.
    Path("words.json").rename("away.json")
    assert main.main(["-r", str(run("parts")), "lightning.trainer.max_steps=4"]) == 0
    parts = weights(run("parts"))
    assert all(torch.equal(saved[name], parts[name]) for name in saved if isinstance(saved[name], torch.Tensor))
    Path("wanted.json").write_text(json.dumps(WANTED))
    command = ["-n", "2", "--steps", "2", "--guidance", "2", "--conditions", "wanted.json"]
    assert sample.main(["-r", str(run()), *command]) == 0
    assert len([*run().glob("samples/*/*-00000?.png")]) == 4

    # Another tokenizer in its place.
    make_tokenizer("data.params.num_validation=3", "--vocab", "270")
    found, expected = (Tokenizer(Path(name).read_bytes(), 77, name).digest for name in ("words.json", "away.json"))
    assert found != expected
    said = f"words.json: not the tokenizer that this model was trained with, and not used: sha256 {found}, expected "
    assert sample.main(["-r", str(run()), *command, "--out", "again"]) == 0
    assert said + expected in caplog.text
    (made,) = run().glob("samples/*")
    assert all((made / file.name).read_bytes() == file.read_bytes() for file in Path("again").glob("*-00000?.png"))
    assert main.main(["-r", str(run("parts")), "lightning.trainer.max_steps=5"]) == 0
    assert train("-n", "tuned", f"init_from={run()}", "lightning.trainer.max_steps=2") == 0
    assert (run("tuned") / "tokenizer.json").read_bytes() == Path("away.json").read_bytes()


@pytest.mark.slow
def test_exported_and_averaged_it_still_reads(tree):
    make_tokenizer()
    model = tree["model"]["params"]
    profile = node("ldm.optim.ema.PowerFunction", std=0.1)
    model["ema"]["params"] = {"profile": profile, "extra": [node("ldm.optim.ema.PowerFunction", std=0.05)]}
    tree["lightning"]["callbacks"]["averages"] = node("ldm.training.callbacks.ema_snapshots.EMASnapshots", every=2)
    Path("config.yaml").write_text(to_yaml(tree))
    assert train() == 0
    Path("words.json").unlink()
    (expected,) = Pipeline.load(run()).generate([1], WANTED[:1], steps=2, guidance=Guidance(2.0))
    assert export.main([str(run()), "--to", "safetensors", "--out", "exported"]) == 0
    assert convert_command.main(["exported", "--name", "back"]) == 0
    (found,) = Pipeline.load(run("back")).generate([1], WANTED[:1], steps=2, guidance=Guidance(2.0))
    assert found.tobytes() == expected.tobytes()
    assert ema.main(["-r", str(run()), "--std", "0.075"]) == 0
    (average,) = run().glob("averages/std=*.ckpt")
    assert len(Pipeline.load(average).generate([1], WANTED[:1], steps=2)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("shards", [", sharded_checkpoints: true", None])
def test_two_ranks_train_as_one(tree, shards, forked):
    make_tokenizer()
    strategy = "DDP, params: {timeout: 60" if shards is None else f"FSDP2, params: {{timeout: 60{shards}"
    dropout = "model.params.network.params.dropout=0.0"  # whose draws are a rank's own
    assert forked(1, lambda rank: train("-n", "alone", dropout)) == [0]
    words = ["-n", "both", f"lightning.strategy={{target: ldm.training.strategies.{strategy}}}}}", dropout]
    assert forked(2, lambda rank: train(*words, "lightning.trainer.devices=2")) == [0, 0]
    one, two = weights(run("alone")), weights(run("both"))
    assert torch.equal(one["denoiser.conditioner._extra_state"], two["denoiser.conditioner._extra_state"])
    logged = [float(read_metrics(run(name) / "metrics.csv")[-1]["val/loss"]) for name in ("alone", "both")]
    assert logged[1] == pytest.approx(logged[0], rel=1e-5)
    Path("words.json").unlink()
    words = ["-r", str(run("both")), "lightning.trainer.max_steps=6", "lightning.trainer.devices=2"]
    assert forked(2, lambda rank: main.main(words)) == [0, 0]
    assert Pipeline.load(run("both")).generate([1], WANTED[:1], steps=2)[0].size == (16, 16)
