"""OpenMoji: which emoji, in which class, and the drawing of them."""

from collections import Counter

import numpy as np
import pytest

from ldm.data.datamodule import ImageDataModule
from ldm.data.dataset import class_labels
from ldm.data.sources.openmoji import OpenMoji
from ldm.errors import DataError, ResourceError


@pytest.fixture
def few(tmp_path) -> OpenMoji:
    """Five emoji at 16 pixels in a folder of their own."""
    dataset = OpenMoji(size=16, folder=tmp_path)
    dataset.emoji = dataset.emoji[:5]
    return dataset


def test_what_is_in_it(tmp_path):
    dataset = OpenMoji(folder=tmp_path, validation_fraction=0)
    assert 3_700 < len(dataset) < 4_200
    sizes = Counter(emoji.label for emoji in dataset.emoji)
    assert sorted(sizes) == list(range(dataset.num_classes))
    assert len(dataset.class_names) == dataset.num_classes
    assert min(sizes.values()) >= 60
    assert all(emoji.code in dataset._drawings for emoji in dataset.emoji)
    assert len({emoji.code for emoji in dataset.emoji}) == len(dataset)
    kinds = {emoji.name: dataset.class_names[emoji.label] for emoji in dataset.emoji}
    assert kinds["grinning face"] == "faces"
    assert kinds["waving hand sign"] == "hands"
    assert kinds["waving hand sign, medium skin tone"] == "hands"
    assert kinds["clock face four-thirty"] == "places and weather"
    assert kinds["heavy black heart"] == "symbols"
    assert not any("fitzpatrick" in name for name in kinds)


def test_the_parts_share_no_emoji(tmp_path):
    train, validation = (OpenMoji(folder=tmp_path, validation=part) for part in (False, True))
    whole = OpenMoji(folder=tmp_path, validation_fraction=0)
    assert len(train) + len(validation) == len(whole)
    assert not {e.base for e in train.emoji} & {e.base for e in validation.emoji}
    assert 0.03 < len({e.base for e in validation.emoji}) / len({e.base for e in whole.emoji}) < 0.07
    assert len({train.fingerprint(), validation.fingerprint(), whole.fingerprint()}) == 3
    with pytest.raises(DataError, match="0 emoji"):
        OpenMoji(folder=tmp_path, validation=True, validation_fraction=0)


def test_without_skin_tones(tmp_path):
    dataset = OpenMoji(folder=tmp_path, validation_fraction=0, skin_tones=False)
    assert 1_800 < len(dataset) < 2_100
    assert not any("skin tone" in emoji.name for emoji in dataset.emoji)


def test_pictures(tmp_path):
    dataset = OpenMoji(size=24, folder=tmp_path)
    index = next(i for i, emoji in enumerate(dataset.emoji) if emoji.code == "1F600")
    item = dataset[index]
    assert item["caption"] == "grinning face"
    assert item["image"].mode == "RGB"
    assert item["image"].size == (24, 24)
    pixels = np.asarray(item["image"])
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert np.abs(pixels[8, 12].astype(int) - [0xFC, 0xEA, 0x2B]).max() < 3, "the forehead is yellow"


def test_preparing_draws_what_is_missing_and_nothing_else(few):
    few.prepare()
    paths = [few.picture(emoji) for emoji in few.emoji]
    before = [path.read_bytes() for path in paths]
    paths[3].unlink()
    stamps = [path.stat().st_mtime_ns for path in paths if path.exists()]
    few.prepare()
    assert [path.read_bytes() for path in paths] == before
    assert [path.stat().st_mtime_ns for path in paths if path != paths[3]] == stamps
    assert sorted(path.name for path in few.folder.iterdir()) == sorted(path.name for path in paths)


def test_labels_are_known_without_drawing(few):
    known = class_labels(few).tolist()
    assert not few.folder.exists()
    assert known == [few[index]["class_label"] for index in range(5)]


def test_captions_are_known_without_drawing(few, tmp_path):
    batch = ImageDataModule(few, batch_size=2, resolution=16, seed=1).meta_batch()
    assert batch["caption"] == ["", ""]
    assert not list(tmp_path.rglob("*.png"))  # a dry run writes nothing
    assert "caption" in few[0]


def test_an_interrupted_drawing_leaves_no_halfpicture(few, monkeypatch):
    def cut_off(path, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", cut_off)
        with pytest.raises(KeyboardInterrupt):
            few.prepare()
    assert not list(few.folder.glob("*.png"))
    few.prepare()
    assert len(list(few.folder.glob("*.png"))) == 5


def test_a_folder_that_cannot_be_written(few, tmp_path):
    few.folder = tmp_path / "file" / "below"
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="cannot be written"):
        few.prepare()
