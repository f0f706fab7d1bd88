"""--tile and --overlap, --resamplings and --jump: what they make, record and refuse."""

import json

import numpy as np
import pytest
from PIL import Image

from ldm.cli import sample
from ldm.cli.large_options import tiling
from ldm.cli.sample_options import parse
from ldm.errors import ConfigError

QUICK = ["--steps", "4", "--classes", "0", "-n", "1"]


@pytest.fixture
def run(runs, tmp_path):
    """run(*arguments) -> (exit code, output folder)."""

    def call(*arguments, out="out"):
        return sample.main(
            ["-r", str(runs.diffusion), "--out", str(tmp_path / out), *QUICK, *arguments]
        ), tmp_path / out

    return call


@pytest.fixture
def picture(tmp_path):
    """--image and --mask of 16 x 16 pixels, the right half of which may change."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return ["--image", str(tmp_path / "picture.png"), "--mask", str(tmp_path / "mask.png")]


def pixels(folder):
    return np.asarray(Image.open(folder / "000-000000.png")).astype(int)


def test_a_picture_in_tiles(run):
    code, out = run("--size", "32", "48", "--tile", "16", "--overlap", "8")
    assert code == 0
    assert pixels(out).shape == (32, 48, 3)
    settings = json.loads((out / "samples.json").read_text())["settings"]
    assert (settings["size"], settings["tile"], settings["overlap"]) == ([32, 48], [16, 16], 8)
    assert (
        run("--size", "32", "48", "--tile", "16")[0] == ConfigError.exit_code
    )  # that folder has pictures with another overlap


def test_the_overlap_is_a_quarter_of_a_tile_if_nothing_is_said():
    made = tiling(parse(["-r", "run", "--tile", "256", "512"]), 8)
    assert (made.tile, made.overlap, made.at_once) == ((256, 512), 64, 8)
    assert tiling(parse(["-r", "run", "--tile", "40", "--batch-size", "2"]), 8).overlap == 8
    assert tiling(parse(["-r", "run"]), 8) is None


def test_inpainting_that_goes_back(run, picture):
    folders = [
        run(*picture, *flags, out=str(place))[1]
        for place, flags in enumerate((["--resamplings", "1"], ["--resamplings", "3", "--jump", "2"]))
    ]
    once, often = map(pixels, folders)
    assert np.array_equal(once[:, :8], often[:, :8])
    assert np.abs(once[:, 8:] - often[:, 8:]).max() > 1
    settings = [json.loads((folder / "samples.json").read_text())["settings"] for folder in folders]
    assert "resamplings" not in settings[0]
    assert (settings[1]["resamplings"], settings[1]["jump"]) == (3, 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--overlap", "8"], "--overlap 8: belongs to --tile SIDE"),
        (["--tile", "8", "8", "8"], "--tile: expected one side, or height and width, found 3 numbers"),
        (["--size", "32", "--tile", "18"], "tile 18: expected multiples of the autoencoder's down factor 4: 16 or 20"),
        (
            ["--size", "32", "--tile", "16", "--overlap", "12"],
            "tile overlap: expected 1 pixel to half of a tile's side, 8",
        ),
        (["--tile", "32"], "tile 32: is larger than the picture, 16"),
        (["--resamplings", "2"], "--resamplings 2: belongs to --mask FILE"),
        (["--jump", "2"], "--jump 2: belongs to --resamplings N"),
    ],
)
def test_what_cannot_be_writes_nothing(run, flags, message, capsys):
    code, out = run(*flags)
    assert code != 0
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_jump_of_all_steps_is_refused_before_anything_is_written(run, picture, capsys):
    code, out = run(*picture, "--resamplings", "2", "--jump", "4")
    assert code != 0
    assert "jump 4: expected fewer than the 4 steps" in capsys.readouterr().err
    assert not out.exists()
