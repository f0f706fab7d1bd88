"""Scenes of emoji, drawn as they are read, as many as one likes, with boxes and maps that are exact.

Drawings: OpenMoji (CC BY-SA 4.0, https://openmoji.org). Install what draws them with `pip install -e .[emoji]`.
"""

import colorsys
import difflib
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ldm.data.dataset import CONVERTIBLE, Item
from ldm.data.sources.openmoji import Drawings
from ldm.errors import ConfigError
from ldm.randomness import keys
from ldm.ranges import Count, Seed

EMOJI = {
    "heart": "2764",
    "cat": "1F431",
    "dog": "1F436",
    "frog": "1F438",
    "sun": "1F31E",
    "moon": "1F319",
    "apple": "1F34E",
    "banana": "1F34C",
    "mushroom": "1F344",
    "tree": "1F333",
    "flower": "1F33B",
    "fish": "1F41F",
    "car": "1F697",
    "rocket": "1F680",
    "house": "1F3E0",
    "football": "26BD",
    "balloon": "1F388",
    "umbrella": "2602",
    "guitar": "1F3B8",
    "clock": "1F552",
}
"""What can be in a scene: name -> code. They differ in shape and color at 16 pixels."""

BACKGROUND = "background"
_VERSION = 1  # of the scenes: one more with every change of what is drawn
_SMALLEST, _LARGEST = 0.3, 0.55  # sides of emoji as parts of the picture's
_STEPS = 8  # sides that are drawn between these
_TRIES = 30
_OPAQUE = 128


class _Placed(NamedTuple):
    """An emoji in a scene: its class, the side that it is drawn at, and where its visible part lies, pixels."""

    label: int
    side: int
    left: int
    top: int
    right: int
    bottom: int


