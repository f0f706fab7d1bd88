"""Rows of a table, whatever it is stored as: JSONL, CSV, TSV or parquet."""

import csv
import difflib
import json
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ldm.errors import ConfigError, DataError


@dataclass(frozen=True)
class Wanted:
    """A column to read: under the first of `names` that there is.

    Args:
        names: in the table.
        parameter: of whoever reads it, that names another one.
        optional: it may be missing, and its values None.
    """

    names: Sequence[str]
    parameter: str
    optional: bool = False


@dataclass(frozen=True)
class Table:
    """Some columns of a table.

    Args:
        path: the file.
        columns: by the key under which each was asked for, all of one length; without those that it does not have.
        lines: where each row stands, if rows are lines; empty if they are not.
    """

    path: Path
    columns: Mapping[str, list[Any]]
    lines: Sequence[int] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def place(self, row: int) -> str:
        """Where a row stands, for messages."""
        return f"{self.path}:{self.lines[row]}" if self.lines else f"{self.path}, row {row + 1}"


def read(path: Path, wanted: Mapping[str, Wanted]) -> Table:
    """Read columns of a table; by its extension it is .csv, .tsv, .parquet, or otherwise JSON lines.

    Values are what JSON and parquet make of them, and texts in CSV. Nothing else of the file stays in memory.

    Raises:
        DataError: the file cannot be read, or lacks a column.
        ConfigError: it is parquet, and pyarrow is missing.
    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}
    try:
        return readers.get(path.suffix.casefold(), _read_json_lines)(path, wanted)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 ({error}); save it as UTF-8") from error
    except (OSError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a table ({error})") from error


def numbers(values: Sequence[Any], name: str, place: Callable[[int], str]) -> np.ndarray:
    """A column of numbers as (N,), or of lists of them as (N,k), float32.

    Args:
        values: of each item.
        name: of the column, for messages.
        place: where a value stands, for messages.

    Raises:
        DataError: a value that is no finite number, or lists of several lengths.
    """
    for row, value in enumerate(values):
        if not _is_number(value):
            raise DataError(f"{place(row)}: {name}: expected a finite number, or a list of them, found {value!r}")
    try:
        return np.array(values, dtype=np.float32)
    except ValueError as error:
        raise DataError(f"{place(0)}, ...: {name}: expected equally many numbers in each row ({error})") from error


def _is_number(value: Any) -> bool:
    several = value if isinstance(value, list) else [value]
    try:
        return bool(several) and all(not isinstance(one, bool) and math.isfinite(float(one)) for one in several)
    except (ValueError, TypeError, OverflowError):
        return False


@contextmanager
def optional_packages(what: str) -> Iterator[None]:
    """Around imports of what the extra `sources` installs.

    Raises:
        ConfigError: a package is missing.
    """
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"{what}: needs the package {error.name}: pip install -e '.[sources]'") from error


def lacking(path: object, names: Sequence[str], there: Iterable[str], parameter: str) -> NoReturn:
    """Raise the DataError of a missing column."""
    there = list(there)
    near = [match for name in names for match in difflib.get_close_matches(name, there, n=1)]
    hint = f"did you mean {near[0]!r}? Otherwise name" if near else "name"
    raise DataError(
        f"{path}: has no column {' or '.join(map(repr, names))}, but {', '.join(map(repr, there)) or 'none'}; {hint} "
        f"the right one (`{parameter}`)"
    )


def _read_json_lines(path: Path, wanted: Mapping[str, Wanted]) -> Table:
    columns: dict[str, list[Any]] = {key: [] for key in wanted}
    lines = array("q")
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):  # not str.splitlines, which also splits within texts
            if raw.isspace():
                continue
            entry = _entry(path, number, raw, wanted)
            for key, one in wanted.items():
                for name in one.names:
                    if name in entry:
                        columns[key].append(entry[name])
                        break
                else:
                    if not one.optional:
                        lacking(f"{path}:{number}", one.names, entry, one.parameter)
                    columns[key].append(None)
            lines.append(number)
    absent = [key for key, one in wanted.items() if one.optional and all(value is None for value in columns[key])]
    return Table(path, {key: column for key, column in columns.items() if key not in absent}, lines)


def _entry(path: Path, number: int, raw: bytes, wanted: Mapping[str, Wanted]) -> dict[str, Any]:
    try:
        entry = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: is not UTF-8 ({error}); save it as UTF-8") from error
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        shape = ", ".join(f'"{one.names[0]}": ...' for one in wanted.values() if not one.optional)
        found = raw.decode("utf-8", errors="replace").strip()[:80]
        raise DataError(f"{path}:{number}: expected {{{shape}}} in JSON, found {found!r}")
    return entry


def _read_csv(path: Path, wanted: Mapping[str, Wanted]) -> Table:
    columns: dict[str, list[Any]] = {}
    lines = array("q")
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter="\t" if path.suffix.casefold() == ".tsv" else ",", strict=True)
        header = next(rows, [])
        places = {key: header.index(name) for key, name in _found(path, wanted, header).items()}
        columns = {key: [] for key in places}
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{path}:{rows.line_num}: expected {len(header)} values ({', '.join(header)}), found {len(row)}; "
                    'put a text with commas between quotes, "a, b"'
                )
            for key, place in places.items():
                columns[key].append(row[place])
            lines.append(rows.line_num)
    return Table(path, columns, lines)


def _read_parquet(path: Path, wanted: Mapping[str, Wanted]) -> Table:
    with optional_packages(str(path)):
        import pyarrow
        from pyarrow import parquet
    try:
        file = parquet.ParquetFile(path)
        found = _found(path, wanted, file.schema_arrow.names)
        table = file.read(columns=list(found.values()))
        return Table(path, {key: table.column(name).to_pylist() for key, name in found.items()})
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet ({' '.join(str(error).split())})") from error


def _found(path: Path, wanted: Mapping[str, Wanted], there: Sequence[str]) -> dict[str, str]:
    """The name in the table of each column, without optional ones that are missing."""
    found = {}
    for key, one in wanted.items():
        name = next((name for name in one.names if name in there), None)
        if name is not None:
            found[key] = name
        elif not one.optional:
            lacking(path, one.names, there, one.parameter)
    return found
