"""What a visitor asks for, as a command line of sample.py: read, checked and carried out as if it had been typed.

So a picture of the page is that of the command, and a setting that cannot be gets the command's own message.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm.cli.demo_line import Ticket, watched
from ldm.cli.demo_models import Abilities
from ldm.cli.options import FLOAT32, called
from ldm.cli.sample import Recipe, named_functions, read_once, samples, steering
from ldm.cli.sample_conditions import chosen_classes, requested
from ldm.cli.sample_options import parse
from ldm.errors import ConfigError
from ldm.sampling.generate import Sample
from ldm.sampling.pipeline import Pipeline
from ldm.sampling.sample_folder import Order

_SETTING = re.compile(r"[A-Za-z_]\w*=[-+.\w]+")
"""Of a sampler or a schedule, as a visitor may write it: never a flag, nor an object of a configuration."""

Number = int | float | None
"""A control's number; None where the visitor has emptied it."""


@dataclass(frozen=True)
class Wish:
    """The controls of the page. Those that the chosen model does not have are ignored.

    Args:
        label: the class.
        sampler_settings, schedule_settings: such as "eta=0.5", several with spaces between them.
        width, height: of the pictures, pixels; both None: of the training pictures.
        low, high: the interval of guidance; `high` empty: without end.
        image, mask: files of the picture to begin with, or that the model reads, and of what is painted anew in it.
        noise: the level of noise on the picture that the model reads.
        map, layout: files of what a model of maps or layouts reads.
    """

    prompt: str = ""
    negative: str = ""
    label: int | None = None
    sampler: str = "ddim"
    sampler_settings: str = ""
    schedule: str = "default"
    schedule_settings: str = ""
    steps: Number = 50
    guidance: Number = 1.0
    rescale: Number = 0.0
    low: Number = 0.0
    high: str = ""
    seed: Number = 0
    number: Number = 4
    width: Number = None
    height: Number = None
    image: Path | None = None
    mask: Path | None = None
    strength: Number = 0.6
    noise: Number = 0.0
    map: Path | None = None
    layout: Path | None = None


