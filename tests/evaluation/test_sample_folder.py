import json

import numpy as np
import pytest
from PIL import Image

from ldm.errors import ConfigError
from ldm.evaluation.generate import Sample
from ldm.evaluation.sample_folder import SHOWN, Order, claim, default_folder, save, sheet

SETTINGS = {
    "checkpoint": "logs/run/checkpoints/step=7.ckpt",
    "step": 7,
    "weights": "ema",
    "sampler": "ddim",
    "grid": "default",
    "steps": 20,
    "eta": 0.0,
    "guidance": 1.5,
}


def test_a_folder_belongs_to_its_settings(tmp_path):
    folder = tmp_path / "new" / "samples"
    claim(folder, SETTINGS)
    (folder / "samples.json").write_text(json.dumps({"settings": SETTINGS}))
    claim(folder, SETTINGS)
    with pytest.raises(ConfigError, match=r"eta: 0\.0 there, 0\.5 now; rescale: None there, 0\.2 now"):
        claim(folder, SETTINGS | {"eta": 0.5, "rescale": 0.2})
    (folder / "samples.json").unlink()
    (folder / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"none of sample\.py"):
        claim(folder, SETTINGS)


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({}, "step7-ema-ddim20-guidance1.5"),
        ({"eta": 0.25, "grid": "karras"}, "step7-ema-ddim20-karras-eta0.25-guidance1.5"),
        ({"interval": [0.2, 3.0], "rescale": 0.7}, "step7-ema-ddim20-guidance1.5-interval0.2_3-rescale0.7"),
        ({"mask": {"file": "a/line.png", "sha256": "0123456789"}}, "step7-ema-ddim20-guidance1.5-mask_line_012345"),
    ],
)
def test_settings_name_their_folder(more, name):
    assert str(default_folder(SETTINGS | more)) == f"logs/run/samples/{name}"
    moved = SETTINGS | more | {"checkpoint": "elsewhere/average.ckpt"}
    assert str(default_folder(moved)) == f"elsewhere/samples/average-{name}"


def test_a_folders_name_fits_the_file_system_and_leads_nowhere_else(tmp_path):
    image = {"file": "x" * 250 + ".png", "sha256": "ab" * 32}
    settings = SETTINGS | {"checkpoint": str(tmp_path / "checkpoints" / "a.ckpt"), "image": image, "strength": 0.5}
    folders = [default_folder(settings | {"mask": image | {"file": f"{name}.png"}}) for name in ("m", "n")]
    assert folders[0] != folders[1]
    for folder in folders:
        folder.mkdir(parents=True)
    # A stranger's checkpoint says what its step is.
    outside = default_folder(settings | {"step": "/../../../up"})
    assert outside.parent == tmp_path / "samples"


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_comes_back_from_its_file(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (4, 5, channels), dtype=np.uint8)
    save(tmp_path, Sample(9, 2, image))
    assert np.array_equal(np.atleast_3d(np.asarray(Image.open(tmp_path / "002-000009.png"))), image)
    assert [path.name for path in tmp_path.iterdir()] == ["002-000009.png"]


@pytest.mark.parametrize(
    ("labels", "seeds", "rows", "columns"),
    [([0, 1, 2], 5, 3, 5), ([1], 5, 2, 3), ([None], 1, 1, 1), ([*range(20)], 20, SHOWN, SHOWN)],
)
def test_a_sheet_has_a_row_for_each_class_or_is_a_square(tmp_path, labels, seeds, rows, columns):
    for order in (Order(label, seed) for label in labels for seed in range(seeds)):
        save(tmp_path, Sample(order.seed, order.label, np.zeros((64, 64, 3), np.uint8)))
    assert sheet(tmp_path, labels, range(seeds)).shape == (rows * 66 + 2, columns * 66 + 2, 3)
