"""Pictures of the page on disk: those that visitors begin with, and those that were made for them."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.cli.demo_models import Abilities
from ldm.cli.demo_request import Wish
from ldm.errors import ConfigError
from ldm.images import picture
from ldm.sampling.dense import Dense, check_boxes
from ldm.sampling.dense_files import class_number
from ldm.sampling.generate import Sample
from ldm.sampling.sample_folder import Order
from ldm.sampling.shown import drawn_boxes, palette
from ldm.sizes import Size, spell


@dataclass(frozen=True)
class Shown:
    """A picture of the gallery.

    Args:
        file: a PNG of the picture's own pixels.
        caption: what it is, in a few words.
        settings: how it was made, by name, as they are shown.
        command: the command line that makes it.
    """

    file: Path
    caption: str
    settings: Mapping[str, str]
    command: str


def shown(
    made: Sequence[Sample], folder: Path, wish: Wish, abilities: Abilities, model: str, command: str
) -> list[Shown]:
    """Write the pictures of one request into a new folder."""
    folder.mkdir(parents=True)
    found = []
    for sample in made:
        order = Order(sample.condition, sample.seed)
        picture(sample.image).save(folder / order.file, format="png")
        asked = described(wish, abilities)
        caption = " · ".join([*asked.values(), f"seed {sample.seed}"])
        settings = {"Model": model, **asked, "Seed": str(sample.seed), **tuned(wish, abilities)}
        settings["Size"] = spell(sample.image.shape[:2])
        found.append(Shown(folder / order.file, caption, settings, command))
    return found


def described(wish: Wish, abilities: Abilities) -> dict[str, str]:
    """What the picture should show."""
    found = {}
    if abilities.captions:
        found["Prompt"] = wish.prompt
    if abilities.classes is not None and wish.label is not None:
        found["Class"] = abilities.classes[wish.label]
    return found


def tuned(wish: Wish, abilities: Abilities) -> dict[str, str]:
    """How it was sampled; settings that change nothing are left out."""
    sampler, schedule = (
        " ".join([name, *settings.split()])
        for name, settings in ((wish.sampler, wish.sampler_settings), (wish.schedule, wish.schedule_settings))
    )
    found = {"Sampler": f"{sampler}, {wish.steps} steps"}
    if schedule != Wish.schedule:
        found["Schedule"] = schedule
    if abilities.guided:
        found["Guidance"] = f"{wish.guidance:g}"
        if wish.rescale:
            found["Rescale"] = f"{wish.rescale:g}"
        if (wish.low, wish.high) != (Wish.low, Wish.high):
            found["Guided"] = f"above {wish.low:g}" + (f", up to {wish.high}" if wish.high.strip() else "")
        if abilities.captions and wish.negative.strip():
            found["Negative prompt"] = wish.negative
    if wish.image is not None:
        began = f"{wish.image.name}, strength {wish.strength:g}"
        found |= {"Picture": wish.image.name} if abilities.picture else {"Begun with": began}
        if abilities.noise is not None:
            found["Noise level"] = f"{wish.noise:g}"
        if wish.mask is not None:
            found["Painted anew"] = f"what is white in {wish.mask.name}"
    return found


def begun(editor: Mapping[str, Any] | None, folder: Path) -> tuple[Path | None, Path | None]:
    """The editor's picture and what is painted over in it, as files that the command line reads.

    Args:
        editor: {"background", "layers"}, pictures of PIL.
        folder: where they are written, each under the hash of its content.

    Returns:
        The picture, and a mask of its size, white where something is painted; None where there is none.

    Raises:
        ConfigError: painted without a picture.
    """
    background = (editor or {}).get("background")
    layers = [np.asarray(layer.convert("RGBA"))[..., 3] > 0 for layer in (editor or {}).get("layers", ())]
    painted = np.any(layers, axis=0) if layers else np.zeros((1, 1), dtype=bool)
    if background is None:
        if painted.any():
            raise ConfigError("picture: found paint and no picture below it; choose one, or clear the canvas")
        return None, None
    file = _kept(background.convert("RGB"), folder)
    if not painted.any():
        return file, None
    mask = Image.fromarray(painted.astype(np.uint8) * 255)
    return file, _kept(mask.resize(background.size, Image.Resampling.NEAREST), folder)


def painted_map(editor: Mapping[str, Any] | None, classes: Sequence[str], size: Size, folder: Path) -> Path | None:
    """The editor's paint as a map of a model's classes, a file that the command line reads; None: nothing is painted.

    What is not painted has no class; between two colors, as at the edges of strokes, the nearer one counts.

    Args:
        editor: {"layers"}, pictures of PIL in the colors of the classes (ldm/sampling/shown.py).
        classes: of the model.
        size: (height, width) of its pictures.
        folder: where it is written, under the hash of its content.
    """
    found = np.full(size, 255, dtype=np.uint8)
    colors = palette()[: len(classes)].astype(np.int64)
    for layer in (editor or {}).get("layers", ()):
        pixels = np.asarray(layer.convert("RGBA").resize(size[::-1], Image.Resampling.NEAREST)).astype(np.int64)
        distances = np.stack([((pixels[..., :3] - color) ** 2).sum(-1) for color in colors])
        found = np.where(pixels[..., 3] > 127, distances.argmin(0), found).astype(np.uint8)
    return None if (found == 255).all() else _kept(Image.fromarray(found), folder)


def layout_of(rows: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """The filled rows of the table (class, left, top, right, bottom) as a layout's file has them.

    Raises:
        ConfigError: a corner that is no number.
    """
    found = []
    for label, *corners in rows:
        if not str(label or "").strip():
            continue
        try:
            found.append({"class": str(label).strip(), "box": [float(corner) for corner in corners]})
        except (TypeError, ValueError):
            raise ConfigError(f"box of {label}: expected four numbers from 0 to 1, found {corners}") from None
    return found


def layout_file(rows: Sequence[Sequence[Any]], folder: Path) -> Path | None:
    """The table's layout as a file that the command line reads, under the hash of its content; None: no row is filled.

    Raises:
        ConfigError: a corner that is no number.
    """
    layout = layout_of(rows)
    return _written(json.dumps(layout).encode(), ".json", folder) if layout else None


def drawn_layout(rows: Sequence[Sequence[Any]], classes: Sequence[str], size: Size) -> np.ndarray | None:
    """The table's layout as a picture (H,W,3) uint8, at least of this size; None while it is no layout yet."""
    try:
        boxes = [[*one["box"], class_number(one["class"], classes, "layout")] for one in layout_of(rows)]
        check_boxes(torch.tensor(boxes).reshape(-1, 5), "layout", Dense(box_classes=classes))
    except ConfigError:
        return None
    return drawn_boxes(boxes, size, classes)


def _kept(image: Image.Image, folder: Path) -> Path:
    data = BytesIO()
    image.save(data, format="png")
    return _written(data.getvalue(), ".png", folder)


def _written(data: bytes, ending: str, folder: Path) -> Path:
    path = folder / f"{sha256(data).hexdigest()[:16]}{ending}"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def settings_html(one: Shown) -> str:
    """The settings as a list of names and values."""
    rows = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in one.settings.items())
    return f"<dl>{rows}</dl>"


def command_html(one: Shown) -> str:
    """The command line, whose flags are not broken at a hyphen."""
    line = re.sub(r"(?<= )--?[a-z-]+", r"<span class=flag>\g<0></span>", html.escape(one.command))
    return f"<h2>The same on the command line</h2><pre>{line}</pre>"
