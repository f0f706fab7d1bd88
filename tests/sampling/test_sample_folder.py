import json
import time

import numpy as np
import pytest
from PIL import Image

from ldm.errors import ConfigError
from ldm.files import published
from ldm.images import grid
from ldm.sampling import sample_folder
from ldm.sampling.generate import Sample
from ldm.sampling.sample_folder import SHOWN, Order, claim, default_folder, record, save, save_arrays, sheet, title

SETTINGS = {
    "checkpoint": "logs/run/checkpoints/step=7.ckpt",
    "step": 7,
    "weights": "ema",
    "sampler": "ddim",
    "schedule": "default",
    "steps": 20,
    "guidance": 1.5,
}


NAMES = ["cat", "dog", "Ankle boot"]


def listed(folder):
    return [image["file"] for image in json.loads((folder / "samples.json").read_text())["images"]]


def order(label, seed):
    return Order(None if label is None else {"class_label": label}, seed)


def make(folder, *orders):
    for one in orders:
        save(folder, Sample(one.seed, one.condition, np.zeros((4, 4, 3), np.uint8)))


def test_a_folder_belongs_to_its_settings(tmp_path):
    folder = tmp_path / "new" / "samples"
    claim(folder, SETTINGS, None, [])
    claim(folder, SETTINGS, None, [])
    with pytest.raises(ConfigError, match=r"sampler: ddim there, ddim eta=0\.5 now; rescale: None there, 0\.2 now"):
        claim(folder, SETTINGS | {"sampler": "ddim eta=0.5", "rescale": 0.2}, None, [])
    for damage in ("{", "[]", '{"images": []}'):
        (folder / "samples.json").write_text(damage)
        with pytest.raises(ConfigError, match=r"samples\.json: is not a record of sample\.py"):
            claim(folder, SETTINGS, None, [])
    (folder / "samples.json").unlink()
    (folder / "samples.json.tmp.host.1").touch()  # a call that was killed while it began
    claim(folder, SETTINGS, None, [])
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"not samples"):
        claim(foreign, SETTINGS, None, [])
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]


def test_the_record_lists_what_is_there(tmp_path):
    """Whichever call made it, however the call ended; and nothing that was only asked for."""
    claim(tmp_path, SETTINGS, NAMES, [])
    assert listed(tmp_path) == []
    make(tmp_path, order(2, 5), order(0, 11), order(0, 1_234_567))
    (tmp_path / "000-000012.png.tmp.host.1").touch()
    (tmp_path / "grid.png").touch()
    (tmp_path / "7.png").touch()
    claim(tmp_path, SETTINGS, NAMES, [])  # as after a kill: nothing was recorded
    found = json.loads((tmp_path / "samples.json").read_text())
    assert found["settings"] == SETTINGS
    assert found["images"] == [
        {"file": "000-000011.png", "condition": {"class_label": 0}, "seed": 11, "name": "cat"},
        {"file": "000-1234567.png", "condition": {"class_label": 0}, "seed": 1_234_567, "name": "cat"},
        {"file": "002-000005.png", "condition": {"class_label": 2}, "seed": 5, "name": "Ankle boot"},
    ]
    (tmp_path / "000-000011.png").unlink()
    make(tmp_path, order(1, 0))
    record(tmp_path, SETTINGS, NAMES)
    assert listed(tmp_path) == ["000-1234567.png", "001-000000.png", "002-000005.png"]


@pytest.mark.parametrize("one", [order(0, 0), order(999, 7), order(1000, 10**7), order(None, 3), order(None, 2**62)])
def test_a_picture_is_known_by_its_file(one):
    assert Order.of(one.file, {}) == one


def test_calls_at_once_list_one_anothers_pictures(tmp_path, forked, monkeypatch):
    """A call that is slow to write its list does not write over a faster one's."""
    claim(tmp_path, SETTINGS, NAMES, [])
    quick = sample_folder.write_text

    def slow(path, text):
        (tmp_path / "listing").touch()
        time.sleep(0.5)
        quick(path, text)

    def call(rank):
        if rank == 0:
            monkeypatch.setattr(sample_folder, "write_text", slow)
        else:
            while not (tmp_path / "listing").exists():
                time.sleep(0.01)
        make(tmp_path, order(rank, 0), order(2, 0))
        record(tmp_path, SETTINGS, NAMES)

    forked(2, call)
    assert listed(tmp_path) == ["000-000000.png", "001-000000.png", "002-000000.png"]
    assert not list(tmp_path.glob("*.tmp*"))


def test_a_file_is_whole_or_as_it_was(tmp_path):
    file = tmp_path / "grid.png"
    file.write_text("before")

    def interrupted():
        with published(file, durable=False) as aside:
            aside.write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
    assert file.read_text() == "before"


def test_the_same_picture_by_two_calls_at_once(tmp_path, forked):
    """Each writes under a name of its own; which of them is last does not matter."""

    def call(rank):
        for _ in range(100):
            make(tmp_path, order(0, 0))

    forked(2, call)
    assert [path.name for path in tmp_path.iterdir()] == ["000-000000.png"]


