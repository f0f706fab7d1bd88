"""Pictures that are there: of a folder, of an `.npz` file as ADM's, of a data set."""

import json
import logging
import os
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from ldm.data import fingerprint
from ldm.data.dataset import ImageDataset, class_labels, decoding
from ldm.data.decoding import over_white, read_image
from ldm.data.sources.folder import ImageFolder
from ldm.data.transforms import EvalTransform, transformed
from ldm.errors import DataError
from ldm.evaluation.pictures.base import Description, Pictures
from ldm.files import DAMAGED_NPZ
from ldm.images import to_uint8
from ldm.ranges import Count, Resolution

_THREADS = min(8, os.cpu_count() or 1)
_CHUNK = 1 << 22  # bytes that are read at once
_PATIENCE = 100
"""So many unreadable items in a row end the reading of a data set, as in training."""

log = logging.getLogger(__name__)

Read = TypeVar("Read")


def in_parallel(read: Callable[[int], Read], indices: Sequence[int]) -> list[Read]:
    """read(index) of each, in order, by a few threads: decoders do not hold Python's lock."""
    if len(indices) < 2:
        return [read(index) for index in indices]
    with ThreadPoolExecutor(_THREADS) as pool:
        return [*pool.map(read, indices)]


def opened(path: Path, resolution: Resolution | None = None) -> Pictures:
    """The pictures of a folder, or of an `.npz` file.

    Args:
        path: of a folder of pictures, one of `sample.py` among them; or of an `.npz`.
        resolution: a folder's pictures are resized and cropped to it; None: they are taken as they are.

    Raises:
        DataError: there is nothing of that kind.
    """
    if path.is_dir():
        return FolderPictures(path, resolution)
    if path.suffix == ".npz" and path.is_file():
        return NpzPictures(path)
    raise DataError(f"{path}: expected a folder of pictures, or an .npz file with arr_0 (N,H,W,C) of uint8; found none")


class FolderPictures:
    """The pictures of a folder as RGB, transparency over white; class folders become labels.

    In a folder of samples (ldm/sampling/sample_folder.py) those that samples.json lists, with the classes it names.

    Args:
        root: the folder, searched to any depth.
        resolution: pictures are resized to cover it and cropped, as for an autoencoder; None: they stay as they are.

    Raises:
        DataError: there are none, or they lie both in the folder and in class folders.
    """

    def __init__(self, root: Path, resolution: Resolution | None = None) -> None:
        self.root = root
        self.transform = None if resolution is None else EvalTransform(resolution)
        self.files, self._labels = _of_samples(root) or _of_folder(root)
        height, width = self._read(0).shape[1:]
        self.shape = (3, height, width)

    def __len__(self) -> int:
        return len(self.files)

    def images(self, indices: Sequence[int]) -> Tensor:
        return torch.stack(in_parallel(self._sized, indices))

    def labels(self) -> np.ndarray | None:
        return self._labels

    def description(self) -> Description:
        states = fingerprint.stats(self.root, self.files)
        return {
            "kind": "folder",
            "files": fingerprint.contents(self.root, self.files, states),
            "number": len(self.files),
            "pixels": {"channels": 3, **(self.transform.describe() if self.transform else {})},
        }

    def _read(self, index: int) -> Tensor:
        path = os.path.join(self.root, self.files[index])
        image = over_white(read_image(path)).convert("RGB")
        if self.transform is not None:
            return to_uint8(transformed(image, self.transform, 3, path))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def _sized(self, index: int) -> Tensor:
        image = self._read(index)
        if tuple(image.shape) != self.shape:
            (_, height, width), (_, *found) = self.shape, image.shape
            raise DataError(
                f"{os.path.join(self.root, self.files[index])}: expected {height} x {width} pixels (height x width), "
                f"as {self.files[0]} has, found {found[0]} x {found[1]}: pictures that are compared have one size; "
                "--resolution resizes and crops all"
            )
        return image


def _of_folder(root: Path) -> tuple[list[str], np.ndarray | None]:
    folder = ImageFolder(root, captions=False)
    return folder.files, folder.class_labels()


def _of_samples(root: Path) -> tuple[list[str], np.ndarray | None] | None:
    """Of a folder of samples the files and classes that its list has; None: it is another folder."""
    record = root / "samples.json"
    if not record.is_file():
        return None
    try:
        listed = json.loads(record.read_text())["images"]
        files = [str(one["file"]) for one in listed]
        classes = [(one["condition"] or {}).get("class_label") for one in listed]
        labels = None if None in classes else np.array(classes, dtype=np.int64)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{record}: is not the list of a folder of samples ({error}); make them again") from error
    if not files:
        raise DataError(f"{record}: lists 0 samples; make some")
    if missing := [name for name in files if not (root / name).is_file()]:
        raise DataError(f"{root}: {len(missing)} pictures that samples.json lists are missing ({missing[0]}, ...)")
    return files, labels


