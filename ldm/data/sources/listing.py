"""Which files of a folder are images, in which order, and which are left out: never silently."""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from PIL import Image

from ldm.errors import DataError

# Of the formats that Pillow opens, those for images: no documents, videos, icons or arrays. AVIF and JPEG 2000 are
# included if Pillow was built with their libraries.
_FORMATS = frozenset(
    {"AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP"}
)
_NO_PICTURES = frozenset({".pfm"})  # floating-point maps, which are registered as PPM


def _extensions() -> frozenset[str]:
    known = Image.registered_extensions()  # fills Image.OPEN as well
    return frozenset(e for e, kind in known.items() if kind in _FORMATS & Image.OPEN.keys()) - _NO_PICTURES


EXTENSIONS = _extensions()
"""Extensions of files that count as images, in lower case."""

# Images in formats that are not supported: a class that holds nothing else would be lost.
_UNREADABLE = frozenset(
    {
        *(".avif", ".avifs", ".exr", ".hdr", ".heic", ".heif", ".hif", ".j2k", ".jp2", ".jxl", ".jxr", ".pfm", ".psd"),
        *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".raw", ".rw2"),
        *(".dcm", ".dicom", ".fits", ".nii"),
    }
)
_NUMBER = re.compile(r"([0-9]+)")
_SYSTEM = frozenset({"lost+found"})  # at the root of a disk, readable only by its owner


@dataclass
class Listing:
    """The files of a folder, relative to it with "/", in natural order (2 before 10).

    Attributes:
        pictures: files with one of the `EXTENSIONS`, in any case.
        texts: .txt files.
        others: all other files.
        folders: the folders directly in it, without hidden ones.
        hidden: hidden files and folders; what is in a hidden folder is not counted.
        circles: links to a folder that contains them, which are not followed.
    """

    pictures: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    circles: list[str] = field(default_factory=list)

    def ignored(self) -> list[str]:
        """All files except the images, and hidden folders."""
        return [*self.others, *self.texts, *self.hidden]

    def left_out(self, used: Collection[str] = ()) -> str:
        """What is neither an image nor one of the `used` text files, by kind; "" if there is nothing."""
        notes = [describe([*self.others, *(text for text in self.texts if text not in used), *self.hidden])]
        if self.circles:
            notes.append(f"{len(self.circles)} links to a folder that contains them ({self.circles[0]})")
        return ", ".join(filter(None, notes))


def find(root: Path) -> Listing:
    """List a folder to any depth, following links.

    Raises:
        DataError: a folder that cannot be read, or a dangling link in `root` that looks like one to a folder.
    """
    listing = Listing()
    inside: dict[str, tuple[list[str], list[str]]] = {}  # by "" or "folder/": the names of its folders and files
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_unreadable):
        place = Path(folder).relative_to(root).as_posix()
        prefix = "" if place == "." else f"{place}/"
        subfolders[:] = _followed(folder, subfolders, prefix, listing)
        if not prefix:
            listing.folders = sorted(subfolders, key=natural)
        listing.hidden += [prefix + name for name in files if name.startswith(".")]
        inside[prefix] = subfolders, [name for name in files if not name.startswith(".")]
    kinds = dict.fromkeys(EXTENSIONS, listing.pictures) | {".txt": listing.texts}
    for name in _in_order("", inside):
        kinds.get(_extension(name), listing.others).append(name)
    _demand_no_lost_folder(root, listing)
    return listing


def _in_order(prefix: str, inside: Mapping[str, tuple[list[str], list[str]]]) -> Iterator[str]:
    """The files in a folder, at any depth, in `natural` order, which is that of each folder's own names in turn."""
    folders, files = inside[prefix]
    keys = {name: _parts(name) for name in files}
    if not folders:
        yield from (prefix + name for name in sorted(files, key=lambda name: (keys[name], name)))
        return
    keys |= {name: _parts(name) for name in folders}
    alike = Counter(map(repr, keys.values()))
    if len(alike) < len(keys):  # such as A/ and a/, whose files mix
        below = [name for folder in folders for name in _in_order(f"{prefix}{folder}/", inside)]
        yield from sorted([*below, *(prefix + name for name in files)], key=natural)
        return
    apart = set(folders)
    for name in sorted(keys, key=keys.__getitem__):
        if name in apart:
            yield from _in_order(f"{prefix}{name}/", inside)
        else:
            yield prefix + name


def _unreadable(error: OSError) -> NoReturn:
    raise DataError(
        f"{error.filename}: this folder cannot be read ({error.strerror}), so its images would be missing. "
        "Permit reading it, or hide it with a name that starts with a dot"
    ) from error


def _followed(folder: str, subfolders: Sequence[str], prefix: str, listing: Listing) -> list[str]:
    """The subfolders to descend into; the others are recorded."""
    here = os.path.realpath(folder)
    followed = []
    for name in subfolders:
        if name.startswith(".") or name in _SYSTEM:
            listing.hidden.append(prefix + name)
        elif f"{here}/".startswith(os.path.realpath(os.path.join(folder, name)) + "/"):
            # A link to a folder that contains it would be followed forever.
            listing.circles.append(prefix + name)
        else:
            followed.append(name)
    return followed


def _demand_no_lost_folder(root: Path, listing: Listing) -> None:
    """A class folder that is a link to an unmounted disk is listed as a file without extension."""
    for name in listing.others:
        path = root / name
        if "/" not in name and not _extension(name) and path.is_symlink() and not path.exists():
            raise DataError(f"{path}: this link is dangling ({os.readlink(path)}); fix or remove it")


def demand_no_lost_class(root: Path, listing: Listing, classes: Sequence[str]) -> str:
    """A note on folders in `root` that are not among `classes` since they hold no images; "" if there are none.

    Raises:
        DataError: one holds images, but only in unsupported formats.
    """
    ignored: dict[str, list[str]] = {name: [] for name in listing.folders if name not in set(classes)}
    for name in listing.ignored() if ignored else ():
        if (top := name.split("/")[0]) in ignored:
            ignored[top].append(name)
    for folder, names in ignored.items():
        lost = [name for name in names if _extension(name) in _UNREADABLE]
        if lost:
            raise DataError(
                f"{root / folder}: holds 0 images that can be read, but {describe(lost)}: the class would be missing. "
                "Convert them, or hide the folder with a name that starts with a dot. "
                f"Supported formats: {' '.join(sorted(EXTENSIONS))}"
            )
    named = [f"{folder} ({describe(names) or 'empty'})" for folder, names in ignored.items()]
    more = f" and {len(named) - 10} more" if len(named) > 10 else ""
    return f"folders without images do not become classes: {', '.join(named[:10])}{more}" if named else ""


def describe(names: Iterable[str]) -> str:
    """Counts of files by kind, the most frequent first: `12 .json, 3 hidden, 1 without extension`; "" for none."""
    kinds = Counter(
        "hidden" if os.path.basename(name).startswith(".") else _extension(name) or "without extension"
        for name in names
    )
    return ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items(), key=lambda k: (-k[1], k[0])))


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].casefold()


def natural(name: str) -> tuple[list[list[str | int]], str]:
    """Natural sort key: 2 before 10; folder by folder; case only breaks ties."""
    return [_parts(part) for part in name.split("/")], name


def _parts(name: str) -> list[str | int]:
    """Texts and the numbers between them, in turn."""
    return [int(part) if place % 2 else part for place, part in enumerate(_NUMBER.split(name.casefold()))]
