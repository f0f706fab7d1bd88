"""Which files of indexed tars make the items of a data set: its picture, captions, class and numbers."""

import mmap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ldm.data.sources.listing import EXTENSIONS
from ldm.data.sources.shards import Shard
from ldm.data.sources.tar_index import TarIndex
from ldm.data.sources.tar_reader import MEMBER
from ldm.data.sources.tar_values import captions_of, column_of, entry_of, value_of
from ldm.errors import DataError


class Wanted(NamedTuple):
    """What a data set asks for; see `WebDataset`."""

    image: str | None
    captions: bool | str | None
    classes: bool | str | None
    columns: tuple[str, ...]


@dataclass
class TarItems:
    """The items of a data set, in the order of the shards and of the first files in them.

    Attributes:
        ends: (S,) how many items the shards up to each hold.
        pictures: (N,) `MEMBER`.
        captions: (N,) `MEMBER` of their texts; None: there are no captions.
        caption_key: of `.json`; None: captions are the texts themselves.
        columns: (N,) or (N,k) float32 each.
    """

    ends: np.ndarray
    pictures: np.ndarray
    captions: np.ndarray | None
    caption_key: str | None
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.pictures)

    def shard(self, index: int) -> int:
        """The number of the shard that an item lies in."""
        return int(np.searchsorted(self.ends, index, side="right"))

    def by_shard(self) -> Iterator[slice]:
        """The items of each shard."""
        start = 0
        for end in self.ends.tolist():
            yield slice(start, end)
            start = end


@dataclass
class _Part:
    """The items of one shard: `MEMBER` rows of each, of size -1 where an item has none."""

    index: TarIndex
    pictures: np.ndarray
    texts: dict[str, np.ndarray]
    values: dict[str, list[Any]] = field(default_factory=dict)

    def lacking(self, ending: str) -> np.ndarray:
        return self.texts[ending]["size"] < 0

    def keep(self, chosen: np.ndarray) -> None:
        self.pictures = self.pictures[chosen]
        self.texts = {ending: rows[chosen] for ending, rows in self.texts.items()}


def chosen(
    shards: Sequence[Shard], indexes: Sequence[TarIndex], wanted: Wanted
) -> tuple[TarItems, list[int | str] | None, list[str]]:
    """The items that have what is wanted, the class of each if there are some, and notes on what has not.

    Raises:
        DataError: none are left.
    """
    left_out = _LeftOut()
    parts = [_part(index, wanted.image, left_out) for index in indexes]
    notes = []
    captions, note = _detected(wanted.captions, "captions", ".txt", parts)
    notes.append(note)
    classes, note = _detected(wanted.classes, "classes", ".cls", parts)
    notes.append(note)
    for part in parts:
        _keep_complete(part, captions, classes, wanted.columns, left_out)
    notes += [left_out.text(), *_oddities(shards, indexes)]
    if not sum(len(part.pictures) for part in parts):
        raise DataError(
            f"{shards[0].location}{', ...' if len(shards) > 1 else ''}: 0 items in {len(shards)} shards"
            f" ({left_out.text() or 'they are empty'}); expected pictures "
            f"({f'.{wanted.image}' if wanted.image else ' '.join(sorted(EXTENSIONS))}) with what is asked for"
        )
    items = TarItems(
        ends=np.cumsum([len(part.pictures) for part in parts]),
        pictures=np.concatenate([part.pictures for part in parts]),
        captions=_caption_rows(captions, parts),
        caption_key=captions if isinstance(captions, str) else None,
        columns={key: column_of(key, [part.values[f"column {key}"] for part in parts]) for key in wanted.columns},
    )
    return items, [one for part in parts for one in part.values["classes"]] if classes else None, notes


def _part(index: TarIndex, image: str | None, left_out: "_LeftOut") -> _Part:
    """The items of a shard that have a picture."""
    kinds = [ending == f".{image.casefold()}" if image else ending in EXTENSIONS for ending in index.endings]
    rows = index.members[np.array([*kinds, False])[index.members["ending"]]] if len(index.members) else index.members
    items, first = np.unique(rows["item"], return_index=True)
    left_out.add("items without a picture", index, np.setdiff1d(np.arange(index.num_items), items))
    if len(rows) > len(items):
        left_out.count("pictures beside another of the same item (choose with `image`)", len(rows) - len(items))
    unused = Counter(index.members["ending"].tolist())
    for number, ending in enumerate(index.endings):
        if not kinds[number] and ending not in (".txt", ".cls", ".json"):
            left_out.count(ending, unused[number])
    for kind, number in index.left_out.items():
        left_out.count(kind, number)
    return _Part(index, rows[first], {ending: _texts(index, ending, items) for ending in (".txt", ".cls", ".json")})


