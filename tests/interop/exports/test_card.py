"""The model card of a run: what it says is what the run says, and what that does not say is called unknown."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load
from PIL import Image

import main
from ldm.checkpoints import store
from ldm.cli import convert, export
from ldm.config.load import to_yaml
from ldm.evaluation.record import Record
from ldm.evaluation.values import Value


@pytest.fixture
def run(autoencoder_tree, tmp_path, monkeypatch) -> Path:
    """Two steps of stage 1."""
    monkeypatch.chdir(tmp_path)
    autoencoder_tree["lightning"]["trainer"] |= {"max_steps": 2, "val_check_interval": 2, "log_every_n_steps": 1}
    Path("run.yaml").write_text(to_yaml(autoencoder_tree))
    assert main.main(["--base", "run.yaml"]) == 0
    return next((tmp_path / "logs").iterdir())


def card(run: Path, *words: str) -> tuple[str, dict[str, Any]]:
    """Its text, and its front matter as huggingface_hub reads it."""
    out = run.parent / "out"
    assert export.main([str(run), "--to", "safetensors", "--out", str(out), "--force", *words]) == 0
    text = (out / "README.md").read_text()
    data = metadata_load(out / "README.md")
    assert data is not None
    loaded = ModelCard(text)
    assert loaded.content == text
    assert ModelCardData(**data).to_dict() == loaded.data.to_dict()
    return text, data


def row(text: str, name: str) -> str:
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return found.removeprefix(f"| {name} |").strip(" |")


def test_a_run_says_how_it_was_trained(run):
    text, data = card(run, "--license", "CC BY 4.0", "--data-license", "mine")
    record = store.load(store.verify(run))["ldm"]
    assert data["license"] == "cc-by-4.0"
    assert data["library_name"] == "ldm"
    assert "model-index" not in data
    assert row(text, "steps") == "2"
    assert row(text, "images seen") == "12"
    assert row(text, "batch") == "6"
    assert float(row(text, "hours")) > 0
    assert row(text, "optimizer") == "`torch.optim.Adam`"
    assert row(text, "training pictures") == str(record["data"]["num_items"])
    assert row(text, "source") == "unknown (read by `ldm.data.sources.folder.ImageFolder`)"
    assert row(text, "weights") == "CC BY 4.0"
    assert row(text, "license") == row(text, "data") == "mine"
    assert row(text, "torch") == f"{torch.__version__} in training, {torch.__version__} for this export"
    assert "Not measured" in text
    assert str(run) not in text


def test_what_a_run_does_not_say_is_unknown(runs):
    text, data = card(runs.diffusion)
    for name in ("images seen", "batch", "hours", "precision", "weights", "license", "training pictures"):
        if name != "weights":
            assert row(text, name) == "unknown", name
    assert data["license"] == "unknown"
    assert "3: cat, dog, Ankle boot" in row(text, "classes")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("mit", {"license": "mit"}),
        ("CC-BY-NC-4.0", {"license": "cc-by-nc-4.0"}),
        ("Our own, see LICENSE", {"license": "other", "license_name": "our-own,-see-license"}),
    ],
)
def test_a_license_that_the_hub_does_not_know_is_another(runs, given, found):
    _, data = card(runs.diffusion, "--license", given)
    assert {key: data[key] for key in data if key.startswith("license")} == found


def measured(run: Path, step: int, weights: str, name: str, value: float) -> None:
    subject = {"name": str(run), "kind": "samples", "pictures": "0", "training": {"step": step}}
    protocol = {
        "kind": "samples",
        "images": 5000,
        "weights": weights,
        "steps": 30,
        "sampler": "ddim",
        "reference": {"name": "/home/somebody/pictures/reference.npz"},
    }
    values = [Value("FID", value, 0.25, features="inception-2015/tf1-299")]
    sheets = {"pictures": f"{name}.pictures.png", "nearest": f"{name}.nearest.png"}
    Record(subject, protocol, values, sheets=sheets, date="2026-01-01").write(run / "evaluation" / f"{name}.json")
    for sheet in sheets.values():
        Image.new("RGB", (8, 8)).save(run / "evaluation" / sheet)


def test_numbers_are_those_of_the_records_of_this_checkpoint_and_these_weights(make_runs):
    run = make_runs().diffusion
    measured(run, 7, "ema", "right", 12.345)
    measured(run, 6, "ema", "earlier", 777.4)
    measured(run, 7, "raw", "other", 888.4)
    (run / "evaluation" / "broken.json").write_text("{")
    (run / "evaluation" / "other_program.json").write_text("[1]")
    text, data = card(run)
    assert "| FID | 12.35 | 0.25 | inception-2015/tf1-299 | reference.npz | 5000 |" in text
    assert "777.4" not in text
    assert "888.4" not in text
    assert "/home/somebody" not in text
    (entry,) = data["model-index"]
    (result,) = entry["results"]
    assert (result["metrics"][0]["type"], result["metrics"][0]["value"]) == ("fid", 12.345)
    assert result["dataset"]["name"] == "reference.npz"
    text, _ = card(run, "--raw")
    assert "| FID | 888.4 |" in text


def test_sheets_are_copied_the_newest_of_each_kind_and_no_training_pictures(make_runs):
    run = make_runs().diffusion
    measured(run, 7, "ema", "right", 12.345)
    (run / "images" / "val").mkdir(parents=True)
    for name in ("samples_00000003", "samples_00000007", "samples_00000009", "thing"):
        Image.new("RGB", (8, 8)).save(run / "images" / "val" / f"{name}.png")
    text, _ = card(run)
    out = run.parent / "out"
    copied = {str(path.relative_to(out)) for path in (out / "pictures").iterdir()}
    assert copied == {"pictures/samples_00000007.png", "pictures/right.pictures.png"}
    assert all(f"]({name})" in text for name in copied)
    text, _ = card(run, "--no-pictures")
    assert "![" not in text
    assert not (out / "pictures").exists()


def test_a_converted_run_says_where_it_comes_from(runs, tmp_path):
    text, _ = card(runs.diffusion, "--license", "mit")
    logs = tmp_path / "logs"
    assert convert.main([str(runs.diffusion.parent / "out"), "--logdir", str(logs), "--name", "again"]) == 0
    text, data = card(max(logs.iterdir()))
    assert data["license"] == "mit"
    assert row(text, "converted from") == "out (ldm export); these figures are of what followed"
    assert row(text, "source") == "unknown: the weights were converted"
    assert "converted for ldm" in text


@pytest.mark.parametrize("to", ["onnx", "torch"])
@pytest.mark.slow
def test_each_format_says_how_it_is_loaded(runs, tmp_path, to):
    assert export.main([str(runs.autoencoder), "--to", to, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "programs.json").read_text())["decoder"]["file"] in text
