"""sample.py with models of super-resolution: large results in tiles, and the level of noise on the small picture."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.cli import large_options, sample
from ldm.runtime.signals import Stopped
from tests.upscalers import local, save_tiny_autoencoder, save_upscaler, unet


@pytest.fixture(scope="module")
def upscaler(runs, tmp_path_factory):
    """The run of a UNet, 4x to 64 pixels, on an autoencoder with norms and attention."""
    return save_upscaler(tmp_path_factory.mktemp("upscaler") / "run", runs.autoencoder, unet(), 64)


@pytest.fixture
def run(upscaler, tmp_path):
    """run(*arguments) -> (exit code, output folder)."""

    def call(*arguments, model=upscaler, out="out"):
        words = ["-r", model, "--out", tmp_path / out, "--steps", 3, "-n", 1, "--trust", "tests", *arguments]
        return sample.main([*map(str, words)]), tmp_path / out

    return call


@pytest.fixture
def small(tmp_path):
    """small(height, width) -> a picture file with something to see in it."""

    def write(height: int, width: int, mode: str = "RGB") -> Path:
        rows, columns = np.mgrid[:height, :width]
        waves = [
            127 + 100 * np.sin(rows / 3),
            127 + 100 * np.cos(columns / 2),
            127 + 100 * np.sin((rows + columns) / 4),
        ]
        Image.fromarray(np.stack(waves, -1).astype(np.uint8)).convert(mode).save(tmp_path / f"{height}x{width}.png")
        return tmp_path / f"{height}x{width}.png"

    return write


def made(out: Path) -> np.ndarray:
    (file,) = [path for path in out.glob("*.png") if path.name != "grid.png"]
    return np.asarray(Image.open(file)).astype(int)


def test_tiles_are_the_whole_of_networks_that_see_no_farther_than_a_quarter_of_the_overlap(run, small, tmp_path):
    """To a level of 255, by rounding, though the noise on the small picture is that of the whole."""
    model = save_upscaler(tmp_path / "local", save_tiny_autoencoder(tmp_path / "autoencoder"), local(), 112, factor=2)
    arguments = ["--image", small(70, 90), "--noise-level", 0.3]
    assert run(*arguments, model=model, out="whole")[0] == 0
    assert run(*arguments, "--tile", 112, "--overlap", 56, model=model, out="tiles")[0] == 0
    whole, tiles = made(tmp_path / "whole"), made(tmp_path / "tiles")
    assert whole.shape == (140, 180, 3)
    assert whole.std() > 2
    assert np.abs(tiles - whole).max() <= 1


def test_in_tiles_a_picture_of_any_sides_and_gray_too(run, small):
    """124 x 84 pixels are 31 x 21 positions, which the UNet cannot halve."""
    code, out = run("--image", small(31, 21, "L"), "--tile", 64)
    assert code == 0
    assert made(out).shape == (124, 84, 3)
    settings = json.loads((out / "samples.json").read_text())["settings"]
    assert (settings["size"], settings["tile"], settings["overlap"]) == ([124, 84], [64, 64], 16)


@pytest.mark.parametrize(
    ("sides", "arguments", "message"),
    [
        ((31, 21), [], "size 124 x 84: UNet: expects a latent of 4 channels"),
        ((31, 21), [], "change the network or the data In tiles the network need not: --tile 64 64."),
        ((31, 21), ["--tile", 62], "tile 62: expected multiples of the autoencoder's down factor 4: 60 or 64"),
        ((31, 21), ["--tile", 60], "tile 60: UNet: expects a latent of 4 channels"),
        ((10, 40), ["--tile", 64], "tile 64: is larger than the picture, 40 x 160; make it smaller, or leave it out"),
        ((20, 20), ["--tile", 64, "--overlap", 40], "tile overlap: expected 1 pixel to half of a tile's side, 32"),
        ((20, 20), ["--noise-level", 0.6], "--noise-level 0.6: expected 0 to 0.5, the levels of training"),
        ((20, 20), ["--noise-level", 2], "--noise-level: expected a number from 0 to 1, found '2'"),
    ],
)
def test_what_cannot_be_is_one_message_and_nothing_is_written(run, small, capsys, sides, arguments, message):
    code, out = run("--image", small(*sides), *arguments)
    assert code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_picture_of_other_channels_is_one_message(run, tmp_path, capsys):
    np.save(tmp_path / "two.npy", np.zeros((20, 20, 2), np.uint8))
    code, out = run("--image", tmp_path / "two.npy")
    assert code == 2
    assert "expected pixels (H,W,3) of uint8, since the model has pictures of 3 channels" in capsys.readouterr().err
    assert not out.exists()


def test_a_result_that_the_autoencoder_cannot_divide_names_the_nearest_size(run, runs, small, tmp_path, capsys):
    twice = save_upscaler(tmp_path / "twice", runs.autoencoder, unet(), 64, factor=2)
    code, out = run("--image", small(41, 36), "--tile", 64, model=twice)
    assert code == 2
    assert (
        "2 times its 41 x 36 pixels are 82 x 72, expected multiples of the autoencoder's down factor 4: say the "
        in (error := capsys.readouterr().err)
    )
    assert "--size 80 72" in error
    assert not out.exists()
    code, out = run("--image", small(41, 36), "--size", 80, 72, "--tile", 64, model=twice)
    assert code == 0
    assert made(out).shape == (80, 72, 3)


def test_a_request_to_stop_is_heard_between_tiles(run, small, monkeypatch):
    asked = []

    def third():
        asked.append(1)
        if len(asked) == 3:
            raise Stopped(2)

    monkeypatch.setattr(large_options.signals, "stop_if_asked", third)
    with pytest.raises(Stopped):
        run("--image", small(32, 48), "--tile", 64)
    monkeypatch.undo()
    code, out = run("--image", small(32, 48), "--tile", 64)
    assert code == 0, "the same command goes on"
    assert made(out).shape == (128, 192, 3)


def test_a_level_of_noise_is_a_part_of_the_condition(run, small, tmp_path):
    picture = small(16, 16)
    code, out = run("--image", picture, "--noise-level", 0.25)
    assert code == 0
    (row,) = json.loads((out / "samples.json").read_text())["images"]
    assert row["condition"]["augmentation"] == 0.25
    (tmp_path / "rows.json").write_text(json.dumps([{"low_resolution": str(picture), "augmentation": 0.25}]))
    assert run("--conditions", tmp_path / "rows.json", out="rows")[0] == 0
    assert np.array_equal(made(out), made(tmp_path / "rows"))
    assert run("--image", picture, out="clean")[0] == 0
    assert not np.array_equal(made(out), made(tmp_path / "clean"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--noise-level", 0.2], "--noise-level 0.2: belongs to --image FILE, which is missing"),
        (["--conditions", "rows.json", "--noise-level", 0.2], "--noise-level and --conditions: both say what to make"),
        (
            ["--conditions", "rows.json"],
            "condition augmentation: expected 0 to 0.5, the levels of training, found 0.75",
        ),
    ],
)
def test_a_level_of_noise_that_cannot_be(run, small, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    rows = [{"low_resolution": str(small(16, 16)), "augmentation": 0.75}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    code, out = run(*arguments)
    assert code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_model_without_noise_has_no_level_of_it(run, runs, small, tmp_path, capsys):
    clean = save_upscaler(tmp_path / "clean", runs.autoencoder, unet(), 64, most=0)
    code, out = run("--image", small(16, 16), "--noise-level", 0.2, model=clean)
    assert code == 2
    assert "this model was trained without noise on its picture; leave it out" in capsys.readouterr().err
    assert not out.exists()
    assert run("--image", small(16, 16), model=clean)[0] == 0


def test_a_level_that_is_no_number_is_refused_before_anything_is_made(run, small, tmp_path, capsys):
    rows = [{"low_resolution": str(small(16, 16)), "augmentation": float("nan")}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    code, out = run("--conditions", tmp_path / "rows.json")
    assert code == 2
    assert "the levels of training, found nan" in capsys.readouterr().err
    assert not out.exists()