@dataclass(frozen=True)
class Constants:
    """The flags of `ldm demo` that every command line has as well."""

    device: str | None = None
    raw: bool = False
    trust: tuple[str, ...] = ()
    lora: Path | None = None
    lora_scale: float | None = None
    precision: str = FLOAT32
    autoencoder: Path | None = None

    def words(self) -> list[str]:
        words = ["--raw"] if self.raw else []
        if self.autoencoder is not None:
            words += _flag("autoencoder", str(self.autoencoder))
        if self.device is not None:
            words += _flag("device", self.device)
        if self.lora is not None:
            words += _flag("lora", str(self.lora))
        if self.lora_scale is not None:
            words += _flag("lora-scale", _text(self.lora_scale))
        if self.precision != FLOAT32:
            words += _flag("precision", self.precision)
        return words + [word for package in self.trust for word in _flag("trust", package)]


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for, since all others wait for it.

    Args:
        steps: of the sampler.
        pictures: at once: one batch, so that a stop waits for few.
        side: of the pictures, pixels; None: twice the longest side of what the model was trained on.
    """

    steps: int = 1000
    pictures: int = 64
    side: int | None = None

    def of(self, abilities: Abilities) -> "Limits":
        """For this model."""
        return replace(self, side=self.side or 2 * max(abilities.longest_side, *abilities.size))

    def require(self, options: Any) -> None:
        """ConfigError, naming it, if a command line asks for more."""
        for what, found, most in (("steps", options.steps, self.steps), ("pictures", options.number, self.pictures)):
            if found > most:
                raise ConfigError(f"{what}: expected {most} at most on this page, found {found}")
        self.require_size(options.size)

    def require_size(self, size: Sequence[int] | None) -> None:
        """ConfigError for pictures of more pixels, whether the visitor or a picture of theirs asks for them."""
        if self.side is not None and size is not None and max(size) > self.side:
            raise ConfigError(f"width and height: expected {self.side} at most on this page, found {max(size)}")


def words(wish: Wish, abilities: Abilities, constants: Constants) -> list[str]:
    """The arguments of sample.py that make what the wish says, with the checkpoint itself as the run.

    Raises:
        ConfigError: no class is chosen of a model that reads them, or a sampler's settings are none.
    """
    found = _flag("run", abilities.checkpoint, short="-r")
    if abilities.captions:
        found += _flag("prompt", wish.prompt)
    if abilities.classes is not None:
        found += _flag("classes", _class(wish.label, abilities.classes))
    found += _flag("seed", _text(wish.seed)) + _flag("number", _text(wish.number), short="-n")
    found += _flag("steps", _text(wish.steps))
    found += _function("sampler", wish.sampler, wish.sampler_settings, Wish.sampler)
    found += _function("schedule", wish.schedule, wish.schedule_settings, Wish.schedule)
    size = wish.height, wish.width
    if size not in ((None, None), abilities.size):
        found += ["--size", _text(wish.height), _text(wish.width)]
    if abilities.guided:
        found += _guidance(wish, abilities)
    if wish.image is not None and (abilities.begins or abilities.picture):
        found += _flag("image", str(wish.image))
        found += [] if wish.mask is None else _flag("mask", str(wish.mask))
        found += [] if abilities.picture else _flag("strength", _text(wish.strength))
        if abilities.noise is not None and wish.noise != abilities.noise[0]:
            found += _flag("noise-level", _text(wish.noise))
    if wish.map is not None and abilities.map_classes is not None:
        found += _flag("map", str(wish.map))
    if wish.layout is not None and abilities.box_classes is not None:
        found += _flag("layout", str(wish.layout))
    return found + constants.words()


def _function(flag: str, name: str, settings: str, default: str) -> list[str]:
    """A sampler or a schedule with its settings; nothing if it is the default."""
    given = settings.split()
    if wrong := [word for word in given if not _SETTING.fullmatch(word)]:
        raise ConfigError(f"{flag} settings: expected name=number, such as eta=0.5, found {wrong[0]!r}")
    return _flag(flag, name) + given if given or name != default else []


def _guidance(wish: Wish, abilities: Abilities) -> list[str]:
    found = _flag("guidance", _text(wish.guidance))
    if wish.rescale != Wish.rescale:
        found += _flag("rescale", _text(wish.rescale))
    if (wish.low, wish.high) != (Wish.low, Wish.high):
        found += ["--interval", _text(wish.low), wish.high.strip() or "inf"]
    if abilities.captions and wish.negative.strip():
        found += _flag("negative", wish.negative)
    return found


def _class(label: int | None, names: Sequence[str]) -> str:
    """A class by its name, where the command line reads that as this class, else by its number."""
    if label is None:
        raise ConfigError("class: expected one of the list, found none; choose one")
    if not 0 <= label < len(names):
        raise ConfigError(f"class {label}: expected 0 to {len(names) - 1}, the {len(names)} classes of this model")
    try:
        plain = chosen_classes([names[label]], len(names), names) == [label]
    except ConfigError:
        plain = False
    return names[label] if plain and not names[label].startswith("-") else str(label)


def _flag(name: str, value: str, short: str | None = None) -> list[str]:
    """A flag and its value, as one word where the value looks like a flag."""
    return [f"--{name}={value}"] if value.startswith("-") else [short or f"--{name}", value]


def _text(number: Number) -> str:
    if number is None:
        return ""
    return str(int(number)) if float(number).is_integer() else repr(number)


def command(arguments: Sequence[str]) -> str:
    """The line to type into a shell."""
    program = called("scripts/sample.py", "sample")
    return shlex.join([*(["python", program] if program.endswith(".py") else program.split()), *arguments])


def checked(arguments: Sequence[str], limits: Limits = Limits()) -> Any:
    """The options of sample.py, within the limits.

    Raises:
        ConfigError: with what a visitor can do something about.
    """
    try:
        options = parse(arguments)
    except ConfigError as error:
        raise ConfigError(str(error).partition("\nSee `")[0]) from error
    limits.require(options)
    return options


def carried_out(pipeline: Pipeline, options: Any, ticket: Ticket, limits: Limits = Limits()) -> list[Sample]:
    """The pictures that the command line asks for.

    Raises:
        ConfigError: settings that cannot be for this model, or, by a small picture, too large a result.
        Halted: the request was stopped.
    """
    if options.image is not None:
        ticket.say("Reading the picture")  # torchvision takes seconds to be imported
    sampler, schedule = named_functions(options)
    conditions = requested(pipeline, options)
    recipe = Recipe(watched(sampler, ticket), schedule, *steering(pipeline, options, str(pipeline.device), conditions))
    limits.require_size(recipe.size)
    seeds = range(options.seed, options.seed + options.number)
    orders = [Order(condition, seed) for condition in conditions for seed in seeds]
    ticket.say("Sampling")
    return [*samples(pipeline, orders, options, recipe, read_once(pipeline, conditions, recipe.size))]
