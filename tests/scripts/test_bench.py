import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.autoencoder.lpips import LPIPS
from ldm.data.dataset import Subset
from ldm.data.sources.arrays import DEBIAN_FASHION_MNIST, FashionMNIST
from ldm.run_folder import RunFolder, RunState
from scripts.bench import healthy, quality, steps
from scripts.bench.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("size", [steps.Size(), steps.TINY], ids=["full", "tiny"])
def test_the_networks_compared_are_of_the_same_size(size):
    images, latents = torch.zeros(2, 3, 32, 32), torch.zeros(2, 4, 8, 8)
    perceptual = torch.nn.Identity()  # of no one's size
    autoencoders = steps.our_autoencoder(size, images, perceptual), steps.usual_autoencoder(size, images, perceptual)
    unets = steps.our_unet(size, latents), steps.usual_unet(size, latents)
    for ours, theirs in (autoencoders, unets):
        assert ours.parameters == pytest.approx(theirs.parameters, rel=0.02)


def test_every_step_trains_what_it_should():
    """Each optimizer's weights move, and no gradient is left for the next step."""
    torch.manual_seed(0)
    images, latents = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 4, 8, 8)
    moved = []

    class Spy(torch.optim.SGD):
        def __init__(self, parameters):
            super().__init__(parameters, lr=1e-3)

        def step(self):
            weights = [weight for group in self.param_groups for weight in group["params"]]
            moved.append(sum(weight.grad is not None and bool(weight.grad.any()) for weight in weights) / len(weights))
            super().step()

    original, steps.Optimizer = steps.Optimizer, Spy
    try:
        perceptual = LPIPS()
        for make in (steps.our_autoencoder, steps.usual_autoencoder):
            make(steps.TINY, images, perceptual).step()
        for make in (steps.our_unet, steps.usual_unet):
            contestant = make(steps.TINY, latents)
            contestant.step()
            contestant.step()
    finally:
        steps.Optimizer = original
    # Two optimizers of each autoencoder, then two steps of each UNet, whose first moves only what is not behind a zero.
    assert len(moved) == 8
    assert min(moved[:4]) > 0.9
    assert moved[5] > moved[4]
    assert moved[7] > 0.9


