"""Pictures, masks, maps and layouts on the command line of sample.py."""

import json

import numpy as np
import pytest
from PIL import Image

from ldm.cli import sample
from ldm.data.transforms import EvalTransform
from ldm.images import to_arrays
from ldm.sampling.dense_files import read_map
from ldm.sampling.shown import drawn_map
from tests.dense_models import save_dense
from tests.pngs import gray_png

MASKED, SMALL, MAPS, BOXES = ("mask", "masked_latent"), ("low_resolution",), ("map",), ("boxes", "boxes_mask")
FACTS = {
    "aligned": {"map": {"num_classes": 3}, "boxes": {"most": 30}},
    "box_class_names": ["red heart", "cat"],
    "map_class_names": ["sky", "sea", "land"],
}


@pytest.fixture(scope="module")
def models(runs, tmp_path_factory):
    """models(keys) -> the run of a model that reads them."""
    made = {}

    def run(keys):
        if keys not in made:
            made[keys] = save_dense(tmp_path_factory.mktemp("dense") / "run", runs, keys, {"facts": FACTS})
        return made[keys]

    return run


@pytest.fixture
def run(models, tmp_path):
    """run(keys, *arguments) -> (exit code, output folder)."""

    def call(keys, *arguments, out="out"):
        words = ["-r", str(models(keys)), "--out", str(tmp_path / out), "--steps", "2", "--trust", "tests", "-n", "2"]
        return sample.main([*words, *map(str, arguments)]), tmp_path / out

    return call


