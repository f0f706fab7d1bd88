"""A fingerprint of a data set's files from samples of their bytes: cheap, and the same for every copy.

A fingerprint has two parts, `<names>:contents:<samples>`: the names and labels of the items, and a hash over samples of
each file's bytes, so that an image replaced by another of equal name and size is noticed. Fingerprints used to be the
first part alone; what was stored with such a fingerprint remains usable, see `comparable`.

The samples of a large folder are cached in `cache/.contents/`, together with each file's size, times and inode, as git
does in its index: a file for which all of these are unchanged is not opened again. Times decide only what is read,
never the result: a copy of a folder has the fingerprint of the original. The index may be deleted. Other numbers that a
file's content decides, such as the size of a picture, are cached in the same way (`remembered`).
"""

import errno
import json
import os
import stat
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b, sha256
from pathlib import Path

import numpy as np

from ldm.errors import DataError
from ldm.files import DAMAGED_NPZ, published

INDEX = Path("cache") / ".contents"  # hidden, so that `cache/*` are latent caches
INDEX_FROM = 10_000
"""Folders with fewer files are read again each time."""

_MARK = ":contents:"
_BLOCK, _BLOCKS = 4096, 8
_THREADS, _CHUNK = 16, 1024
# A file that changes twice within one tick of the file system's clock looks unchanged, so recent ones are not trusted.
_SETTLED = 2_000_000_000
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_ENTRY = np.dtype([("key", "<u8"), ("stats", "<i8", 4), ("sample", "<u8")])


def join(names: str, contents: str) -> str:
    """The fingerprint of items from a hash of their `names` and one of their `contents`."""
    return f"{names}{_MARK}{contents}"


def parts(fingerprint: str) -> tuple[str, str]:
    """(names, `:contents:` and what follows, or nothing)."""
    names, mark, contents = fingerprint.partition(_MARK)
    return names, mark + contents


def together(*several: str) -> str:
    """One fingerprint of all of these; of one alone, itself."""
    if len(several) == 1:
        return several[0]
    names, found = zip(*map(parts, several), strict=True)
    return join(*(sha256(json.dumps(ones).encode()).hexdigest() for ones in (names, found)))


def comparable(one: str, other: str) -> tuple[str, str]:
    """Two fingerprints in the form in which they are compared and shown: equal if both may describe the same items.

    Parts that agree are left out. If one covers only names, only the names are compared.
    """
    (names, contents), (others, found) = parts(one), parts(other)
    if names != others:
        return one, other
    return (contents, found) if contents and found else ("", "")


def stats(root: Path, names: Sequence[str]) -> np.ndarray:
    """Size, modification and change time (ns) and inode of files in `root`: (N,4) int64; -1 for missing files."""
    folder = os.fspath(root)
    found = np.empty((len(names), 4), dtype=np.int64)

    def fill(start: int) -> None:
        found[start : start + _CHUNK] = [_stats(os.path.join(folder, name)) for name in names[start : start + _CHUNK]]

    with ThreadPoolExecutor(_THREADS) as pool:  # many wait in parallel on a slow disk or network
        list(pool.map(fill, range(0, len(names), _CHUNK)))
    return found


def _stats(path: str) -> tuple[int, int, int, int]:
    try:
        state = os.stat(path)
    except OSError:  # a dangling link breaks its item, not the listing
        return -1, -1, -1, -1
    # A pipe or a device has no bytes to sample, and may never answer.
    size = state.st_size if stat.S_ISREG(state.st_mode) else 0
    return size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino & (2**63 - 1)


def contents(root: Path, names: Sequence[str], states: np.ndarray) -> str:
    """Hash over samples of the files' bytes, in the given order; see `samples`."""
    return digest(samples(root, names, states))


def digest(samples: np.ndarray) -> str:
    """Hash over `samples`, or some of them, in their order."""
    return sha256(samples.astype("<u8").tobytes()).hexdigest()[:32]


def samples(root: Path, names: Sequence[str], states: np.ndarray) -> np.ndarray:
    """A hash of samples of each file's bytes, (N,) uint64.

    A file of up to 32 KB is read whole, a larger one at eight positions from its first to its last bytes. For an
    unreadable file that fact is recorded.

    Args:
        root: the data set's folder.
        names: of the files, relative to it.
        states: their `stats`.

    Raises:
        DataError: the machine is out of file handles or memory.
    """
    folder, lengths = os.fspath(root), states[:, 0].tolist()
    return remembered(root, names, states, "", lambda row: _sample(folder, names[row], lengths[row]))