@pytest.mark.parametrize("native", [True, False])
def test_steps_print_a_table(native, capsys, monkeypatch):
    """Where bf16 is emulated, its rows would take hours, and they say why they are not there."""
    monkeypatch.setattr(steps, "computes_bf16", lambda kind: (native, "it is emulated"))
    # The smallest that the discriminator takes: where this machine does emulate bf16, that is what the test costs.
    monkeypatch.setattr(steps, "TINY", replace(steps.TINY, resolution=24, images=1))
    assert main(["steps", "--tiny", "--repeats", "1", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert re.match(r"\d{4}-\d\d-\d\d, .+ threads, torch \S+, diffusers \S+; medians of 1", lines[0])
    assert lines[0].endswith("; without bf16: it is emulated") is not native
    assert lines[2].startswith("| step | precision |")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    precisions = ("fp32", "bf16") if native else ("fp32",)
    expected = [(name, precision) for name in ("autoencoder", "UNet") for precision in precisions]
    assert [(row[0].split(",")[0], row[1]) for row in rows] == expected
    for row in rows:
        ours, theirs = (float(cell.split()[0]) for cell in row[2:4])
        assert float(row[4]) == pytest.approx(theirs / ours, rel=0.5)


@pytest.mark.parametrize("arguments", [["speed"], ["steps", "--tinny"], []])
def test_mistakes_are_one_message(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("words", ["--guidance nan", "--guidance 2 inf", "--steps 0", "--number -1", "--epochs nan"])
def test_numbers_out_of_range_are_refused_before_any_training(words, capsys):
    assert main(["quality", *words.split()]) == 2
    error = capsys.readouterr().err
    assert f"{words.split()[0]}: expected" in error
    assert f"found {words.split()[-1]!r}" in error


def test_the_page_of_healthy_runs_has_what_its_commands_make():
    runs = healthy.commands()
    assert {file.stem for file in healthy.FOLDER.glob("*.csv")} == {*runs}
    assert {figure.beside for figure in healthy.FIGURES.values()} | {*healthy.FIGURES} == {*runs}
    pictures = {file.stem: file.stat().st_size for file in healthy.FOLDER.glob("*.png")}
    assert {*pictures} == {*healthy.FIGURES}
    assert max(pictures.values()) < 150 * 1024
    assert set(re.findall(r"\]\(healthy/(\w+)\.png\)", healthy.PAGE.read_text())) == {*healthy.FIGURES}


def test_the_page_of_healthy_runs_is_made_anew_from_finished_runs(tmp_path, monkeypatch, capsys):
    """Without training: the runs of its pictures, with the metrics that they had."""
    for name in healthy.commands():
        run = RunFolder(tmp_path / "logs" / f"2026-01-01T00-00-00_{name}")
        sheet = (
            run.images / "val" / f"{'samples' if 'train/kl' not in (kept := metrics_of(name)) else 'all'}_00000100.png"
        )
        run.make()
        run.config_file.touch()
        Image.fromarray(np.zeros((4 * healthy.ROW + 2, 8 * healthy.ROW + 2, 3), np.uint8)).save(sheet)
        run.metrics_file.write_text(kept)
        run.write_state(RunState("finished"))
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(healthy, "ROOT", tmp_path)
    monkeypatch.setattr(healthy, "FOLDER", tmp_path / "docs")
    assert main(["healthy", "--logdir", str(tmp_path / "logs")]) == 0
    assert {file.stem for file in (tmp_path / "docs").glob("*.png")} == {*healthy.FIGURES}
    assert all((tmp_path / "docs" / f"{name}.csv").read_text() == metrics_of(name) for name in healthy.commands())
    assert "docs/kl_too_high.png: " in capsys.readouterr().out


def metrics_of(name: str) -> str:
    return (ROOT / "docs" / "healthy" / f"{name}.csv").read_text()


@pytest.mark.slow
def test_the_folder_is_a_program_from_anywhere(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "bench"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: bench ")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="the package dataset-fashion-mnist is not installed")
def test_quality_from_nothing_to_the_table(tmp_path, monkeypatch, capsys):
    """The whole path, small: 2,000 images and a few steps teach neither stage much, but more than nothing."""
    monkeypatch.chdir(tmp_path)  # where the latent cache goes
    part = [*range(10_000)]
    monkeypatch.setattr(quality, "FashionMNIST", lambda train=True: Subset(FashionMNIST(train=train), part))
    source = "{target: ldm.data.sources.arrays.FashionMNIST}"
    subset = f"{{target: ldm.data.dataset.Subset, params: {{dataset: {source}, indices: %s}}}}"
    small = [
        "lightning.trainer.max_steps=60",
        "lightning.trainer.val_check_interval=60",
        "lightning.logger=null",
        f"data.params.train={subset % [*range(2000)]}",
        "data.params.num_validation=100",
    ]
    few = ["--number", "5", "--epochs", "3", "--steps", "4", "--guidance", "1", "2"]
    assert main(["quality", "--device", "cpu", *few, *small]) == 0
    output = capsys.readouterr().out
    (record,) = tmp_path.glob("logs/*_fashion_mnist_diffusion/quality/quality.json")
    found = json.loads(record.read_text())
    rows = found["rows"]
    assert found["classifier_test_accuracy"] > 0.8
    assert rows["real"]["accuracy"] > 0.7
    distances = [rows[name]["distance"] for name in ("real", "reconstructions of these", "samples, guidance 1")]
    assert distances == sorted(distances)
    assert "| samples, guidance 2 |" in output
    assert (record.parent / "pictures.png").stat().st_size > 1000
