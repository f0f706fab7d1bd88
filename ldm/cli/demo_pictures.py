"""Pictures of the page on disk: those that visitors begin with, and those that were made for them."""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.cli.demo_models import Abilities
from ldm.cli.demo_request import Wish
from ldm.errors import ConfigError
from ldm.images import picture
from ldm.sampling.generate import Sample
from ldm.sampling.sample_folder import Order
from ldm.sizes import spell


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
        found["Begun with"] = f"{wish.image.name}, strength {wish.strength:g}"
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


def _kept(image: Image.Image, folder: Path) -> Path:
    data = BytesIO()
    image.save(data, format="png")
    path = folder / f"{sha256(data.getvalue()).hexdigest()[:16]}.png"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.getvalue())
    return path


def settings_html(one: Shown) -> str:
    """The settings as a list of names and values."""
    rows = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in one.settings.items())
    return f"<dl>{rows}</dl>"


def command_html(one: Shown) -> str:
    """The command line, whose flags are not broken at a hyphen."""
    line = re.sub(r"(?<= )--?[a-z-]+", r"<span class=flag>\g<0></span>", html.escape(one.command))
    return f"<h2>The same on the command line</h2><pre>{line}</pre>"
