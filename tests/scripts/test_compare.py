"""The comparison at its smallest: two configurations trained, judged, tabled and drawn; and gone on with."""

import json
from pathlib import Path

import pytest
from PIL import Image

from ldm.data.dataset import Subset
from ldm.data.sources.arrays import DEBIAN_FASHION_MNIST, FashionMNIST
from scripts import compare

RECORD = {
    "diffusion": {
        "parameters": 2_500_000,
        "images_per_second": 100.4,
        "marks": {
            "step=1.ckpt": {"images": 1000, "scores": {"1": {"accuracy": 0.5, "distance": 3.0}}},
            "step=2.ckpt": {"images": 2000, "scores": {"1": {"accuracy": 0.75, "distance": 2.0}}},
        },
    },
    "flow": {
        "parameters": 2_500_000,
        "images_per_second": 99.6,
        "marks": {"step=2.ckpt": {"images": 1900, "scores": {"1": {"accuracy": 0.8, "distance": 1.5}}}},
    },
}


def test_the_table_has_the_last_mark_of_each_best_first():
    lines = compare.table(RECORD).splitlines()
    assert lines[0] == "| configuration | parameters, M | images/s | images seen | guidance 1 |"
    assert lines[2:] == [
        "| flow | 2.5 | 100 | 1,900 | 80.0% / 1.50 |",
        "| diffusion | 2.5 | 100 | 2,000 | 75.0% / 2.00 |",
    ]


def test_the_figure(tmp_path):
    compare.draw(RECORD, tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").width > 800


def test_a_run_that_fails_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A mistake that main.py answers before it has loaded torch.
    words = ["--autoencoder", "nowhere", "--variants", "--out", "out", "data.params.batchsize=2"]
    assert compare.main(words) != 0
    assert "out/speed/diffusion/log: main.py ended with exit code 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    ["--guidance nan", "--guidance 1 inf", "--steps 0", "--number 0", "--minutes nan", "--minutes 0", "--marks 0"],
)
def test_numbers_out_of_range_are_refused_before_any_training(tmp_path, capsys, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    assert compare.main(["--autoencoder", "nowhere", *words.split()]) == 2
    error = capsys.readouterr().err
    assert f"{words.split()[0]}: expected" in error
    assert f"found {words.split()[-1]!r}" in error
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_two_configurations_are_compared(make_runs, tmp_path, monkeypatch, capsys):
    runs = make_runs(channels=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "CALIBRATION", 20)
    few = [*range(600)]
    monkeypatch.setattr(compare, "FashionMNIST", lambda train=True: Subset(FashionMNIST(train=train), few))
    source = "{target: ldm.data.sources.arrays.FashionMNIST}"
    subset = f"{{target: ldm.data.dataset.Subset, params: {{dataset: {source}, indices: %s}}}}"
    flow = compare.CONFIGS / "variants" / "flow.yaml"
    words = [
        "--variants",
        str(flow),
        "--minutes",
        "0.02",
        "--marks",
        "2",
        "--number",
        "4",
        "--steps",
        "2",
        "--epochs",
        "1",
    ]
    small = ["model.params.network.params.model_channels=32", "data.params.batch_size=4", "data.params.resolution=16"]
    small += [f"data.params.train={subset % few}", "data.params.num_validation=20"]
    arguments = ["--autoencoder", str(runs.autoencoder), *words, *small]
    assert compare.main(arguments) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert {line.split("|")[1].strip() for line in lines[2:4]} == {"diffusion", "flow"}
    record = json.loads(Path("comparison/comparison.json").read_text())["configurations"]
    assert [len(entry["marks"]) for entry in record.values()] == [2, 2]
    assert Path("comparison/comparison.png").is_file()
    monkeypatch.setattr(compare, "samples", lambda *_: pytest.fail("judged again"))
    assert compare.main(arguments) == 0
    capsys.readouterr()
    assert compare.main([*arguments, "--guidance", "1", "3"]) == 2
    assert "--guidance: [1.0, 2.0] there, [1.0, 3.0] now" in capsys.readouterr().err