def _texts(index: TarIndex, ending: str, items: np.ndarray) -> np.ndarray:
    """The text files with an ending, a row for each of the items."""
    table = np.zeros(index.num_items, MEMBER)
    table["size"] = -1
    if ending in index.endings:
        rows = index.members[index.members["ending"] == index.endings.index(ending)]
        table[rows["item"]] = rows
    table["offset"] += index.texts_at
    return table[items]


def _detected(wanted: bool | str | None, what: str, ending: str, parts: Sequence[_Part]) -> tuple[bool | str, str]:
    """True or a key of .json: what to read; and a note where only some items have it."""
    if wanted is not None:
        return wanted, ""
    lacking, total = sum(int(part.lacking(ending).sum()) for part in parts), sum(len(part.pictures) for part in parts)
    if not lacking or lacking == total:
        return not lacking, ""
    return False, (
        f"{lacking} of {total} items have no {ending}, so there are no {what}. `{what}: true` leaves these items out, "
        f"`{what}: false` ignores the files of the others"
    )


def _keep_complete(
    part: _Part, captions: bool | str, classes: bool | str, columns: Sequence[str], left_out: "_LeftOut"
) -> None:
    """Drop items that lack something, and read classes and columns of those that are left."""
    for what, ending in (("a caption", ".txt"), ("a class", ".cls")):
        if (captions if what == "a caption" else classes) is True:
            _drop(part, part.lacking(ending), f"pictures without {what} ({ending})", left_out)
    keys = {f"column {key}": key for key in columns}
    if isinstance(classes, str):
        keys["classes"] = classes
    if isinstance(captions, str) or keys:
        _drop(part, part.lacking(".json"), "pictures without a .json", left_out)
        _read_json(part, keys, captions if isinstance(captions, str) else None, left_out)
    if classes is True:
        with text_of(part.index) as text:
            part.values["classes"] = [text(row).decode("utf-8", "replace").strip() for row in part.texts[".cls"]]


def _read_json(part: _Part, keys: Mapping[str, str], caption: str | None, left_out: "_LeftOut") -> None:
    """Read keys of each item's .json; items that lack one are dropped."""
    found: dict[str, list[Any]] = {name: [] for name in keys}
    lacking: dict[str, list[int]] = {}
    with text_of(part.index) as text:
        for row, member in enumerate(part.texts[".json"]):
            entry = entry_of(text(member))
            values = {name: value_of(entry, key, name) for name, key in keys.items()}
            missing = next((keys[name] for name, value in values.items() if value is None), None)
            if caption is not None and not captions_of(entry, caption):
                missing = caption
            if missing is not None:
                lacking.setdefault(missing if entry is not None else "", []).append(row)
                continue
            for name, value in values.items():
                found[name].append(value)
    part.values.update(found)
    dropped = np.zeros(len(part.pictures), dtype=bool)
    for key, rows in lacking.items():
        what = f"pictures whose .json has no usable {key!r}" if key else "pictures whose .json cannot be read"
        left_out.add(what, part.index, part.pictures["item"][rows])
        dropped[rows] = True
    part.keep(~dropped)


def _drop(part: _Part, dropped: np.ndarray, why: str, left_out: "_LeftOut") -> None:
    left_out.add(why, part.index, part.pictures["item"][dropped])
    part.keep(~dropped)


@contextmanager
def text_of(index: TarIndex) -> Iterator[Any]:
    """A function of a `MEMBER` of a text, whose offset counts in the index, that returns its bytes."""
    with index.place.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:

        def read(member: np.void) -> bytes:
            start = int(member["offset"])
            return mapped[start : start + int(member["size"])]

        yield read


def _caption_rows(captions: bool | str, parts: Sequence[_Part]) -> np.ndarray | None:
    if not captions:
        return None
    return np.concatenate([part.texts[".json" if isinstance(captions, str) else ".txt"] for part in parts])


class _LeftOut:
    """What is left out, by kind, with an example where there is one."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def count(self, what: str, number: int) -> None:
        self._counts[what] += number

    def add(self, what: str, index: TarIndex, items: np.ndarray) -> None:
        if len(items):
            self._counts[what] += len(items)
            self._examples.setdefault(what, index.name(int(items[0])))

    def text(self) -> str:
        """One line; "" for nothing."""
        counted = sorted(((what, n) for what, n in self._counts.items() if n), key=lambda one: (-one[1], one[0]))
        several = [f"{n} {what}{f' ({self._examples[what]})' if what in self._examples else ''}" for what, n in counted]
        more = f", and {len(several) - 10} more kinds" if len(several) > 10 else ""
        return f"left out: {', '.join(several[:10])}{more}" if several else ""


def _oddities(shards: Sequence[Shard], indexes: Sequence[TarIndex]) -> Iterator[str]:
    repeated = [shard.location for shard, index in zip(shards, indexes, strict=True) if index.repeated]
    if repeated:
        total = sum(index.repeated for index in indexes)
        yield f"{total} files come again further down in the same tar, where the last one counts ({repeated[0]})"