def test_arrays_say_which_pictures_they_are(tmp_path):
    orders = [order(2, 5), order(0, 11)]
    for one, value in zip(orders, (3, 200), strict=True):
        save(tmp_path, Sample(one.seed, one.condition, np.full((4, 5, 1), value, np.uint8)))
    with np.load(save_arrays(tmp_path, orders)) as arrays:
        assert arrays["arr_0"].shape == (2, 4, 5, 3)
        assert arrays["arr_0"][:, 0, 0, 0].tolist() == [3, 200]
        assert arrays["names"].tolist() == [one.file for one in orders]


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({}, "step7-ema-ddim20-guidance1.5"),
        ({"sampler": "ddim eta=0.25", "schedule": "karras"}, "step7-ema-ddim20-karras-eta0.25-guidance1.5"),
        ({"interval": [0.2, 3.0], "rescale": 0.7}, "step7-ema-ddim20-guidance1.5-interval0.2_3-rescale0.7"),
        (
            {"schedule": "shifted shift=3.5", "guidance_channels": 3},
            "step7-ema-ddim20-shifted-shift3.5-guidance1.5-guidance_channels3",
        ),
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


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_picture_comes_back_from_its_file(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (4, 5, channels), dtype=np.uint8)
    save(tmp_path, Sample(9, {"class_label": 2}, image))
    assert np.array_equal(np.atleast_3d(np.asarray(Image.open(tmp_path / "002-000009.png"))), image)
    assert [path.name for path in tmp_path.iterdir()] == ["002-000009.png"]


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_no_channel_is_lost(tmp_path, channels):
    """Also of pixels that a fourth channel of 0 would hide."""
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 70, channels), dtype=np.uint8)
    images[..., -1] //= 255
    orders = [order(2, 0), order(2, 1)]
    for one, image in zip(orders, images, strict=True):
        save(tmp_path, Sample(one.seed, one.condition, image))
    with np.load(save_arrays(tmp_path, orders)) as arrays:
        assert np.array_equal(arrays["arr_0"], images)
    shown = sheet(tmp_path, [orders[0].condition], range(2), NAMES)[18:]
    assert np.array_equal(shown, grid([*images], 2))
    assert shown.shape == (4 + 4, 2 * (70 * channels + channels - 1) + 6, 1)
    assert (tmp_path / "002-000000.npy").is_file() == (channels != 4)
    record(tmp_path, SETTINGS, NAMES)
    assert listed(tmp_path) == ["002-000000.png", "002-000001.png"]


@pytest.mark.parametrize(
    ("labels", "seeds", "rows", "columns"),
    [([0, 1, 2], 5, 3, 5), ([1], 5, 2, 3), ([None], 1, 1, 1), ([*range(20)], 20, SHOWN, SHOWN)],
)
def test_a_sheet_has_a_row_for_each_class_or_is_a_square(tmp_path, labels, seeds, rows, columns):
    orders = [order(label, seed) for label in labels for seed in range(seeds)]
    for one in orders:
        save(tmp_path, Sample(one.seed, one.condition, np.zeros((64, 64, 3), np.uint8)))
    conditions = [order(label, 0).condition for label in labels]
    titled = 0 if labels == [None] else len(labels[:SHOWN]) * 18 + (rows - 1) * 2
    assert sheet(tmp_path, conditions, range(seeds), None).shape == (rows * 66 + 2 + titled, columns * 66 + 2, 3)


CAPTIONS = [
    {"caption": "A red heart!"},
    {"caption": "\N{GRINNING FACE}"},
    {"caption": "A red heart!", "class_label": 2},
]


def test_any_condition_names_its_files_and_is_listed(tmp_path):
    """Also after a call that was killed before it could list what it made."""
    orders = [Order(condition, seed) for condition in CAPTIONS for seed in range(2)]
    files = [one.file for one in orders]
    assert len(set(files)) == 6
    assert files[0].startswith("a-red-heart-")
    assert files[2].startswith("condition-")
    claim(tmp_path, SETTINGS, NAMES, orders)
    make(tmp_path, *orders[:5])
    record(tmp_path, SETTINGS, NAMES)  # by a call that asks for other conditions
    claim(tmp_path, SETTINGS, NAMES, [order(1, 0)])
    images = json.loads((tmp_path / "samples.json").read_text())["images"]
    assert sorted(image["file"] for image in images) == sorted(files[:5])
    by_file = {image["file"]: image for image in images}
    assert by_file[files[1]]["condition"] == CAPTIONS[0]
    assert by_file[files[4]]["name"] == "Ankle boot"
    assert sheet(tmp_path, CAPTIONS[:2], range(2), NAMES).shape == (2 * (66 + 2 + 18), 2 * 66 + 2, 3)


def test_a_title_says_all_of_a_condition():
    assert title(None, NAMES) == ""
    assert title({"class_label": 2}, NAMES) == "Ankle boot"
    assert title({"class_label": 2}, None) == "class 2"
    assert (
        title({"caption": "red heart", "class_label": 0, "aesthetic": 5.5}, NAMES)
        == f"red heart, {NAMES[0]}, aesthetic 5.5"
    )


def test_a_condition_has_one_name_whatever_the_order_of_its_keys():
    one, other = {"caption": "a cat", "class_label": 2}, {"class_label": 2, "caption": "a cat"}
    assert Order(one, 3).file == Order(other, 3).file


def test_a_folder_of_former_settings_goes_on(tmp_path):
    former = SETTINGS | {"sampler": "dpm", "eta": 0.5, "schedule": "shifted", "shift": 3.3333333}
    (tmp_path / "samples.json").write_text(json.dumps({"settings": former, "images": []}))
    now = SETTINGS | {"sampler": "dpmpp_2m eta=0.5", "schedule": "shifted shift=3.3333333"}
    claim(tmp_path, now, NAMES, [])
    assert json.loads((tmp_path / "samples.json").read_text())["settings"] == now
