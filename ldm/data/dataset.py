"""The contract of a data set of images, and a part of one.

Items are dicts of `image` (PIL, gray, RGB or RGBA; or an array (H,W,C) of uint8 with any number of channels),
`class_label` (int, if the data set has classes), `caption` (str, or a list of several, if it has captions), and what
lies on the picture and is cropped and mirrored with it (`ALIGNED`).
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, TypedDict, runtime_checkable

import numpy as np
from PIL import Image

from ldm.data import fingerprint
from ldm.errors import ConfigError, DataError
from ldm.ranges import CountOrZero

Picture = Image.Image | np.ndarray
"""A PIL image, gray, RGB or RGBA; or (H,W,C) uint8."""

CONVERTIBLE = (1, 3, 4)
"""The numbers of channels that a PIL image can be given: gray, RGB, RGBA."""


class _Pixels(TypedDict):
    image: Picture


class Item(_Pixels, total=False):
    """One item of a data set.

    Attributes:
        image: the picture.
        class_label: its class.
        caption: what it shows, in words; or several such texts.
        map: (H,W) uint8 or int16, the class of each of its pixels; 255 (uint8), -1 (int16): none.
        mask: (H,W) uint8, 255 where the picture may be changed (the hole), 0 where it stays.
        boxes: (K,5) float32: left, top, right and bottom in its pixels, and class; K may be 0.
        pair: a second picture of the same proportions.
    """

    class_label: int
    caption: str | list[str]
    map: np.ndarray
    mask: np.ndarray
    boxes: np.ndarray
    pair: Picture


ALIGNED = ("map", "mask", "boxes", "pair")
"""Keys of what lies on an item's picture."""