def remembered(
    root: Path,
    names: Sequence[str],
    states: np.ndarray,
    kind: str,
    read: Callable[[int], int],
    show: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """What `read` makes of each file, (N,) uint64, from the index where the file is unchanged.

    Args:
        root, names, states: as for `samples`.
        kind: what it is, as the end of the index's name.
        read: row -> the number, below 2^64, that is made of the file's content alone; 0: it cannot be read. Called by
            several threads.
        show: called with (files done, files).
    """
    begun = time.time_ns()
    numbers = np.zeros(len(names), dtype=np.uint64)
    keys, unread = np.zeros(0, np.uint64), np.arange(len(names))
    index = INDEX / f"{blake2b(os.fsencode(os.path.realpath(root)), digest_size=16).hexdigest()}{kind}.npz"
    remembers = len(names) >= INDEX_FROM
    if remembers:
        keys = np.array([_short_hash(os.fsencode(name)) for name in names], dtype=np.uint64)
        known, numbers = _look_up(_read_index(index), keys, states)
        unread = np.flatnonzero(~known)
    chunks = [unread[start : start + _CHUNK] for start in range(0, len(unread), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as pool:
        for rows, values in zip(chunks, pool.map(lambda rows: [read(row) for row in rows], chunks), strict=True):
            numbers[rows] = values
            show(len(names) - len(unread) + int(np.searchsorted(unread, rows[-1])) + 1, len(names))
    if remembers and numbers[unread].any():
        # What could not be read may have been unavailable only for a moment.
        sure = (states[:, 1:3].max(1) < begun - _SETTLED) & (numbers != 0)
        _write_index(index, keys[sure], states[sure], numbers[sure])
    return numbers


def remembered_array(files: Sequence[str], kind: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """What `make` makes of the content of some files, from the index where all of them are unchanged.

    Args:
        files: their paths.
        kind: what it is; another array of the same files is of another kind.
        make: called once if need be; its array holds no objects.
    """
    begun = time.time_ns()
    paths = [os.path.realpath(file) for file in files]
    states = stats(Path(), paths)
    index = INDEX / f"{blake2b(os.fsencode(os.pathsep.join([kind, *paths])), digest_size=16).hexdigest()}.npz"
    try:
        with np.load(index) as archive:
            if np.array_equal(archive["states"], states):
                kept: np.ndarray = archive["array"]
                return kept
    except (*DAMAGED_NPZ, KeyError):
        pass
    array = make()
    if (states[:, 1:3] < begun - _SETTLED).all():
        _write(index, states=states, array=array)
    return array


def _sample(root: str, name: str, size: int) -> int:
    """Hash of some of a file's bytes; 0 if they cannot be read."""
    if size < 0:
        return 0
    path = os.path.join(root, name)
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return sample(size, lambda place, length: os.pread(file, length, place))
        finally:
            os.close(file)
    except OSError as error:
        if error.errno in _EXHAUSTED:
            raise DataError(f"{path}: cannot be read: {error.strerror}; raise the limit (ulimit -n)") from error
        return 0


def sample(size: int, read: Callable[[int, int], bytes | memoryview]) -> int:
    """Hash of some of `size` bytes: all of up to 32 KB, otherwise at eight positions from the first to the last.

    Args:
        size: how many there are.
        read: (position, length) -> bytes.
    """
    if size <= _BLOCK * _BLOCKS:
        return _short_hash(read(0, size))
    return _short_hash(b"".join([read(place * (size - _BLOCK) // (_BLOCKS - 1), _BLOCK) for place in range(_BLOCKS)]))


def _short_hash(data: bytes | memoryview) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def _look_up(index: np.ndarray, keys: np.ndarray, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which files match the index (sorted by key), (N,) bool, and their samples, (N,) uint64, else 0."""
    if not len(index):
        return np.zeros(len(keys), dtype=bool), np.zeros(len(keys), dtype=np.uint64)
    found = index[np.searchsorted(index["key"], keys).clip(max=len(index) - 1)]
    known = (found["key"] == keys) & (found["stats"] == states).all(1)
    return known, np.where(known, found["sample"], np.uint64(0))


def _read_index(file: Path) -> np.ndarray:
    try:
        with np.load(file) as archive:
            entries: np.ndarray = archive["entries"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return np.zeros(0, dtype=_ENTRY)
    return entries if entries.dtype == _ENTRY else np.zeros(0, dtype=_ENTRY)


def _write_index(file: Path, keys: np.ndarray, states: np.ndarray, samples: np.ndarray) -> None:
    """Best effort: without it everything is read again next time."""
    entries = np.empty(len(keys), dtype=_ENTRY)
    entries["key"], entries["stats"], entries["sample"] = keys, states, samples
    entries.sort(order="key")
    _write(file, entries=entries)


def _write(index: Path, **arrays: np.ndarray) -> None:
    with suppress(OSError):
        index.parent.mkdir(parents=True, exist_ok=True)
        with published(index, durable=False) as aside, aside.open("wb") as handle:
            np.savez(handle, allow_pickle=False, **arrays)