@pytest.fixture
def files(tmp_path):
    """Paths by name."""
    random = np.random.default_rng(0)
    found = {}

    def write(name, array, **how):
        found[name] = tmp_path / f"{name}.png"
        Image.fromarray(array, **how).save(found[name])

    write("photo", random.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    write("other", random.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    write("small", random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    half = np.zeros((20, 30), np.uint8)
    half[:, 15:] = 255
    write("mask", half)
    write("black", half * 0)
    write("square", np.full((16, 16), 255, np.uint8))
    write("map", (np.arange(20 * 30) // 200).reshape(20, 30).astype(np.uint8))
    write("unknown", np.full((16, 16), 7, np.uint8))
    write("colors", drawn_map((np.arange(16 * 16) // 100).reshape(16, 16).astype(np.uint8)))
    write("strange", np.full((16, 16, 3), 77, np.uint8))
    return found


def layout(tmp_path, content):
    (tmp_path / "layout.json").write_text(json.dumps(content))
    return tmp_path / "layout.json"


def pixels(path):
    return np.asarray(Image.open(path))


def test_what_is_black_in_the_mask_stays_in_each_picture(run, files):
    code, out = run(MASKED, "--image", files["photo"], files["other"], "--mask", files["mask"])
    assert code == 0
    record = json.loads((out / "samples.json").read_text())
    assert [row["condition"]["image"]["file"] for row in record["images"]] == [
        str(files[name]) for name in ("other", "other", "photo", "photo")
    ]
    assert "strength" not in record["settings"], "it begins with noise"
    for row in record["images"]:
        picture = Image.open(row["condition"]["image"]["file"])
        kept = to_arrays(EvalTransform(16)(picture)[None])[0]
        stencil = EvalTransform(16)(Image.open(files["mask"]))[0].numpy() <= 0
        assert np.array_equal(pixels(out / row["file"])[stencil], kept[stencil])
        assert not np.array_equal(pixels(out / row["file"])[~stencil], kept[~stencil])
    # A row a picture, each with the masked picture in front of its two samples.
    assert pixels(out / "grid.png").shape[1] == 3 * 66 + 2
    before = {path: path.stat().st_mtime_ns for path in out.glob("mask-*.png")}
    assert run(MASKED, "--image", files["photo"], files["other"], "--mask", files["mask"])[0] == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir() if path in before}, "they are there"


def test_a_small_picture_is_made_as_many_times_larger(run, files):
    code, out = run(SMALL, "--image", files["photo"], "--size", 32, out="asked")
    assert code == 0
    code, out = run(SMALL, "--image", files["small"])
    assert code == 0
    assert pixels(out / next(iter(out.glob("small-*.png"))).name).shape == (16, 16, 3)


def test_a_map_by_its_numbers_or_in_the_colors_of_its_classes(run, files):
    code, out = run(MAPS, "--map", files["map"], files["colors"])
    assert code == 0
    # Enlarged four times; in front of the first row the map's colors.
    grid = pixels(out / "grid.png")
    numbers = np.array(Image.open(files["map"]))
    assert tuple(grid[30, 10]) == tuple(drawn_map(numbers)[0, 0])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_gray_maps_of_any_depth_hold_the_numbers_of_classes(tmp_path, bits):
    """optipng and ImageMagick write as few bits as will do."""
    numbers = (np.arange(16 * 16) % min(2**bits, 3)).reshape(16, 16).astype(np.uint8)
    (tmp_path / "map.png").write_bytes(gray_png(numbers, bits))
    assert np.array_equal(read_map(tmp_path / "map.png"), numbers)


def test_layouts_by_names_of_classes_in_fractions_or_pixels(run, tmp_path):
    fractions = [{"class": "Cat", "box": [0, 0, 0.5, 0.25]}, {"class": 0, "box": [0, 0, 1, 1]}]
    in_pixels = {"size": [200, 100], "boxes": [{"class": "red heart", "box": [100, 50, 200, 100]}]}
    code, out = run(BOXES, "--layout", layout(tmp_path, [fractions, in_pixels]))
    assert code == 0
    conditions = [row["condition"] for row in json.loads((out / "samples.json").read_text())["images"][::2]]
    boxes = sorted((row["boxes"] for row in conditions), key=len)
    assert boxes == [[[0.5, 0.5, 1, 1, 0]], [[0, 0, 0.5, 0.25, 1], [0, 0, 1, 1, 0]]]


def test_rows_of_a_file_of_conditions_name_files(run, files, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"map": str(files["map"])}]))
    code, out = run(MAPS, "--conditions", tmp_path / "rows.json")
    assert code == 0
    (condition,) = json.loads((out / "samples.json").read_text())["conditions"].values()
    assert condition["map"]["file"] == str(files["map"])
    assert len(condition["map"]["sha256"]) == 64


def test_a_model_of_masked_pictures_may_begin_with_the_picture_too(run, files):
    arguments = ["--image", files["photo"], "--mask", files["mask"], "--strength", 0.5]
    code, out = run(MASKED, *arguments)
    assert code == 0
    assert json.loads((out / "samples.json").read_text())["settings"]["strength"] == 0.5


@pytest.mark.parametrize(
    ("keys", "arguments", "code", "message"),
    [
        (MASKED, ["--image", "photo"], 2, "this model reads mask: say it with --mask FILE"),
        (MASKED, [], 2, "this model reads mask, masked_latent: say it with --mask FILE"),
        (MASKED, ["--image", "photo", "--mask", "square"], 2, "expected the size of"),
        (MASKED, ["--image", "photo", "--mask", "black"], 2, "all of it is black"),
        (
            MASKED,
            ["--image", "photo", "--mask", "mask", "--map", "map"],
            2,
            "--map: this model reads mask, masked_latent",
        ),
        (MASKED, ["--image", "nothing", "--mask", "mask"], 3, "nothing: cannot be read"),
        (SMALL, ["--image", "small", "--mask", "mask"], 2, "--mask: this model reads low_resolution and no mask"),
        (SMALL, ["--image", "photo", "--size", 16], 2, "20 x 30 pixels are more than the 16 that are to be made of it"),
        (SMALL, ["--image", "photo", "small"], 2, "expected pictures of one size"),
        (MAPS, ["--map", "unknown"], 2, "has class 7; expected 0 to 2, the 3 classes of this model"),
        (MAPS, ["--map", "strange"], 3, "expected a PNG of classes"),
        (MAPS, [], 2, "this model reads map: say it with --map FILE"),
    ],
)
def test_what_the_model_cannot_read_is_one_message(run, files, capsys, keys, arguments, code, message):
    found = run(keys, *(files.get(word, word) for word in arguments))
    error = capsys.readouterr().err
    assert found[0] == code, error
    assert message in error
    assert not found[1].exists(), "nothing is written"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds no box; say at least one"),
        ([[]], "layout 0: holds no box"),
        ([{"class": "cat", "box": [0, 0, 1.5, 1]}], "0 <= left < right <= 1"),
        ([{"class": "cta", "box": [0, 0, 1, 1]}], "there is no class 'cta'; did you mean 'cat'?"),
        ([{"class": 2, "box": [0, 0, 1, 1]}], "expected a class from 0 to 1, found 2"),
        ([{"class": 0, "box": [0, 0, 1]}], 'box 0: expected {"class": name or number, "box"'),
        ([{"class": 0, "box": [0, 0, 1, 1]}] * 1000, "expected 30 boxes at most"),
        ({"size": [0, 1], "boxes": []}, "size: expected [width, height] in pixels, found [0, 1]"),
        ("cat", 'expected a list of {"class": ..., "box": [...]}, found str'),
        ({"class": 0, "box": [0, 0, 1, 1]}, "found dict"),
    ],
)
def test_what_is_no_layout_is_one_message(run, tmp_path, capsys, content, message):
    code, out = run(BOXES, "--layout", layout(tmp_path, content))
    assert code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