class ImageDataset(Protocol):
    """What a data module requires of a data set of images."""

    @property
    def num_classes(self) -> int | None:
        """Labels are 0 .. num_classes - 1; None: items have no `class_label`."""

    @property
    def class_names(self) -> list[str] | None:
        """A name for each label, if there are any."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item:
        """Decode one item. Raises DataError naming the file if it cannot be read."""

    def path(self, index: int) -> str:
        """Where the item comes from, for messages."""

    def fingerprint(self) -> str:
        """Changes with the items, all they hold and their order, but not their location (ldm/data/fingerprint.py)."""

    def prepare(self) -> None:
        """Prepare the files (download, draw); called once per machine before items are read; cheap to repeat."""


@runtime_checkable
class Labeled(Protocol):
    """Optional: a data set that has its labels without decoding, so that a missing class can be noticed."""

    def class_labels(self) -> np.ndarray | None:
        """The label of every item, (N,) int64; None: there are no classes, or the labels are unknown."""


def class_labels(dataset: ImageDataset) -> np.ndarray | None:
    """The label of every item, (N,) int64; None if there are none or they are unknown without decoding."""
    return dataset.class_labels() if isinstance(dataset, Labeled) else None


@runtime_checkable
class Captioned(Protocol):
    """Optional: a data set that can say without decoding whether its items carry captions."""

    def has_captions(self) -> bool:
        """Whether each item has a `caption`."""


def has_captions(dataset: ImageDataset) -> bool:
    """Whether items carry captions: as the data set says, otherwise as its first readable item shows."""
    if isinstance(dataset, Captioned):
        return dataset.has_captions()
    for item in range(len(dataset)):
        try:
            return "caption" in dataset[item]
        except DataError:
            continue
    return False


@runtime_checkable
class Texts(Protocol):
    """Optional: a data set whose captions, if it has some, can be read, and change, without its pictures."""

    def captions(self, index: int) -> Sequence[str]:
        """The captions of an item, one or more. Raises DataError naming the file if they cannot be read."""

    def captions_fingerprint(self) -> str:
        """Changes with the captions and the number of items, and with nothing else."""

    def pictures_fingerprint(self) -> str:
        """As `fingerprint`, without the captions."""


def texts(dataset: ImageDataset) -> Texts | None:
    """The data set as one whose captions can be read without its pictures; None if there are none, or they cannot."""
    whole = dataset
    while isinstance(whole, Subset):
        whole = whole.dataset
    found: object = dataset  # a data set and an optional protocol: two types of one object
    return found if isinstance(whole, Texts) and has_captions(whole) and isinstance(found, Texts) else None


@runtime_checkable
class Uncaptioned(Protocol):
    """Optional: a data set that reads items without their captions, whatever is wrong with these."""

    def without_captions(self, index: int) -> Item:
        """As `dataset[index]`; the caption may be left out, and is not read."""


def without_captions(dataset: ImageDataset, index: int) -> Item:
    """The item, if possible without reading its captions."""
    if isinstance(dataset, Subset):
        return without_captions(dataset.dataset, dataset.indices[index])
    return dataset.without_captions(index) if isinstance(dataset, Uncaptioned) else dataset[index]


@runtime_checkable
class Sized(Protocol):
    """Optional: a data set that has the sizes of its pictures without decoding them."""

    def sizes(self) -> np.ndarray | None:
        """(N, 2) int64: height and width of every item, pixels; 0, 0 for one that cannot be read; None: unknown."""


def sizes(dataset: ImageDataset) -> np.ndarray | None:
    """(N, 2) int64: height and width of every item, 0, 0 where it cannot be read; None: unknown without decoding."""
    return dataset.sizes() if isinstance(dataset, Sized) else None


@runtime_checkable
class Tabular(Protocol):
    """Optional: a data set that has numbers beside its pictures, such as an aesthetic score."""

    def columns(self) -> Mapping[str, np.ndarray]:
        """By key of a batch: (N,) or (N, k) float32, a row for each item."""


def columns(dataset: ImageDataset) -> Mapping[str, np.ndarray]:
    """The numbers beside the pictures, by key of a batch; none where the data set has none."""
    return dataset.columns() if isinstance(dataset, Tabular) else {}


@runtime_checkable
class Aligned(Protocol):
    """Optional: a data set whose items hold what lies on their picture, such as boxes."""

    def aligned_keys(self) -> Sequence[str]:
        """Which of the keys `ALIGNED` each item has."""

    def map_classes(self) -> list[str] | None:
        """A name for each class of `map`; None: there are no maps."""

    def box_classes(self) -> list[str] | None:
        """A name for each class of `boxes`; None: there are no boxes."""


def aligned_keys(dataset: ImageDataset) -> Sequence[str]:
    """Which of the keys `ALIGNED` each item has."""
    return dataset.aligned_keys() if isinstance(dataset, Aligned) else ()


def map_classes(dataset: ImageDataset) -> list[str] | None:
    """A name for each class of `map`; None: there are no maps."""
    return dataset.map_classes() if isinstance(dataset, Aligned) else None


def box_classes(dataset: ImageDataset) -> list[str] | None:
    """A name for each class of `boxes`; None: there are no boxes."""
    return dataset.box_classes() if isinstance(dataset, Aligned) else None


@runtime_checkable
class AlignedApart(Protocol):
    """Optional: a data set whose pictures can be read, and change, without what lies on them."""

    def with_aligned(self, index: int, keys: Collection[str]) -> Item:
        """As `dataset[index]`, with only these of the keys `ALIGNED`, and without its captions.

        Raises:
            DataError: some of it cannot be read; whatever is wrong with the rest.
        """

    def aligned_fingerprint(self, key: str) -> str:
        """Changes with what lies on the pictures under the key, and with nothing else."""

    def bare_fingerprint(self) -> str:
        """As `fingerprint`, without the captions and all that lies on the pictures."""


def aligned_apart(dataset: ImageDataset) -> AlignedApart | None:
    """The data set as one whose pictures can change without what lies on them; None if they cannot, or nothing does."""
    whole = dataset
    while isinstance(whole, Subset):
        whole = whole.dataset
    found: object = dataset  # as in `texts`
    apart = isinstance(whole, AlignedApart) and aligned_keys(dataset)
    return found if apart and isinstance(found, AlignedApart) else None


def with_aligned(dataset: ImageDataset, index: int, keys: Collection[str]) -> Item:
    """The item, if possible without reading its captions and what else lies on its picture than these `keys`."""
    apart = aligned_apart(dataset)
    return without_captions(dataset, index) if apart is None else apart.with_aligned(index, keys)


@runtime_checkable
class Channeled(Protocol):
    """Optional: a data set that can say without decoding how many channels its pictures can have."""

    def channel_choices(self) -> Sequence[int] | None:
        """The numbers to choose from, `CONVERTIBLE` if its items are PIL images; None: unknown."""


def channel_choices(dataset: ImageDataset) -> Sequence[int] | None:
    """How many channels its pictures can have; None: unknown without decoding."""
    return dataset.channel_choices() if isinstance(dataset, Channeled) else None


def require_channels(dataset: ImageDataset | None, wanted: int, key: str) -> None:
    """ConfigError, naming the `key` that wants them, where the pictures surely cannot have so many channels."""
    known = None if dataset is None else channel_choices(dataset)
    if dataset is not None and known is not None and wanted not in known:
        raise ConfigError(
            f"{key}: the model reads pictures of {wanted} channels, those of the data set ({dataset.path(0)}, ...) can "
            f"have {' or '.join(map(str, known))}: name another number, or another data set"
        )


@runtime_checkable
class Decoded(Protocol):
    """Optional: a data set that can say how another file must be decoded to match its items."""

    def decoding(self) -> dict[str, Any]:
        """In plain values, for a latent cache's manifest: `value_range` ([black, white]) if it is not the default."""


