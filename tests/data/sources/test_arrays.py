"""Benchmark data sets in memory, from tiny files in their formats."""

import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
import torchvision

from ldm.data.dataset import class_labels
from ldm.data.sources import arrays
from ldm.data.sources.arrays import CIFAR10, DEBIAN_FASHION_MNIST, MNIST, ArrayFile, ArrayImages, FashionMNIST
from ldm.errors import DataError


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


@pytest.fixture
def pictures() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.integers(0, 256, (5, 28, 28), dtype=np.uint8), np.array([3, 0, 9, 1, 1], dtype=np.uint8)


def fill(root: Path, pictures, prefix: str = "train", zipped: bool = True) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, array in zip(("images-idx3", "labels-idx1"), pictures, strict=True):
        content = idx(array)
        path = root / f"{prefix}-{name}-ubyte"
        if zipped:
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
        else:
            path.write_bytes(content)
    return root


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("below", [".", "raw", "FashionMNIST/raw"])
def test_idx_files(tmp_path, pictures, zipped, below):
    fill(tmp_path / below, pictures, zipped=zipped)
    dataset = FashionMNIST(tmp_path)
    assert (len(dataset), dataset.num_classes) == (5, 10)
    assert dataset.class_names[9] == "Ankle boot"
    item = dataset[2]
    assert item["class_label"] == 9
    assert item["image"].mode == "L"
    assert (np.asarray(item["image"]) == pictures[0][2]).all()


def test_the_reader_agrees_with_torchvision(tmp_path, pictures):
    for prefix in ("train", "t10k"):
        fill(tmp_path / "MNIST/raw", pictures, prefix, zipped=False)
    ours, theirs = MNIST(tmp_path, train=False), torchvision.datasets.MNIST(tmp_path, train=False)
    assert (ours.images == theirs.data.numpy()).all()
    assert (ours.labels == theirs.targets.numpy()).all()


