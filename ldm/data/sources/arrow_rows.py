"""A data set of the library `datasets` on disk: opening it without a network, and reading its rows and columns.

Both layouts are read: what `save_to_disk` writes (Arrow, used where it lies), and parquet files as the hub stores
them. Parquet cannot be addressed by row, so its files are converted to Arrow once, into a folder.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm.data.sources.table_files import optional_packages
from ldm.errors import DataError, of_place

_BATCH = 1000  # rows that are in memory at once
_DICT, _STATE = "dataset_dict.json", "state.json"


def opened(root: Path, split: str | None, folder: Path) -> Any:
    """A `datasets.Dataset`, memory-mapped.

    Args:
        root: a folder that `save_to_disk` wrote, or one with parquet files, or one such file.
        split: which of several.
        folder: for parquet files as Arrow.

    Raises:
        ConfigError: the package is missing.
        DataError: nothing of the kind is there, it is damaged, or the split is not there.
        ResourceError: `folder` cannot be written.
    """
    with optional_packages(str(root)):
        import datasets
    if not root.exists():
        raise DataError(f"{root}: no such data set; set `root` to an existing one")
    if (root / _DICT).is_file():
        splits = [path.parent.name for path in sorted(root.glob(f"*/{_STATE}"))]
        root = root / _chosen(root, split, splits)
    elif not (root / _STATE).is_file():
        return _of_parquet(root, split, folder)
    with _readable(root):
        return datasets.load_from_disk(str(root), keep_in_memory=False)


def _of_parquet(root: Path, split: str | None, folder: Path) -> Any:
    import datasets

    files = [root] if root.is_file() else sorted(root.rglob("*.parquet"))
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    if not files:
        raise DataError(f"{root}: holds neither {_STATE}, as save_to_disk writes it, nor parquet files")
    by_split: dict[str, list[str]] = {}
    for file in files:  # train-00000-of-00002.parquet, or train/0000.parquet of the hub's own conversions
        split_name = file.absolute().parent.name if file.stem.isdecimal() else file.stem.partition("-")[0]
        by_split.setdefault(split_name, []).append(str(file.absolute()))
    chosen = by_split[_chosen(root, split, list(by_split))]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise of_place(error) or error from error
    with _readable(root):
        return datasets.Dataset.from_parquet(chosen, cache_dir=str(folder), keep_in_memory=False)


def _chosen(root: Path, split: str | None, splits: Sequence[str]) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None or split not in splits:
        found = "is none of them" if split else "is missing"
        raise DataError(f"{root}: has the splits {', '.join(splits) or '(none)'}; `split` ({split!r}) {found}")
    return split


@contextmanager
def _readable(root: Path) -> Iterator[None]:
    """Around opening: DataError for whatever damaged files make the library raise."""
    import datasets
    import pyarrow

    faults = (OSError, ValueError, LookupError, TypeError, AttributeError, pyarrow.ArrowException)
    try:
        yield
    except (*faults, datasets.exceptions.DatasetsError) as error:
        place = of_place(error) if isinstance(error, OSError) else None
        if place is not None:
            raise place from error
        cause = error.__cause__ or error
        raise DataError(f"{root}: cannot be read as a data set ({' '.join(str(cause).split())[:300]})") from error


def tables(dataset: Any, columns: Sequence[str]) -> Iterator[Any]:
    """Some columns as `pyarrow.Table`s of consecutive rows."""
    yield from dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=_BATCH)


def values(dataset: Any, column: str) -> list[Any]:
    """All values of a column."""
    return [value for table in tables(dataset, [column]) for value in table.column(0).to_pylist()]


def contents(dataset: Any, column: str) -> Iterator[memoryview | None]:
    """The bytes of every picture; None where there are none."""
    for table in tables(dataset, [column]):
        for value in table.column(0):
            yield content(value)


def content(value: Any) -> memoryview | None:
    """The bytes of a picture, `pyarrow`'s scalar of {bytes, path} or of bytes; None if there are none."""
    if value.is_valid and not hasattr(value, "as_buffer"):
        value = value["bytes"]
    return memoryview(value.as_buffer()) if value.is_valid else None