def decoding(dataset: ImageDataset) -> dict[str, Any]:
    """How another file must be decoded to match the items of the data set; see `Decoded`."""
    return dataset.decoding() if isinstance(dataset, Decoded) else {}


def emptied_classes(dataset: ImageDataset, lost: Collection[int]) -> list[str]:
    """Names of the classes that have no items except those in `lost`; empty if labels are unknown."""
    labels = class_labels(dataset) if lost else None
    if labels is None:
        return []
    taken = np.asarray(sorted(lost), dtype=np.int64)
    return named(dataset, np.setdiff1d(labels[taken], np.delete(labels, taken)).tolist())


def named(dataset: ImageDataset, labels: Sequence[int]) -> list[str]:
    """The names of classes in messages."""
    names = dataset.class_names
    return [str(label) if names is None else names[label] for label in labels]


class Subset:
    """Some items of a data set, in the given order."""

    def __init__(self, dataset: ImageDataset, indices: Sequence[CountOrZero]) -> None:
        self.dataset = dataset
        self.indices = [int(index) for index in indices]

    @property
    def num_classes(self) -> int | None:
        return self.dataset.num_classes

    @property
    def class_names(self) -> list[str] | None:
        return self.dataset.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Item:
        return self.dataset[self.indices[index]]

    def path(self, index: int) -> str:
        return self.dataset.path(self.indices[index])

    def class_labels(self) -> np.ndarray | None:
        labels = class_labels(self.dataset)
        return None if labels is None else labels[self.indices]

    def has_captions(self) -> bool:
        return has_captions(self.dataset)

    def decoding(self) -> dict[str, Any]:
        return decoding(self.dataset)

    def channel_choices(self) -> Sequence[int] | None:
        return channel_choices(self.dataset)

    def captions(self, index: int) -> Sequence[str]:
        return self._texts().captions(self.indices[index])

    def captions_fingerprint(self) -> str:
        return self._chosen(self._texts().captions_fingerprint())

    def pictures_fingerprint(self) -> str:
        return self._chosen(self._texts().pictures_fingerprint())

    def _texts(self) -> Texts:
        found = texts(self.dataset)
        if found is None:
            raise DataError(f"{self.path(0)}: its data set has no captions that can be read without the pictures")
        return found

    def sizes(self) -> np.ndarray | None:
        found = sizes(self.dataset)
        return None if found is None else found[self.indices]

    def columns(self) -> Mapping[str, np.ndarray]:
        return {name: column[self.indices] for name, column in columns(self.dataset).items()}

    def aligned_keys(self) -> Sequence[str]:
        return aligned_keys(self.dataset)

    def map_classes(self) -> list[str] | None:
        return map_classes(self.dataset)

    def box_classes(self) -> list[str] | None:
        return box_classes(self.dataset)

    def with_aligned(self, index: int, keys: Collection[str]) -> Item:
        return self._apart().with_aligned(self.indices[index], keys)

    def aligned_fingerprint(self, key: str) -> str:
        return self._chosen(self._apart().aligned_fingerprint(key))

    def bare_fingerprint(self) -> str:
        return self._chosen(self._apart().bare_fingerprint())

    def _apart(self) -> AlignedApart:
        found = aligned_apart(self.dataset)
        if found is None:
            raise DataError(f"{self.path(0)}: its data set cannot be read without what lies on the pictures")
        return found

    def fingerprint(self) -> str:
        return self._chosen(self.dataset.fingerprint())

    def _chosen(self, whole: str) -> str:
        chosen = np.asarray(self.indices, dtype=np.int64).tobytes()
        names, contents = fingerprint.parts(whole)
        return hashlib.sha256(names.encode() + chosen).hexdigest() + contents

    def prepare(self) -> None:
        self.dataset.prepare()
