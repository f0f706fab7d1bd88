"""Folders, `.npz` files and data sets as pictures: what is read, what is refused, in one message."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.cli import sample
from ldm.data.sources.folder import ImageFolder
from ldm.data.transforms import EvalTransform
from ldm.errors import DataError
from ldm.evaluation.pictures.base import Scattered, digest
from ldm.evaluation.pictures.stored import DatasetPictures, FolderPictures, NpzPictures, opened


@pytest.fixture
def arrays():
    random = np.random.default_rng(0)
    return {"arr_0": random.integers(0, 256, (9, 8, 6, 3), dtype=np.uint8), "arr_1": np.arange(9) % 4}


@pytest.fixture
def npz(tmp_path, arrays):
    np.savez(tmp_path / "samples.npz", **arrays)
    return tmp_path / "samples.npz"


def test_class_folders_become_labels(image_folder):
    pictures = opened(image_folder)
    assert (len(pictures), pictures.shape) == (20, (3, 16, 16))
    assert pictures.labels().tolist() == [0] * 10 + [1] * 10
    first = np.asarray(Image.open(image_folder / "cats" / "0.png")).transpose(2, 0, 1)
    assert np.array_equal(pictures.images([0])[0], first)


def test_a_folder_can_be_resized(image_folder):
    assert FolderPictures(image_folder, 8).images([0, 3]).shape == (2, 3, 8, 8)
    assert digest(FolderPictures(image_folder, 8).description()) != digest(FolderPictures(image_folder).description())


def test_gray_and_transparent_files_are_read_as_rgb(tmp_path):
    Image.new("L", (4, 4), 7).save(tmp_path / "a.png")
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "b.png")
    images = opened(tmp_path).images([0, 1])
    assert images[0].unique().tolist() == [7]
    assert images[1].unique().tolist() == [255]


def test_pictures_of_several_sizes_are_refused(tmp_path):
    for name, size in {"a": (4, 4), "b": (4, 5)}.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    with pytest.raises(DataError, match=r"b.png: expected 4 x 4 pixels .*, as a.png has, found 5 x 4: .*--resolution"):
        opened(tmp_path).images([0, 1])


def test_a_folder_of_samples_without_its_sheet(runs, tmp_path, capsys):
    words = [
        "-r",
        str(runs.diffusion),
        "--classes",
        "2",
        "0",
        "-n",
        "3",
        "--steps",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    assert sample.main([*words, "--npz"]) == 0
    pictures, arrays = opened(tmp_path / "out"), opened(tmp_path / "out" / "samples.npz")
    assert len(pictures) == len(arrays) == 6  # grid.png is none
    assert pictures.labels().tolist() == [0, 0, 0, 2, 2, 2]
    assert arrays.labels().tolist() == [2, 2, 2, 0, 0, 0]
    assert torch.equal(pictures.images([0, 4]), arrays.images([3, 1]))
    (tmp_path / "out" / "000-000001.png").unlink()
    with pytest.raises(DataError, match=r"1 pictures that samples.json lists are missing"):
        opened(tmp_path / "out")
    record = tmp_path / "out" / "samples.json"
    record.write_text(record.read_text().replace('"class_label": 2', '"class_label": "dog"'))
    with pytest.raises(DataError, match=r"samples.json: is not the list of a folder of samples .*'dog'"):
        opened(tmp_path / "out")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_files(tmp_path, arrays, save):
    save(tmp_path / "samples.npz", **arrays)
    pictures = opened(tmp_path / "samples.npz")
    assert pictures.shape == (3, 8, 6)
    assert np.array_equal(pictures.images([4, 2]), arrays["arr_0"][[4, 2]].transpose(0, 3, 1, 2))
    assert np.array_equal(pictures.labels(), arrays["arr_1"])


def test_npz_files_are_mapped_not_read(npz):
    assert isinstance(NpzPictures(npz)._images, np.memmap)


def test_npz_files_are_known_by_their_contents(npz, arrays, tmp_path):
    np.savez(tmp_path / "same.npz", **arrays)
    arrays["arr_0"][3, 2, 1, 0] ^= 1
    np.savez(tmp_path / "other.npz", **arrays)
    names = [digest(opened(tmp_path / f"{name}.npz").description()) for name in ("samples", "same", "other")]
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("place", [0.3, 0.5, 0.6])
def test_damaged_npz_files_are_one_message(tmp_path, arrays, save, place):
    """Also one of sound length, whose pictures would be kept under the checksum that they do not have."""
    file = tmp_path / "samples.npz"
    save(file, **arrays)
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"samples.npz: cannot be read as an .npz file .* copy or make it again"):
        opened(file)


@pytest.mark.parametrize("part", [0.02, 0.5, 0.99])
def test_truncated_npz_files_are_one_message(npz, part):
    content = npz.read_bytes()
    npz.write_bytes(content[: int(part * len(content))])
    with pytest.raises(DataError, match=r"samples.npz: cannot be read as an .npz file .* copy or make it again"):
        opened(npz)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"arr_0": np.full((2, 4, 4, 3), np.nan)},
            r"of uint8, .* found arr_0 \(2, 4, 4, 3\) of float64, some of which",
        ),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, r"found arr_0 \(2, 4, 4, 3\) of float32$"),
        ({"arr_0": np.zeros((2, 4, 4, 4), np.uint8)}, "of 1 or 3 channels, found"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "expected 1 or more pictures"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8)}, "found images"),
        ({"arr_0": np.zeros((2, 4, 4), np.uint8), "arr_1": np.zeros(3, int)}, r"arr_1 \(2,\) of whole numbers"),
        ({"arr_0": np.zeros((2, 4, 4), np.uint8), "arr_1": np.array([0, -1])}, r"arr_1 of 0 or more, found -1"),
        ({"arr_0": np.array([None, "x"], dtype=object)}, "cannot be read"),
    ],
)
def test_npz_files_of_something_else(tmp_path, changed, message):
    np.savez(tmp_path / "samples.npz", allow_pickle=True, **changed)
    with pytest.raises(DataError, match=message):
        opened(tmp_path / "samples.npz")


def test_what_is_neither(tmp_path):
    with pytest.raises(DataError, match=r"nothing: expected a folder of pictures, or an .npz file"):
        opened(tmp_path / "nothing")


def test_data_sets_are_transformed_as_for_an_autoencoder(image_folder):
    dataset = ImageFolder(image_folder)
    pictures = DatasetPictures(dataset, EvalTransform(8), 1)
    assert pictures.shape == (1, 8, 8)
    pixels = pictures.pixels([3])
    assert torch.equal(pixels[0], EvalTransform(8)(dataset[3]["image"].convert("L")))
    assert torch.equal(pictures.images([3])[0], ((pixels[0] + 1) * 127.5).round().to(torch.uint8))
    assert pictures.labels().tolist() == dataset.class_labels().tolist()


def test_the_next_readable_picture_takes_the_place_of_a_broken_one(tmp_path, caplog):
    for number in range(3):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"not a picture")
    images = DatasetPictures(ImageFolder(tmp_path), EvalTransform(4), 3).images([0, 1, 2])
    assert images[:, 0, 0, 0].tolist() == [0, 2, 2]
    assert "the next readable picture takes its place" in caplog.text


def test_scattered_pictures_are_the_same_ones(image_folder):
    pictures = opened(image_folder)
    scattered = Scattered(pictures)
    assert sorted(scattered.order) == [*range(20)]
    assert 0 < sum(scattered.labels()[:10]) < 10
    assert torch.equal(scattered.images([5]), pictures.images([scattered.order[5]]))
    assert scattered.labels()[5] == pictures.labels()[scattered.order[5]]
