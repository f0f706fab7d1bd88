"""Images in one array: a file of your own, with any number of channels; MNIST, FashionMNIST and CIFAR-10."""

import gzip
import hashlib
import pickle
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from PIL import Image

from ldm.data.dataset import CONVERTIBLE, Item
from ldm.errors import DataError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package dataset-fashion-mnist installs its files."""


class ArrayImages:
    """Images in one array, labeled or not.

    Args:
        name: for messages.
        images: (N,H,W) or (N,H,W,C) uint8.
        labels: (N,) integers in [0, len(class_names)); None: there are no classes.
        class_names: a name for each label; None: there are no classes.

    Raises:
        DataError: no images, images of another shape or type, or labels missing or out of range.
    """

    def __init__(
        self, name: str, images: np.ndarray, labels: np.ndarray | None = None, class_names: list[str] | None = None
    ) -> None:
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or not all(images.shape[1:]):
            raise DataError(
                f"{name}: expected images (N,H,W) or (N,H,W,C) of uint8, found {images.shape} of {images.dtype}; "
                "scale them to 0 .. 255"
            )
        if not len(images):
            raise DataError(f"{name}: holds 0 images")
        self.name = name
        self.images = images
        self.labels = np.zeros(0, np.int64) if labels is None else labels.astype(np.int64)
        self.class_names = class_names
        if class_names is not None:
            self._check_labels(len(class_names))

    def _check_labels(self, classes: int) -> None:
        if len(self.labels) != len(self):
            raise DataError(f"{self.name}: {len(self)} images but {len(self.labels)} labels")
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= classes))
        if len(wrong):
            raise DataError(
                f"{self.name}: {len(wrong)} labels are out of range; item {wrong[0]} has {self.labels[wrong[0]]}, "
                f"expected 0 to {classes - 1}"
            )

    @property
    def num_classes(self) -> int | None:
        return None if self.class_names is None else len(self.class_names)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        pixels = np.asarray(self.images[index])  # plain, also of a file
        plain = pixels[..., 0] if pixels.shape[2:] == (1,) else pixels  # Pillow knows no (H,W,1)
        item: Item = {"image": Image.fromarray(plain) if self.channel_choices() == CONVERTIBLE else pixels}
        if self.class_names is not None:
            item["class_label"] = int(self.labels[index])
        return item

    def channel_choices(self) -> Sequence[int] | None:
        of_array = self.images.shape[3:]
        return CONVERTIBLE if of_array in ((), (1,), (3,)) else of_array

    def has_captions(self) -> bool:
        return False

    def class_labels(self) -> np.ndarray | None:
        return None if self.class_names is None else self.labels

    def path(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.images.shape, self.class_names)).encode())
        for image in self.images:  # which may be a file larger than the memory
            digest.update(image.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def prepare(self) -> None:
        """Nothing to do: the data is in memory."""


class ArrayFile(ArrayImages):
    """Images (N,H,W) or (N,H,W,C) of uint8 in a NumPy file, with any number of channels.

    Args:
        file: a `.npy` with the images, read as it is needed; or a `.npz` with `images` and, if there are classes,
            `labels` (N,) and their `class_names`, by default 0, 1, 2, ...

    Raises:
        DataError: a file that cannot be read, or holds something else.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file).absolute()
        try:
            loaded = np.load(file, mmap_mode="r", allow_pickle=False)
            arrays = {"images": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise DataError(f"{file}: cannot be read as a .npy or .npz file ({error})") from error
        if "images" not in arrays:
            raise DataError(f"{file}: expected an array `images`, found {', '.join(arrays) or 'none'}")
        labels, names = arrays.get("labels"), arrays.get("class_names")
        if labels is not None:
            if labels.ndim != 1 or labels.dtype.kind not in "iu":
                raise DataError(
                    f"{file}: expected labels (N,) of whole numbers, found {labels.shape} of {labels.dtype}"
                )
            labels = labels.astype(np.int64)
            names = np.arange(labels.max(initial=-1) + 1) if names is None else names
        class_names = None if labels is None or names is None else [str(name) for name in names]
        super().__init__(str(file), arrays["images"], labels, class_names)

    def __getstate__(self) -> dict[str, Any]:
        """A mapped file is not sent to a worker: it maps the file itself."""
        mapped = isinstance(self.images, np.memmap)
        return {**vars(self), "images": None} if mapped else vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.images is None:
            self.images = np.load(self.file, mmap_mode="r", allow_pickle=False)


class MNIST(ArrayImages):
    """MNIST (LeCun et al. 1998): 28 x 28 gray, 10 digits, 60,000 for training and 10,000 for testing.

    Args:
        root: folder with the four idx files (plain or .gz), or one that torchvision has filled.
        train: the training part; False: the test part.
        download: let torchvision fetch missing files into `root` (do this with one process).
    """

    def __init__(self, root: str | Path, train: bool = True, download: bool = False) -> None:
        images, labels = _read_idx(torchvision.datasets.MNIST, Path(root), train, download)
        super().__init__(f"MNIST {_part(train)}", images, labels, [str(digit) for digit in range(10)])


class FashionMNIST(ArrayImages):
    """FashionMNIST (Xiao et al. 2017): 28 x 28 gray, 10 kinds of clothing, 60,000 and 10,000 images.

    Args:
        root: folder with the four idx files (plain or .gz), or one that torchvision has filled;
            None: where the Debian package dataset-fashion-mnist installs them, or else data/fashion_mnist.
        train: the training part; False: the test part.
        download: let torchvision fetch missing files into `root` (do this with one process).
    """

    def __init__(self, root: str | Path | None = None, train: bool = True, download: bool = False) -> None:
        source = torchvision.datasets.FashionMNIST
        usual = DEBIAN_FASHION_MNIST if DEBIAN_FASHION_MNIST.is_dir() else Path("data", "fashion_mnist")
        images, labels = _read_idx(source, usual if root is None else Path(root), train, download)
        super().__init__(f"FashionMNIST {_part(train)}", images, labels, list(source.classes))


class CIFAR10(ArrayImages):
    """CIFAR-10 (Krizhevsky 2009): 32 x 32 RGB, 10 classes, 50,000 for training and 10,000 for testing.

    Args:
        root: folder that holds `cifar-10-batches-py`.
        train: the training part; False: the test part.
        download: let torchvision fetch missing files into `root` (do this with one process).
    """

    def __init__(self, root: str | Path, train: bool = True, download: bool = False) -> None:
        try:
            source = torchvision.datasets.CIFAR10(root, train=train, download=download)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise DataError(f"{root}: CIFAR-10 cannot be read ({error}). {_advice('cifar-10-batches-py')}") from error
        super().__init__(f"CIFAR10 {_part(train)}", source.data, np.asarray(source.targets), list(source.classes))


def _part(train: bool) -> str:
    return "train" if train else "test"


def _advice(files: str) -> str:
    return f"Set `root` to the folder that holds {files}, or `download: true` if there is a network"


def _read_idx(
    source: type[torchvision.datasets.MNIST], root: Path, train: bool, download: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Images (N,H,W) and labels (N,), uint8, from the files of `source` in `root`."""
    prefix = "train" if train else "t10k"
    folders = [root, root / "raw", root / source.__name__ / "raw"]
    names = [f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"]
    if download and any(_find(folders, name) is None for name in names):
        try:
            source(root, train=train, download=True)
        except (RuntimeError, OSError) as error:
            raise DataError(f"{root}: {source.__name__} cannot be downloaded ({error})") from error
    paths = [_find(folders, name) for name in names]
    for name, path in zip(names, paths, strict=True):
        if path is None:
            raise DataError(f"{root}: neither {name} nor {name}.gz is there. {_advice('the four idx files')}")
    images, labels = (_idx_array(path) for path in paths if path is not None)
    return images, labels


def _find(folders: list[Path], name: str) -> Path | None:
    candidates = [folder / f"{name}{ending}" for folder in folders for ending in ("", ".gz")]
    return next((path for path in candidates if path.is_file()), None)


def _idx_array(path: Path) -> np.ndarray:
    """An idx file of unsigned bytes: magic 0 0 8 ndim, the sizes as big-endian uint32, the bytes."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); fetch it again") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise DataError(f"{path}: is not an idx file of unsigned bytes; fetch it again")
    start = 4 + 4 * content[3]
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], dtype=">u4"))
    if len(content) - start != int(np.prod(shape)):
        raise DataError(f"{path}: is truncated: {len(content) - start} bytes, expected {shape}; fetch it again")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
