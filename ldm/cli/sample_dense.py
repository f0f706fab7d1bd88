"""What --image, --noise-level, --mask, --map and --layout say to a model: conditions of plain values, a row each."""

from collections.abc import Sequence
from typing import Any

from ldm.diffusion.conditioners.low_resolution import LEVEL
from ldm.errors import ConfigError
from ldm.sampling.conditions import Condition
from ldm.sampling.dense import most_noise
from ldm.sampling.dense_files import known, picture_key, read_layouts
from ldm.sampling.pipeline import Pipeline

FLAGS = {
    "image": "--image FILE",
    "low_resolution": "--image FILE",
    "pair": "--image FILE",
    "mask": "--mask FILE",
    "masked_latent": "--image FILE and --mask FILE",
    "map": "--map FILE",
    "boxes": "--layout FILE",
    "boxes_mask": "--layout FILE",
}
"""How the command line says the columns that a model reads."""


def dense_rows(pipeline: Pipeline, options: Any) -> list[Condition]:
    """A row for each picture, mask, map or layout that the command line names; one empty row where it names none.

    Raises:
        ConfigError: the model does not read what is named, or something that it reads is missing.
        DataError: a file cannot be read.
    """
    reads = pipeline.conditioner.keys
    picture = picture_key(reads)
    for flag, key in (("map", "map"), ("layout", "boxes")):
        if getattr(options, flag) is not None and key not in reads:
            raise ConfigError(f"--{flag}: this model reads {', '.join(reads) or 'no conditions'}; leave it out")
    if options.mask is not None and picture is not None and "mask" not in reads:
        raise ConfigError(f"--mask: this model reads {', '.join(reads)} and no mask; leave it out")
    columns: dict[str, list[Any]] = {}
    if options.image is not None and picture is not None:
        columns[picture] = [known(file) for file in options.image]
    if options.mask is not None and "mask" in reads:
        columns["mask"] = [known(file) for file in options.mask]
    if options.map is not None:
        columns["map"] = [known(file) for file in options.map]
    if options.layout is not None:
        columns["boxes"] = read_layouts(options.layout, pipeline.dense)
    if options.noise_level is not None:
        columns[LEVEL] = [_noise(pipeline, options.noise_level)]
    said = {
        *columns,
        *(("masked_latent",) if "image" in columns else ()),
        *(("boxes_mask",) if "boxes" in columns else ()),
    }
    if missing := [key for key in reads if key in FLAGS and key not in said]:
        raise ConfigError(f"this model reads {', '.join(missing)}: say it with {FLAGS[missing[0]]}")
    return _rows(columns)


def _noise(pipeline: Pipeline, level: float) -> float:
    """What --noise-level says, if the model was trained with as much."""
    most = most_noise(pipeline)
    if most is None:
        raise ConfigError(f"--noise-level {level:g}: this model was trained without noise on its picture; leave it out")
    if level > most:
        raise ConfigError(f"--noise-level {level:g}: expected 0 to {most:g}, the levels of training")
    return level


def _rows(columns: dict[str, list[Any]]) -> list[Condition]:
    """As many rows as the longest column has; of columns of one, that one in each."""
    number = max(map(len, columns.values()), default=1)
    if any(len(values) not in (1, number) for values in columns.values()):
        counts = ", ".join(f"{len(values)} for {key}" for key, values in columns.items())
        raise ConfigError(f"expected as many of each kind of file, or one for all, found {counts}")
    return [{key: values[place % len(values)] for key, values in columns.items()} for place in range(number)]


def begun_with(pipeline: Pipeline, options: Any) -> tuple[Any, Any] | None:
    """The picture that sampling begins with, and its mask, of a model that does not read them as conditions.

    A model that reads a picture begins with it as well where --strength is given. None: with noise alone.

    Raises:
        ConfigError: more than one.
    """
    picture = picture_key(pipeline.conditioner.keys)
    if options.image is None or (picture is not None and options.strength is None):
        return None
    for flag in ("image", "mask"):
        if len(getattr(options, flag) or [None]) > 1:
            raise ConfigError(
                f"--{flag}: expected one file to begin with, found {len(getattr(options, flag))}: make one call of each"
            )
    return options.image[0], None if options.mask is None or picture is not None else options.mask[0]


def only_by_file(reads: Sequence[str]) -> list[str]:
    """Columns that no flag says."""
    return [key for key in reads if key not in FLAGS]