class EmojiScenes:
    """Pictures of 1 to `most` emoji that do not overlap, on a pastel background, plain, shaded, striped or checked.

    An item is a function of the seed and its number alone. It holds `boxes`, of the names in `classes`, each tight
    about the pixels of its emoji; and `map`, in which class 0 is the background and class k + 1 the k-th of `classes`.
    Where there is no room for another emoji there are fewer. For a validation set take another seed.

    Args:
        length: how many scenes.
        size: side of the pictures, pixels.
        most: emoji in a scene; as often 1 as 2, and so on.
        classes: names of `EMOJI`; None: all.
        captions: each has a caption, such as "a cat left of a heart"; False: there are none.
        seed: other scenes with each.

    Raises:
        ConfigError: an unknown class.
        DataError: a package is missing.
    """

    num_classes: int | None = None
    class_names: list[str] | None = None

    def __init__(
        self,
        length: Count = 10_000,
        size: Count = 64,
        most: Count = 4,
        classes: Sequence[str] | None = None,
        captions: bool = False,
        seed: Seed = 0,
    ) -> None:
        self.length = length
        self.size = size
        self.most = most
        self.classes = [*EMOJI] if classes is None else [*classes]
        self.with_captions = captions
        self.seed = seed
        self._drawings = Drawings("EmojiScenes")
        _demand_known(self.classes)
        self._sides = np.unique(np.rint(np.linspace(_SMALLEST, _LARGEST, _STEPS) * size).astype(int).clip(1)).tolist()
        self._drawn: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Item:
        random = self._random(index)
        scene = self._scene(random)
        pixels = _background(self.size, random)
        labels = np.zeros((self.size, self.size), np.uint8)
        for one in scene:
            drawn, where = self._emoji(one.label, one.side), np.s_[one.top : one.bottom, one.left : one.right]
            opacity = drawn[..., 3:] / 255
            pixels[where] += opacity * (drawn[..., :3] - pixels[where])
            labels[where][drawn[..., 3] >= _OPAQUE] = one.label + 1
        boxes = [(one.left, one.top, one.right, one.bottom, one.label) for one in scene]
        item: Item = {
            "image": Image.fromarray(np.rint(pixels).astype(np.uint8)),
            "map": labels,
            "boxes": np.array(boxes, np.float32).reshape(-1, 5),
        }
        if self.with_captions:
            item["caption"] = self._caption(scene)
        return item

    def aligned_keys(self) -> Sequence[str]:
        return ["map", "boxes"]

    def map_classes(self) -> list[str] | None:
        return [BACKGROUND, *self.classes]

    def box_classes(self) -> list[str] | None:
        return self.classes

    def has_captions(self) -> bool:
        return self.with_captions

    def captions(self, index: int) -> Sequence[str]:
        return [self._caption(self._scene(self._random(index)))]

    def sizes(self) -> np.ndarray | None:
        return np.full((len(self), 2), self.size, np.int64)

    def channel_choices(self) -> Sequence[int] | None:
        return CONVERTIBLE

    def path(self, index: int) -> str:
        return f"EmojiScenes[{index}]"

    def fingerprint(self) -> str:
        return _hash([*self._describe(), self.with_captions])

    def pictures_fingerprint(self) -> str:
        return _hash(self._describe())

    def captions_fingerprint(self) -> str:
        return _hash([*self._describe(), "captions"])

    def prepare(self) -> None:
        """Nothing to do: scenes are drawn as they are read."""

    def _describe(self) -> list[Any]:
        return [_VERSION, self._drawings.version, self.length, self.size, self.most, self.classes, self.seed]

    def _random(self, index: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=int(keys(self.seed, "emoji scene", index)[0])))

    def _scene(self, random: np.random.Generator) -> list[_Placed]:
        """Which emoji lie where: 1 or more, no two of which overlap."""
        placed: list[_Placed] = []
        for _ in range(int(random.integers(1, self.most, endpoint=True))):
            label = int(random.integers(len(self.classes)))
            found = next(
                (one for one in self._tries(label, random) if not any(_meet(one, old) for old in placed)), None
            )
            if found is not None:
                placed.append(found)
        return placed

    def _tries(self, label: int, random: np.random.Generator) -> Iterator[_Placed]:
        """Places for an emoji, within the picture."""
        for _ in range(_TRIES):
            side = int(random.choice(self._sides))
            height, width = self._emoji(label, side).shape[:2]
            left, top = (int(random.integers(self.size - length, endpoint=True)) for length in (width, height))
            yield _Placed(label, side, left, top, left + width, top + height)

    def _emoji(self, label: int, side: int) -> np.ndarray:
        """The visible part of an emoji, (H,W,4) uint8, kept in memory: H and W are at most `side`."""
        if (label, side) not in self._drawn:
            name = self.classes[label]
            with Image.open(io.BytesIO(self._drawings.png(EMOJI[name], name, side))) as image:
                whole = np.asarray(image.convert("RGBA"))
            visible: np.ndarray = whole[..., 3] >= _OPAQUE
            (top, bottom), (left, right) = _extent(visible.sum(1)), _extent(visible.sum(0))
            self._drawn[label, side] = whole[top:bottom, left:right]
        return self._drawn[label, side]

    def _caption(self, scene: Sequence[_Placed]) -> str:
        names = [_with_article(self.classes[one.label]) for one in scene]
        if len(scene) == 2:
            return f"{names[0]} {_relation(*scene)} {names[1]}"
        return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _demand_known(classes: Sequence[str]) -> None:
    if not classes:
        raise ConfigError(f"classes: expected names of emoji, found none; choose among {', '.join(EMOJI)}")
    for number, name in enumerate(classes):
        if name not in EMOJI:
            near = difflib.get_close_matches(str(name), EMOJI, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"classes: {name!r} is no emoji of scenes; {hint}There are {', '.join(EMOJI)}")
        if name in classes[:number]:
            raise ConfigError(f"classes: {name!r} is there twice; expected each once")


def _extent(visible: np.ndarray) -> tuple[int, int]:
    """From the first to after the last number that is not 0; one at least, of a picture too small to show anything."""
    found = np.flatnonzero(visible)
    return (int(found[0]), int(found[-1]) + 1) if len(found) else (0, 1)


def _meet(one: _Placed, other: _Placed) -> bool:
    return one.left < other.right and other.left < one.right and one.top < other.bottom and other.top < one.bottom


def _relation(one: _Placed, other: _Placed) -> str:
    """How the first lies to the second, along the axis on which their centers are further apart."""
    across = one.left + one.right - other.left - other.right
    down = one.top + one.bottom - other.top - other.bottom
    if abs(across) >= abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _background(size: int, random: np.random.Generator) -> np.ndarray:
    """(size, size, 3) float64, 0 to 255: plain, or two like colors shaded, striped or checked."""
    kind, hue, step = random.integers(4), random.random(), random.integers(4, 9) * size / 64
    light, dark = (np.array(colorsys.hsv_to_rgb(hue, *tone)) * 255 for tone in ((0.18, 1.0), (0.30, 0.92)))
    across, down = np.meshgrid(np.arange(size), np.arange(size))
    angle = random.random() * np.pi
    along = across * np.cos(angle) + down * np.sin(angle)
    amount = [
        np.zeros((size, size)),
        (along - along.min()) / max(1.0, float(np.ptp(along))),
        np.floor(along / step) % 2,
        (np.floor(across / step) + np.floor(down / step)) % 2,
    ][int(kind)]
    mixed: np.ndarray = light + amount[..., None] * (dark - light)
    return mixed


def _hash(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
