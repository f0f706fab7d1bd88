"""Shards: large files that hold many items each. How they are named, and how pieces of local ones are read."""

import errno
import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

from ldm.data.sources.handles import Handle, Handles
from ldm.data.sources.listing import natural
from ldm.errors import ConfigError, DataError, ResourceError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class Shard(NamedTuple):
    """A file as it was when it was looked at.

    Attributes:
        location: a path or a URL.
        size: bytes.
        version: changes with the contents: the modification time in ns, or what a server says, such as an ETag.
    """

    location: str
    size: int
    version: str


class Shards(Protocol):
    """What reads shards, wherever they lie."""

    def find(self, patterns: Sequence[str]) -> list[Shard]:
        """The files that the patterns name, braces already expanded, in their order; within one, in natural order."""

    def read(self, shard: Shard, offset: int, length: int) -> bytes:
        """A piece. Raises ResourceError if it cannot be read or is not there: no other item may take its place."""

    def whole(self, shard: Shard) -> AbstractContextManager[Path]:
        """A local file of the shard within the block."""

    def demand_unchanged(self, shard: Shard) -> None:
        """ResourceError if the file is another than it was when it was looked at."""

    def prepare(self, shards: Sequence[Shard]) -> None:
        """Called once per machine before pieces are read."""


def is_url(location: str) -> bool:
    """Whether it names a file behind a protocol, such as https://, rather than a path."""
    return "://" in location


def braces(pattern: str) -> list[str]:
    """`{008..010}.tar` -> 008.tar, 009.tar, 010.tar; `{a,b}.tar` -> a.tar, b.tar.

    Raises:
        ConfigError: what is in braces is neither.
    """
    parts = _BRACES.split(pattern)  # text and contents of braces, in turn
    choices = [_choices(part, pattern) if place % 2 else [part] for place, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(inside: str, pattern: str) -> list[str]:
    if "," in inside:
        return inside.split(",")
    if (found := _RANGE.fullmatch(inside)) is None or int(found[1]) > int(found[2]):
        raise ConfigError(
            f"{pattern}: expected a range such as {{000..099}} or a list such as {{a,b}}, found {{{inside}}}"
        )
    width = len(found[1]) if found[1].startswith("0") else 0
    return [str(number).zfill(width) for number in range(int(found[1]), int(found[2]) + 1)]


def expanded(shards: str | Sequence[str]) -> list[str]:
    """Paths, URLs and globs of a data set's parameter, with braces expanded and in the given order.

    Raises:
        ConfigError: there are none, one is named twice, or paths and URLs are mixed.
    """
    names = [name for pattern in ([shards] if isinstance(shards, str) else shards) for name in braces(str(pattern))]
    if not names:
        raise ConfigError('`shards` names no file; expected one such as "/data/{000..099}.tar", or a list of them')
    if len({is_url(name) for name in names}) > 1:
        raise ConfigError(f"`shards` mixes paths and URLs ({names[0]}, ...): name one kind, and use two data sets")
    return names


def demand_distinct(shards: Sequence[Shard]) -> None:
    """ConfigError where a shard is named twice: its items would count double."""
    seen: set[str] = set()
    for shard in shards:
        if shard.location in seen:
            raise ConfigError(f"{shard.location}: is named twice in `shards`; name it once")
        seen.add(shard.location)


class LocalShards:
    """Files of this machine or of a disk that it sees."""

    def __init__(self) -> None:
        self._handles = Handles()

    def find(self, patterns: Sequence[str]) -> list[Shard]:
        """Raises DataError naming a file that is not there, or a glob that matches nothing."""
        paths = []
        for pattern in patterns:
            found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True), key=natural)
            if not found:
                raise DataError(
                    f"{pattern}: no such shard; set `shards` to files that exist, or a glob that finds some"
                )
            paths += found
        return [self._state(os.path.abspath(path)) for path in paths]

    def _state(self, path: str) -> Shard:
        state = os.stat(path)
        if not os.path.isfile(path):
            raise DataError(f"{path}: expected a file, found a folder or a device; name its files: {path}/*.tar")
        return Shard(path, state.st_size, str(state.st_mtime_ns))

    def read(self, shard: Shard, offset: int, length: int) -> bytes:
        path = Path(shard.location)
        try:
            handle = self._handles.get(path) or self._handles.put(path, Handle(path))
            return handle.read(offset, length)
        except OSError as error:
            refuse(shard.location, error)

    def demand_unchanged(self, shard: Shard) -> None:
        """ResourceError if the file is another than it was when it was looked at."""
        try:
            found = self._state(shard.location)
        except (OSError, DataError):
            found = Shard(shard.location, -1, "")
        if found != shard:
            changed(shard.location)

    @contextmanager
    def whole(self, shard: Shard) -> Iterator[Path]:
        yield Path(shard.location)

    def prepare(self, shards: Sequence[Shard]) -> None:
        """Nothing to do: the files are there."""


def refuse(location: str, error: OSError) -> NoReturn:
    """A fault of the machine: replacing the item would make the run depend on it."""
    fix = "raise the limit (ulimit -n)" if error.errno in (errno.EMFILE, errno.ENFILE) else "see that it can be read"
    raise ResourceError(f"{location}: cannot be read: {error.strerror}; {fix} and start again") from error


def changed(location: str) -> NoReturn:
    """A shard is not what it was at the start."""
    raise ResourceError(
        f"{location}: was changed or removed while it was in use. Start again: it is then read anew, and a resumed run "
        "says whether its items are others"
    )
