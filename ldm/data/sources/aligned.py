"""What lies on the pictures of files, from elsewhere: the contract, and files of the same name in another folder."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ldm.data import fingerprint
from ldm.data.dataset import ALIGNED
from ldm.data.sources.listing import find
from ldm.errors import ConfigError, DataError
from ldm.sizes import Size


class Values(Protocol):
    """What lies on each picture of a data set, in its order."""

    @property
    def classes(self) -> list[str] | None:
        """A name for each class that the values hold; None: they hold none."""

    @property
    def note(self) -> str:
        """What was left out, for a warning; "": nothing."""

    def of(self, index: int, size: Size) -> Any:
        """That of a picture, as an `Item` holds it.

        Args:
            index: of the picture.
            size: its height and width, pixels.

        Raises:
            DataError: it cannot be read, or does not belong on a picture of this size; names the file.
        """

    def fingerprint(self) -> str:
        """Changes with the values, not with where they are."""


@runtime_checkable
class Companion(Protocol):
    """Where such values come from: what `aligned` of `ImageFolder` and `ImageTable` lists."""

    @property
    def key(self) -> str:
        """Of an item, one of `ALIGNED`."""

    def beside(self, root: Path, pictures: Sequence[str]) -> Values:
        """The values of pictures.

        Args:
            root: folder of the pictures.
            pictures: files in it, with "/".

        Raises:
            DataError: a picture has none, or they cannot be read.
        """


def values(companions: Mapping[str, Companion] | None, root: Path, pictures: Sequence[str]) -> dict[str, Values]:
    """The values of pictures, by key, in the order of `ALIGNED`.

    Raises:
        ConfigError: a key that items do not have, or the companion of another.
        DataError: as `Companion.beside`.
    """
    companions = companions or {}
    for key, companion in companions.items():
        if key not in ALIGNED:
            raise ConfigError(f"aligned.{key}: expected one of the keys {', '.join(ALIGNED)}")
        if not isinstance(companion, Companion) or companion.key != key:
            fitting = f"; write it as aligned.{companion.key}" if isinstance(companion, Companion) else ""
            raise ConfigError(f"aligned.{key}: expected a source of `{key}`, found {type(companion).__name__}{fitting}")
    return {key: companions[key].beside(root, pictures) for key in ALIGNED if key in companions}


class FilesBeside:
    """For each picture the file of the same name in another folder, whatever its extension.

    Args:
        folder: the other one.
        what: is in it, for messages.
        root: the folder of the pictures.
        pictures: files in it, with "/".
        extensions: of the files, in lower case; None: those of all images.

    Raises:
        DataError: no folder; a picture without such a file, or with several.
    """

    def __init__(
        self, folder: Path, what: str, root: Path, pictures: Sequence[str], extensions: Sequence[str] | None = None
    ) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder of {what}s; set `root` to an existing one")
        of_stem: dict[str, list[str]] = {}
        for name in find(folder).pictures:
            stem, extension = os.path.splitext(name)
            if extensions is None or extension.casefold() in extensions:
                of_stem.setdefault(stem, []).append(name)
        found = [of_stem.get(os.path.splitext(name)[0], []) for name in pictures]
        lacking = [name for name, files in zip(pictures, found, strict=True) if not files]
        if lacking:
            expected = f"{os.path.splitext(lacking[0])[0]}{extensions[0] if extensions else '.*'}"
            raise DataError(
                f"{folder / expected}: is missing, the {what} of {root / lacking[0]}; {len(lacking)} of "
                f"{len(pictures)} pictures have none there: add them, or list the others in a table (ImageTable)"
            )
        several = next((files for files in found if len(files) > 1), None)
        if several:
            raise DataError(
                f"{folder / several[0]}: {several[1]} has the same name; expected one {what} of each picture: remove "
                "one of them"
            )
        self.folder = folder
        self.files = [files[0] for files in found]

    def path(self, index: int) -> str:
        return os.path.join(self.folder, self.files[index])

    def fingerprint(self, read_as: Sequence[Any]) -> str:
        """Covers names, sizes and samples of the files, and what decides how they are read, in plain values."""
        names, contents = self._described
        return fingerprint.join(hashlib.sha256(json.dumps([*read_as, names]).encode()).hexdigest(), contents)

    @cached_property
    def _described(self) -> tuple[list[tuple[str, int]], str]:
        states = fingerprint.stats(self.folder, self.files)
        names = [*zip(self.files, states[:, 0].tolist(), strict=True)]
        return names, fingerprint.contents(self.folder, self.files, states)


def demand_size(path: str, what: str, found: Size, expected: Size) -> None:
    """DataError unless a map or mask is as large as its picture."""
    if found != expected:
        raise DataError(
            f"{path}: a {what} of {found[1]} x {found[0]} pixels; expected {expected[1]} x {expected[0]}, those of its "
            f"picture: save it at the picture's size (a map without interpolation)"
        )