class NpzPictures:
    """The pictures of an `.npz` file: arr_0 (N,H,W,C) or (N,H,W) uint8, C 1 or 3, and perhaps their classes arr_1 (N,).

    That is how ADM's evaluation and `sample.py --npz` write them. Without compression the file is mapped, once it has
    been compared with its checksums: what is computed of it is kept under these.

    Raises:
        DataError: it is truncated, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        arrays, self._checksums = read_npz(path, mapped=("arr_0",))
        images = arrays.get("arr_0")
        if images is None or images.ndim not in (3, 4) or images.dtype != np.uint8:
            found = ", ".join(arrays) if images is None else f"arr_0 {images.shape} of {images.dtype}"
            finite = "" if images is None or images.dtype.kind != "f" else _finite_note(images)
            raise DataError(f"{path}: expected pictures arr_0 (N,H,W,C) of uint8, 0 to 255; found {found}{finite}")
        self._images = images[..., None] if images.ndim == 3 else images
        number, height, width, channels = self._images.shape
        if not number or channels not in (1, 3):
            raise DataError(f"{path}: expected 1 or more pictures of 1 or 3 channels, found arr_0 {images.shape}")
        self.shape = (channels, height, width)
        self._labels = self._checked(arrays.get("arr_1"))

    def _checked(self, labels: np.ndarray | None) -> np.ndarray | None:
        if labels is None:
            return None
        if labels.shape != (len(self),) or labels.dtype.kind not in "iu":
            raise DataError(
                f"{self.path}: expected classes arr_1 ({len(self)},) of whole numbers, one a picture; found "
                f"{labels.shape} of {labels.dtype}"
            )
        if labels.min() < 0:
            raise DataError(f"{self.path}: expected classes arr_1 of 0 or more, found {labels.min()}")
        return labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self._images)

    def images(self, indices: Sequence[int]) -> Tensor:
        chosen = np.ascontiguousarray(self._images[np.asarray(indices, dtype=np.int64)].transpose(0, 3, 1, 2))
        return torch.from_numpy(chosen)

    def labels(self) -> np.ndarray | None:
        return self._labels

    def description(self) -> Description:
        return {"kind": "npz", "crc32": self._checksums}


def _finite_note(images: np.ndarray) -> str:
    return "" if bool(np.isfinite(images).all()) else ", some of which are not finite"


def read_npz(path: Path, mapped: Sequence[str] = ()) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of an `.npz`, by name, and the CRC-32 of each, as its table of contents states them.

    Args:
        path: of the file.
        mapped: the arrays that are left on disk where the file is not compressed; the others are read.

    Raises:
        DataError: it is missing, truncated or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            checksums = {name: f"{entry.CRC:08x}" for name, entry in members.items()}
            arrays = {
                name: _map(path, entry)
                if name in mapped and entry.compress_type == zipfile.ZIP_STORED
                else npy.read_array(archive.open(entry), allow_pickle=False)
                for name, entry in members.items()
            }
    except DAMAGED_NPZ as error:
        raise DataError(
            f"{path}: cannot be read as an .npz file ({error or type(error).__name__}). It is damaged or was not "
            "copied to its end: copy or make it again"
        ) from error
    return arrays, checksums


def _map(path: Path, entry: zipfile.ZipInfo) -> np.ndarray:
    """The array of an uncompressed member, mapped; ValueError or BadZipFile if it is damaged."""
    with zipfile.ZipFile(path) as archive, archive.open(entry) as member:
        while member.read(_CHUNK):  # zipfile compares the checksum at the end
            pass
    with path.open("rb") as file:
        file.seek(entry.header_offset + 26)
        lengths = np.frombuffer(file.read(4), dtype="<u2")  # of the name and of what is extra, in the local header
        file.seek(entry.header_offset + 30 + int(lengths.sum()))
        version = npy.read_magic(file)
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError("it holds objects, which are not read")
        start = file.tell()
    order: Any = "F" if fortran else "C"
    if 0 in shape:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, "r", start, shape, order)


class DatasetPictures:
    """The pictures of a data set, resized and cropped as for an autoencoder.

    As in training the next readable picture takes the place of one that cannot be read.

    Args:
        dataset: to read.
        transform: picture -> (C,H,W) in [-1,1].
        channels: of the pictures.
    """

    def __init__(self, dataset: ImageDataset, transform: EvalTransform, channels: Count) -> None:
        self.dataset = dataset
        self.transform = transform
        self.channels = channels
        height, width = transform.size
        self.shape = (channels, height, width)

    def __len__(self) -> int:
        return len(self.dataset)

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """(n, C, H, W) float32 in [-1, 1]: what an autoencoder is given."""
        return torch.stack(in_parallel(self._read, indices))

    def images(self, indices: Sequence[int]) -> Tensor:
        return to_uint8(self.pixels(indices))

    def labels(self) -> np.ndarray | None:
        return class_labels(self.dataset)

    def description(self) -> Description:
        pixels = {**self.transform.describe(), "channels": self.channels, **decoding(self.dataset)}
        return {"kind": "data set", "source": self.dataset.fingerprint(), "pixels": pixels}

    def _read(self, index: int) -> Tensor:
        for place in range(index, index + min(_PATIENCE, len(self))):
            item = place % len(self)
            try:
                picture = self.dataset[item]["image"]
                return transformed(picture, self.transform, self.channels, self.dataset.path(item))
            except DataError as error:
                log.warning("%s; the next readable picture takes its place", error)
                last = error
        raise DataError(f"{_PATIENCE} pictures in a row cannot be read; the last: {last}")
