"""Which files of a folder are pictures, in which order, and what is left out of it: never anything silently."""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from PIL import Image

from ldm.errors import DataError

# Of all that Pillow opens, the formats that hold pictures: no documents, videos, icons or arrays. AVIF and JPEG 2000
# are among them where Pillow was built with their libraries.
_FORMATS = frozenset(
    {"AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP"}
)
_NO_PICTURES = frozenset({".pfm"})  # floating-point maps, which are registered as PPM


def _extensions() -> frozenset[str]:
    known = Image.registered_extensions()  # fills Image.OPEN as well
    return frozenset(e for e, kind in known.items() if kind in _FORMATS & Image.OPEN.keys()) - _NO_PICTURES


EXTENSIONS = _extensions()
"""Extensions of files that are taken for pictures, in small letters."""

# Pictures that are not read here: a class that holds nothing else would be lost.
_UNREADABLE = frozenset(
    {
        *(".avif", ".avifs", ".exr", ".hdr", ".heic", ".heif", ".hif", ".j2k", ".jp2", ".jxl", ".jxr", ".pfm", ".psd"),
        *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".raw", ".rw2"),
        *(".dcm", ".dicom", ".fits", ".nii"),
    }
)
_SYSTEM = frozenset({"lost+found"})  # at the top of a disk, readable by its owner alone


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
        """All files but the pictures, and hidden folders."""
        return [*self.others, *self.texts, *self.hidden]

    def left_out(self, used: Collection[str] = ()) -> str:
        """What is neither a picture nor one of the `used` text files, by kind; "" if there is nothing."""
        told = [describe([*self.others, *(text for text in self.texts if text not in used), *self.hidden])]
        if self.circles:
            told.append(f"{len(self.circles)} links to a folder that contains them ({self.circles[0]})")
        return ", ".join(filter(None, told))


def find(root: Path) -> Listing:
    """List a folder to any depth, following links.

    Raises:
        DataError: a folder that cannot be read, or a link in `root`, as to a folder, that leads nowhere.
    """
    listing = Listing()
    names: list[str] = []
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_unreadable):
        inside = Path(folder).relative_to(root).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        subfolders[:] = _followed(folder, subfolders, prefix, listing)
        if not prefix:
            listing.folders = sorted(subfolders, key=natural)
        for name in files:
            (listing.hidden if name.startswith(".") else names).append(prefix + name)
    names.sort(key=natural)
    for name in names:
        extension = _extension(name)
        if extension in EXTENSIONS:
            listing.pictures.append(name)
        else:
            (listing.texts if extension == ".txt" else listing.others).append(name)
    _demand_no_lost_folder(root, listing)
    return listing


def _unreadable(error: OSError) -> NoReturn:
    raise DataError(
        f"{error.filename}: this folder cannot be read ({error.strerror}), so its pictures would be missing. "
        "Permit reading it, or hide it by a name that begins with a dot"
    ) from error


def _followed(folder: str, subfolders: Sequence[str], prefix: str, listing: Listing) -> list[str]:
    """The subfolders to go into; the others are noted."""
    here = os.path.realpath(folder)
    followed = []
    for name in subfolders:
        if name.startswith(".") or name in _SYSTEM:
            listing.hidden.append(prefix + name)
        elif f"{here}/".startswith(os.path.realpath(os.path.join(folder, name)) + "/"):
            # A link to a folder that contains it would be walked for ever.
            listing.circles.append(prefix + name)
        else:
            followed.append(name)
    return followed


def _demand_no_lost_folder(root: Path, listing: Listing) -> None:
    """A class folder that is a link to a disk which is not mounted is listed as a file without extension."""
    for name in listing.others:
        path = root / name
        if "/" not in name and not _extension(name) and path.is_symlink() and not path.exists():
            raise DataError(f"{path}: this link leads nowhere ({os.readlink(path)}); mend or remove it")


def demand_no_lost_class(root: Path, listing: Listing, classes: Sequence[str]) -> str:
    """What to say about folders in `root` that are none of `classes` since no picture is in them; "" if there are none.

    Raises:
        DataError: one holds pictures, but in formats that are not read here.
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
                "Convert them, or hide the folder by a name that begins with a dot. "
                f"Formats that are read: {' '.join(sorted(EXTENSIONS))}"
            )
    told = [f"{folder} ({describe(names) or 'empty'})" for folder, names in ignored.items()]
    more = f" and {len(told) - 10} more" if len(told) > 10 else ""
    return f"no class is made of folders without images: {', '.join(told[:10])}{more}" if told else ""


def describe(names: Iterable[str]) -> str:
    """Counts of files by kind, the most frequent first: `12 .json, 3 hidden, 1 without extension`; "" of none."""
    kinds = Counter(
        "hidden" if os.path.basename(name).startswith(".") else _extension(name) or "without extension"
        for name in names
    )
    return ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items(), key=lambda k: (-k[1], k[0])))


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].casefold()


def natural(name: str) -> tuple[list[list[str | int]], str]:
    """Sort key that counts: 2 before 10; folder by folder; capitals decide ties only."""
    folders = [re.split(r"([0-9]+)", part.casefold()) for part in name.split("/")]
    return [[int(p) if i % 2 else p for i, p in enumerate(parts)] for parts in folders], name
