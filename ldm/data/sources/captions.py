"""Where the captions of pictures in files come from: a table, or `name.txt` beside `name.jpg`."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ldm.data.sources import table_files
from ldm.data.sources.table_files import Table, Wanted
from ldm.errors import DataError

_NOT_PLAIN = re.compile(r"^[/.]|/[/.]|/$")
NAMES = ("file_name", "path", "file")
CAPTIONS = ("caption", "text")
"""What columns are called by default, the first that there is."""


class CaptionTable:
    """Captions in a table: JSONL (also without an extension), CSV or TSV with a header, or parquet.

    A row names a picture and its caption. A picture has several captions where the value is a list (JSONL, parquet),
    where several columns are named, or where several rows name it (CSV, TSV, parquet; in JSONL the last line counts).

    Args:
        file: the table.
        image: the column with names of pictures, relative to the data set's root; None: `file_name`, `path` or `file`.
        captions: the column with captions, or several of them; None: `caption` or `text`.
        columns: columns of numbers to keep, such as `[aesthetic]`; of a picture's several rows the first counts.
    """

    def __init__(
        self,
        file: str | Path,
        image: str | None = None,
        captions: str | Sequence[str] | None = None,
        columns: Sequence[str] = (),
    ) -> None:
        self.file = Path(file)
        self.image = image
        self.captions = captions
        self.columns = tuple(columns)

    def read(self, root: Path) -> "Read":
        """All that the table says.

        Args:
            root: absolute names within it are made relative.

        Raises:
            DataError: the table cannot be read, lacks a column, or has something else than texts, or numbers, in it.
        """
        return read(self.file, wanted(self.image, self.captions, self.columns), root)


@dataclass(frozen=True)
class TextFiles:
    """`name.txt` beside each `name.jpg`, required of every picture.

    Args:
        lines: each line that is not blank is a caption; False: the file is one caption.
    """

    lines: bool = False


@dataclass
class Read:
    """What a table says of pictures, by name, in its order.

    Args:
        table: with the columns `name`, `caption ...` and `number ...`.
        rows_of: the rows of each picture.
        texts: its caption, or several; empty if there are no such columns.
        repeated: pictures of which a line was left out.
    """

    table: Table
    rows_of: Mapping[str, list[int]]
    texts: Mapping[str, str | list[str]]
    repeated: Sequence[str]

    def numbers(self, columns: Sequence[str], pictures: Sequence[str]) -> dict[str, np.ndarray]:
        """By name (N,) or (N,k) float32, in the order of `pictures`."""
        rows = [self.rows_of[name][0] for name in pictures] if columns else []
        found = {}
        for column in columns:
            values = self.table.columns[f"number {column}"]
            of_each = [values[row] for row in rows]
            found[column] = table_files.numbers(of_each, column, lambda item: self.table.place(rows[item]))
        return found


def wanted(
    image: str | None, captions: str | Sequence[str] | bool | None, columns: Sequence[str], optional: bool = False
) -> dict[str, Wanted]:
    """The columns of a table of pictures: `name`, `caption 0`, `caption 1`, ..., `number ...`.

    Args:
        image, captions, columns: as for `ImageTable`.
        optional: captions may be missing.
    """
    if captions is None or isinstance(captions, bool):
        named: list[tuple[str, ...]] = [] if captions is False else [CAPTIONS]
    else:
        named = [(name,) for name in ([captions] if isinstance(captions, str) else captions)]
    return {
        "name": Wanted(NAMES if image is None else (image,), "image"),
        **{f"caption {number}": Wanted(names, "captions", optional) for number, names in enumerate(named)},
        **{f"number {column}": Wanted((column,), "columns") for column in columns},
    }


def read(file: Path, columns: Mapping[str, Wanted], root: Path) -> Read:
    """Read a table of pictures; `columns` are those that are `wanted`, and others. Raises DataError."""
    table = table_files.read(file, columns)
    names = (inside(name, root, table, row) for row, name in enumerate(table.columns["name"]))
    rows_of, repeated = rows_by_name(table, names)
    several = [key for key in table.columns if key.startswith("caption ")]
    texts = {name: _of_rows(table, rows, several) for name, rows in rows_of.items()} if several else {}
    return Read(table, rows_of, texts, repeated)


@dataclass
class InTable:
    """The captions of pictures, in memory.

    Args:
        texts: of each picture in turn, one or a list of several.
        others: of pictures that do not exist; they count in the fingerprint.
    """

    texts: list[str | list[str]]
    others: Mapping[str, str | list[str]] = field(default_factory=dict)
    files: tuple[str, ...] = ()

    def of(self, index: int) -> Sequence[str]:
        texts = self.texts[index]
        return [texts] if isinstance(texts, str) else texts

    def described(self, pictures: Sequence[str]) -> Iterator[str]:
        """For a fingerprint: JSON of {picture: captions}, sorted by name, in pieces."""
        every = {**self.others, **dict(zip(pictures, self.texts, strict=True))}
        for number, name in enumerate(sorted(every)):
            yield f"{', ' if number else '{'}{json.dumps(name)}: {json.dumps(every[name])}"
        yield "}"


@dataclass
class Beside:
    """The captions of pictures, in a text file each.

    Args:
        root: the folder.
        files: in it, of each picture in turn.
        lines: as for `TextFiles`.
    """

    root: Path
    files: Sequence[str]
    lines: bool = False

    def of(self, index: int) -> Sequence[str]:
        text = read_text(self.root / self.files[index])
        return [line.strip() for line in text.split("\n") if line.strip()] or [""] if self.lines else [text]

    def described(self, pictures: Sequence[str]) -> Iterator[str]:
        yield "null"


def from_table(source: CaptionTable, root: Path, pictures: Sequence[str]) -> tuple[InTable, dict[str, np.ndarray], str]:
    """The captions of pictures, columns of numbers, and a warning about rows that are of no use ("": none).

    Raises:
        DataError: the table cannot be used, or a picture has no caption.
    """
    read = source.read(root)
    lacking = [name for name in pictures if name not in read.texts]
    if lacking:
        raise DataError(
            f"{lacking[0]}: has no caption in {source.file}, like {len(lacking)} of {len(pictures)} images in all. "
            "Give every image one, or leave `captions` out"
        )
    known = set(pictures)
    others = {name: texts for name, texts in read.texts.items() if name not in known}
    captions = InTable([read.texts[name] for name in pictures], others)
    notes = [empty_ones(captions.texts, pictures)]
    if others:
        notes.append(f"left out: captions of {len(others)} images that do not exist ({next(iter(others))})")
    if read.repeated:
        notes.append(
            f"left out: {len(read.repeated)} captions of images that have another one further down ({read.repeated[0]})"
        )
    return captions, read.numbers(source.columns, pictures), "; ".join(filter(None, notes))


def empty_ones(texts: Sequence[str | list[str]], pictures: Sequence[str]) -> str:
    """A note on empty captions; "" if there are none."""
    pairs = zip(pictures, texts, strict=True)
    empty = [name for name, one in pairs if not (all(one) if isinstance(one, list) else one)]
    return f"{len(empty)} captions are empty ({empty[0]})" if empty else ""


def rows_by_name(table: Table, names: Iterable[str]) -> tuple[dict[str, list[int]], list[str]]:
    """{name: its rows}, and the names of which a line was left out, since in JSONL the last one counts."""
    rows_of: dict[str, list[int]] = {}
    repeated: list[str] = []
    adds_up = table.path.suffix.casefold() in (".csv", ".tsv", ".parquet")
    for row, name in enumerate(names):
        if name not in rows_of:
            rows_of[name] = [row]
        elif adds_up:
            rows_of[name].append(row)
        else:
            rows_of[name] = [row]
            repeated.append(name)
    return rows_of, repeated


def inside(name: Any, root: Path, table: Table, row: int) -> str:
    """A name in a table: relative to the root, where it lies in it, and in its plain form."""
    if not isinstance(name, str) or not name:
        raise DataError(f"{table.place(row)}: expected the name of an image, found {name!r}")
    if not _NOT_PLAIN.search(name):
        return name
    path = PurePosixPath(name)
    return (path.relative_to(root.absolute()) if path.is_relative_to(root.absolute()) else path).as_posix()


def beside(
    root: Path, pictures: Sequence[str], texts: Sequence[str], wanted: bool | TextFiles | None
) -> tuple[Beside | None, str]:
    """The text file of every picture, or None, and a warning if only some have one ("": none).

    Args:
        root: the folder, for messages.
        pictures, texts: files in it.
        wanted: True, `TextFiles`: every image must have one; None: they are used if every image has one.

    Raises:
        DataError: captions are required and an image has none.
    """
    text_of = {os.path.splitext(text)[0]: text for text in texts}
    found = {name: text_of[stem] for name in pictures if (stem := os.path.splitext(name)[0]) in text_of}
    if len(found) == len(pictures):
        return Beside(root, list(found.values()), isinstance(wanted, TextFiles) and wanted.lines), ""
    if not found and not wanted:
        return None, ""
    lacking = next(name for name in pictures if name not in found)
    counts = f"{len(pictures) - len(found)} of {len(pictures)} images have no caption beside them"
    if wanted:
        name = f"{os.path.splitext(lacking)[0]}.txt"
        raise DataError(f"{root / lacking}: has no caption ({name}); {counts}. Write them, or leave `captions` out")
    return None, (
        f"{counts}, such as {lacking}, so the texts of the other {len(found)}, such as {next(iter(found.values()))}, "
        "are ignored and there are no captions. Write those that are missing (`captions: true` makes sure that none "
        "is), or set `captions: false` if these texts are not captions"
    )


def read_text(path: Path) -> str:
    """A text file, stripped of surrounding whitespace; DataError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a caption in UTF-8 ({error})") from error