def test_missing_and_damaged_files(tmp_path, pictures):
    with pytest.raises(DataError, match=r"neither train-images-idx3-ubyte nor .*\.gz is there"):
        MNIST(tmp_path)
    fill(tmp_path, pictures)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for content in (whole[:100], gzip.compress(b"rubbish"), gzip.compress(idx(pictures[0])[:-1]), b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz"):
            MNIST(tmp_path)


def test_labels_are_known_without_decoding(pictures):
    toy = ArrayImages("toy", *pictures, ["a"] * 10)
    assert class_labels(toy).tolist() == [item["class_label"] for item in map(toy.__getitem__, range(5))]


def test_labels_are_checked(pictures):
    images, labels = pictures
    with pytest.raises(DataError, match="5 images but 4 labels"):
        ArrayImages("toy", images, labels[:4], ["a"] * 10)
    with pytest.raises(DataError, match="item 2 has 9, expected 0 to 8"):
        ArrayImages("toy", images, labels, ["a"] * 9)
    with pytest.raises(DataError, match="0 images"):
        ArrayImages("toy", images[:0], labels[:0], ["a"])


@pytest.mark.parametrize("shape", [(3,), (3, 8), (3, 8, 0), (3, 8, 8, 0), (3, 8, 8, 3, 1)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(DataError, match=r"toy: expected images \(N,H,W\) or \(N,H,W,C\) of uint8, found \(3,"):
        ArrayImages("toy", np.zeros(shape, np.uint8), np.zeros(3, np.int64), ["a"])


@pytest.mark.parametrize("dtype", ["uint16", "float32", "int64"])
def test_images_of_another_type_are_refused(dtype):
    """They would be cut off at 255, and nearly white."""
    with pytest.raises(DataError, match=f"toy: expected images .* of {dtype}; scale them to 0 .. 255"):
        ArrayImages("toy", np.zeros((3, 8, 8), dtype), np.zeros(3, np.int64), ["a"])


def test_fingerprint(pictures):
    images, labels = pictures
    first = ArrayImages("toy", images, labels, ["a"] * 10).fingerprint()
    assert ArrayImages("other name", images.copy(), labels, ["a"] * 10).fingerprint() == first
    assert ArrayImages("toy", images, labels[::-1], ["a"] * 10).fingerprint() != first
    images[4, 0, 0] ^= 1
    assert ArrayImages("toy", images, labels, ["a"] * 10).fingerprint() != first


def test_cifar(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setitem(torchvision.datasets.CIFAR10.meta, "md5", None)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.arange(2 * 3072, dtype=np.int64).astype(np.uint8).reshape(2, 3072)
    (folder / "test_batch").write_bytes(pickle.dumps({"data": pixels, "labels": [4, 0]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    dataset = CIFAR10(tmp_path, train=False)
    assert (len(dataset), dataset[0]["class_label"], dataset[0]["image"].size) == (2, 4, (32, 32))
    assert dataset[0]["image"].getpixel((1, 0)) == (1, 1025 % 256, 2049 % 256)


def test_no_cifar(tmp_path):
    with pytest.raises(DataError, match="cifar-10-batches-py"):
        CIFAR10(tmp_path)


def test_fashion_mnist_without_the_debian_package_is_downloaded_once(tmp_path, monkeypatch):
    """Into a folder of the project, from which it is then read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arrays, "DEBIAN_FASHION_MNIST", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"data/fashion_mnist: neither .* `download: true`"):
        FashionMNIST()
    asked = []
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "__init__", lambda self, root, **_: asked.append(root))
    with pytest.raises(DataError, match="data/fashion_mnist: neither"):
        FashionMNIST(download=True)
    assert asked == [Path("data/fashion_mnist")]


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_debian_package():
    dataset = FashionMNIST(train=False)
    assert len(dataset) == 10_000
    assert np.bincount(dataset.labels).tolist() == [1000] * 10


@pytest.mark.parametrize(("channels", "mode"), [(None, "L"), (1, "L"), (3, "RGB"), (2, None), (4, None), (7, None)])
def test_a_file_of_any_number_of_channels(tmp_path, channels, mode):
    shape = (3, 8, 12) if channels is None else (3, 8, 12, channels)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.save(tmp_path / "a.npy", images)
    data = ArrayFile(tmp_path / "a.npy")
    item = data[1]
    assert list(item) == ["image"]
    assert getattr(item["image"], "mode", None) == mode
    assert np.array_equal(np.asarray(item["image"]).reshape(images[1].shape), images[1])
    assert data.channel_choices() == ((channels,) if mode is None else (1, 3, 4))
    assert (len(data), data.num_classes, data.class_labels()) == (3, None, None)
    assert data.fingerprint() == ArrayImages("in memory", images).fingerprint()


def test_a_mapped_file_is_mapped_again_where_it_is_sent(tmp_path, monkeypatch):
    """And not copied: a worker that is spawned gets a few hundred bytes, wherever it works."""
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 12, 4), dtype=np.uint8)
    np.save(tmp_path / "a.npy", images)
    np.savez(tmp_path / "a.npz", images=images)
    monkeypatch.chdir(tmp_path)
    mapped, loaded = pickle.dumps(ArrayFile("a.npy")), pickle.dumps(ArrayFile("a.npz"))
    assert len(mapped) < 1000 < images.nbytes < len(loaded)
    monkeypatch.chdir("/")
    for sent in (mapped, loaded):
        data = pickle.loads(sent)
        assert np.array_equal(data.images, images)
        assert np.array_equal(data[7]["image"], images[7])
    assert isinstance(pickle.loads(mapped).images, np.memmap)


def test_an_archive_brings_its_classes(tmp_path):
    images, labels = np.zeros((3, 8, 12, 5), np.uint8), np.array([0, 2, 1])
    np.savez(tmp_path / "plain.npz", images=images, labels=labels)
    np.savez(tmp_path / "named.npz", images=images, labels=labels, class_names=["cat", "dog", "emu"])
    plain, named = ArrayFile(tmp_path / "plain.npz"), ArrayFile(tmp_path / "named.npz")
    assert (plain.class_names, named.class_names) == (["0", "1", "2"], ["cat", "dog", "emu"])
    assert plain[1]["class_label"] == named[1]["class_label"] == 2
    assert plain.fingerprint() != named.fingerprint()


def test_files_that_are_something_else(tmp_path):
    for name, content in (("a.npy", b""), ("a.npz", b"PK"), ("b.npy", b"text")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: cannot be read as a .npy or .npz file"):
            ArrayFile(tmp_path / name)
    with pytest.raises(DataError, match=r"gone\.npy: cannot be read"):
        ArrayFile(tmp_path / "gone.npy")
    np.savez(tmp_path / "c.npz", pictures=np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(DataError, match=r"c\.npz: expected an array `images`, found pictures"):
        ArrayFile(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.array([0, 1]))
    with pytest.raises(DataError, match="3 images but 2 labels"):
        ArrayFile(tmp_path / "d.npz")


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.uint64])
def test_labels_of_any_whole_type(tmp_path, kind):
    labels = np.array([0, 2, 1, 0], kind)
    np.savez(tmp_path / "some.npz", images=np.zeros((4, 8, 8), np.uint8), labels=labels)
    found = ArrayFile(tmp_path / "some.npz")
    assert found.class_names == ["0", "1", "2"]
    assert [found[index]["class_label"] for index in range(4)] == [0, 2, 1, 0]


@pytest.mark.parametrize("labels", [np.array([0.0, 1.7, 1, 0]), np.array(["a", "b", "a", "a"]), np.zeros((4, 2), int)])
def test_labels_that_are_no_whole_numbers_are_refused(tmp_path, labels):
    np.savez(tmp_path / "some.npz", images=np.zeros((4, 8, 8), np.uint8), labels=labels)
    with pytest.raises(DataError, match=r"some.npz: expected labels \(N,\) of whole numbers"):
        ArrayFile(tmp_path / "some.npz")