def hash_of(captions: Sequence[str]) -> int:
    """A hash of an item's captions, 64 bits, never 0."""
    digest = blake2b(", ".join(map(json.dumps, captions)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def _of_rows(table: Table, rows: Sequence[int], keys: Sequence[str]) -> str | list[str]:
    """The caption of a picture, or its several captions, in one or more rows and columns.

    Raises:
        DataError: there is none, or it is no text.
    """
    if len(rows) == len(keys) == 1:
        value = table.columns[keys[0]][rows[0]]
        if isinstance(value, str) and value.isascii():
            return value
    found = [text for row in rows for key in keys for text in texts_of(table.columns[key][row], table.place, row)]
    if not found:
        raise DataError(f"{table.place(rows[0])}: has no caption; write one, or an empty text")
    return found[0] if len(found) == 1 else found


def texts_of(value: Any, place: Callable[[int], str], row: int) -> list[str]:
    """The captions that a value of a table is: a text, several in a list, or none.

    Raises:
        DataError: it is something else.
    """
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(one, bool) or not isinstance(one, str | int | float) for one in values):
        raise DataError(f"{place(row)}: expected a caption or a list of captions, found {str(value)[:80]!r}")
    texts = [str(one) for one in values]
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a pair, which JSON can write
            raise DataError(f"{place(row)}: the caption is no text in Unicode ({error})") from error
    return texts
