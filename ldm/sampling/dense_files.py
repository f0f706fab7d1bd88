"""Dense conditions from files: what samples.json says of them, and the arrays that `generate` takes.

In a condition of plain values a picture, a mask or a map is {"file": path, "sha256": hash}, or its path alone, and
`boxes` are lists of numbers.
"""

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.dataset import Picture
from ldm.data.decoding import image_size, read_array, read_image, read_indices
from ldm.data.value_range import checked
from ldm.errors import ConfigError, DataError
from ldm.sampling.conditions import Condition
from ldm.sampling.dense import Dense, check_boxes, low_factor
from ldm.sampling.shown import labels_of
from ldm.sizes import Size, spell

if TYPE_CHECKING:
    from ldm.data.transforms import EvalTransform
    from ldm.sampling.pipeline import Pipeline

PICTURES = ("image", "pair", "low_resolution", "mask", "map")
"""The keys of a condition that name files."""

Plain = dict[str, Any]


def known(file: Path | str) -> dict[str, str]:
    """A file as records have it: its name and its hash.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return {"file": str(file), "sha256": sha256(Path(file).read_bytes()).hexdigest()}
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error


def is_file(value: Any) -> bool:
    """Whether a condition's value is a file as `known` says it."""
    return isinstance(value, Mapping) and value.keys() == {"file", "sha256"}


def recorded(condition: Condition) -> Condition:
    """A condition of plain values, whose files are said with their hash."""
    return {
        key: known(value) if key in PICTURES and isinstance(value, str) else value for key, value in condition.items()
    }


def picture_key(reads: Sequence[str]) -> str | None:
    """The key of a condition under which a model that reads these columns is given its picture; None: it reads none."""
    if "masked_latent" in reads or "image" in reads:
        return "image"
    return next((key for key in ("low_resolution", "pair") if key in reads), None)


def natural_size(pipeline: "Pipeline", conditions: Sequence[Condition]) -> Size | None:
    """The size of samples, if none is asked for, that small pictures are made into; None: conditions name none.

    Raises:
        ConfigError: they differ in size, or cannot be made that many times larger.
    """
    files = [one["low_resolution"]["file"] for one in conditions if is_file(one.get("low_resolution"))]
    sizes = {_size_of(Path(file)): file for file in files}
    if len(sizes) > 1:
        (first, one), (second, other), *_ = sizes.items()
        raise ConfigError(
            f"low_resolution: expected pictures of one size, {one} has {spell(first)} pixels and {other} "
            f"{spell(second)}: make them in two calls, or say the size of all samples, --size"
        )
    factor, divided = low_factor(pipeline), pipeline.codec.down_factor
    for (height, width), file in sizes.items():
        size = height * factor, width * factor
        if size[0] % divided or size[1] % divided:
            raise ConfigError(
                f"low_resolution: {file}: {factor} times its {spell((height, width))} pixels are {spell(size)}, "
                f"expected multiples of the autoencoder's down factor {divided}: say the nearest, --size "
                f"{' '.join(str(max(1, side // divided) * divided) for side in size)}"
            )
        return size
    return None


def read(pipeline: "Pipeline", condition: Condition, size: Size | None) -> Condition:
    """The condition with arrays in place of the files that it names; others as they are.

    Args:
        size: (height, width) of the samples; None: that of the training images.

    Raises:
        ConfigError: a file that does not fit the others, or the samples.
        DataError: one that cannot be read.
    """
    files = {key: Path(value["file"]) for key, value in condition.items() if key in PICTURES and is_file(value)}
    if not files:
        return condition
    whole, found = pipeline.image_size(size), dict(condition)
    for key in ("image", "pair"):
        if key in files:
            found[key] = _pixels(pipeline, files[key], whole, None if key == "pair" else _channels(pipeline))
    if "low_resolution" in files:
        found["low_resolution"] = _small(pipeline, files["low_resolution"], whole)
    if "mask" in files:
        found["mask"] = _mask(pipeline, files["mask"], files.get("image"), whole)
    if "map" in files:
        found["map"] = _map(pipeline, files["map"], files.get("image"), whole)
    return found


def _size_of(file: Path) -> Size:
    """Of a picture, or of an array (H,W,C)."""
    if file.suffix != ".npy":
        return image_size(file)
    height, width = read_array(file).shape[:2]
    return height, width


def _channels(pipeline: "Pipeline") -> int:
    channels: int = pipeline.manifest.plan.pixels["channels"]
    return channels


def _transform(pipeline: "Pipeline", size: Size) -> "EvalTransform":
    # Imported here: torchvision loads torch's compiler, half of a sampler's start, and only pictures need it.
    from ldm.data.transforms import EvalTransform

    return EvalTransform(size, pipeline.manifest.plan.pixels.get("interpolation", "bicubic"))


def _pixels(pipeline: "Pipeline", file: Path, size: Size, channels: int | None) -> Tensor:
    """A picture, resized and cropped as training images were: (C,H,W); channels None: color."""
    from ldm.data.transforms import transformed

    value_range = checked(pipeline.manifest.plan.pixels.get("value_range"))
    picture: Picture
    if file.suffix == ".npy":
        picture = read_array(file)
    else:
        picture = read_image(file, value_range=value_range, keep_alpha=True)
    return transformed(picture, _transform(pipeline, size), 3 if channels is None else channels, str(file))


def _small(pipeline: "Pipeline", file: Path, size: Size) -> Tensor:
    """A picture of low resolution, for samples of `size`."""
    factor, (height, width) = low_factor(pipeline), size
    found = _size_of(file)
    if found[0] > height or found[1] > width:
        raise ConfigError(
            f"low_resolution: {file}: {spell(found)} pixels are more than the {spell(size)} that are to "
            f"be made of it: expected about {spell((height // factor, width // factor))}; leave --size out for samples "
            f"{factor} times as large as the picture, or name a smaller picture"
        )
    return _pixels(pipeline, file, (height // factor, width // factor), _channels(pipeline))


def _mask(pipeline: "Pipeline", file: Path, image: Path | None, size: Size) -> Tensor:
    """(1,H,W) float32, 1 where the file is not black."""
    from ldm.data.transforms import transformed

    stencil = read_image(file)
    if image is not None:
        _same_size(file, (stencil.height, stencil.width), image)
    hole = transformed(stencil, _transform(pipeline, size), 1, str(file)) > 0
    if not bool(hole.any()):
        raise ConfigError(f"{file}: all of it is black, so there is nothing to paint anew; white is what may change")
    return hole.float()


def _same_size(file: Path, found: Size, image: Path) -> None:
    if found != (wanted := _size_of(image)):
        raise ConfigError(
            f"{file}: expected the size of {image}, {wanted[1]} x {wanted[0]}, found {found[1]} x {found[0]}"
        )


def _map(pipeline: "Pipeline", file: Path, image: Path | None, size: Size) -> Tensor:
    """(H,W) of the type that training maps have."""
    numbers = read_map(file)
    if image is not None:
        _same_size(file, (numbers.shape[0], numbers.shape[1]), image)
    classes = pipeline.dense.num_map_classes
    most = 255 if classes is None else classes
    none = np.isin(numbers, (255,) if most <= 255 else (65535,))
    if (unknown := np.argwhere(~none & (numbers >= most))).size:
        row, column = unknown[0].tolist()
        raise ConfigError(
            f"{file}: the pixel in row {row}, column {column} has class {numbers[row, column]}; expected 0 to "
            f"{most - 1}, the {most} classes of this model, or {255 if most <= 255 else 65535} for none"
        )
    kind = np.uint8 if most <= 255 else np.int16
    values = np.where(none, 255 if most <= 255 else -1, numbers).astype(kind)
    return torch.from_numpy(_transform(pipeline, size).labels(values))


def read_map(file: Path) -> np.ndarray:
    """The class of each pixel, (H,W) int64: of a palette or gray PNG its numbers, of a map in our own colors these.

    Raises:
        DataError: it cannot be read, or has other colors.
    """
    try:
        with Image.open(file) as image:
            if image.mode in ("L", "P", "1") or image.mode.startswith("I"):
                return read_indices(file)
            found = labels_of(np.asarray(image.convert("RGB")))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: cannot be read as an image ({type(error).__name__}: {error})") from error
    if found is None:
        raise DataError(
            f"{file}: expected a PNG of classes, with a palette or gray, or in the colors of ldm/sampling/shown.py: "
            "save the number of each pixel's class"
        )
    return found.astype(np.int64)


def read_layouts(file: Path, dense: Dense) -> list[list[list[float]]]:
    """The layouts of a JSON file, each as `boxes`.

    One layout is a list of {"class": name or number, "box": [left, top, right, bottom]}, in fractions of the picture,
    or, with {"size": [width, height], "boxes": [...]} around it, in pixels of a picture of that size. Several layouts
    are a list of them.

    Raises:
        ConfigError: it holds anything else, a box outside of the picture, an unknown class, no box, or too many.
    """
    what = f"--layout {file}"
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{what}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{what}: not a JSON file: {error}") from error
    several = isinstance(found, list) and bool(found) and not any(_is_box(one) for one in found)
    layouts = found if several else [found]
    return [
        _layout(layout, f"{what}: layout {number}" if several else what, dense) for number, layout in enumerate(layouts)
    ]


def _is_box(value: Any) -> bool:
    return isinstance(value, dict) and "size" not in value


def _layout(layout: Any, what: str, dense: Dense) -> list[list[float]]:
    sides = [1.0, 1.0]
    if isinstance(layout, dict) and layout.keys() == {"size", "boxes"}:
        sides, layout = layout["size"], layout["boxes"]
        if not _numbers(sides, 2) or min(sides) <= 0:
            raise ConfigError(f"{what}: size: expected [width, height] in pixels, found {sides!r}")
    if not isinstance(layout, list):
        raise ConfigError(f'{what}: expected a list of {{"class": ..., "box": [...]}}, found {type(layout).__name__}')
    if not layout:
        raise ConfigError(f"{what}: holds no box; say at least one")
    boxes = []
    for number, one in enumerate(layout):
        if not isinstance(one, dict) or one.keys() != {"class", "box"} or not _numbers(one["box"], 4):
            raise ConfigError(
                f'{what}: box {number}: expected {{"class": name or number, "box": [left, top, right, bottom]}}, found '
                f"{json.dumps(one)[:100]}"
            )
        corners = [float(corner) / side for corner, side in zip(one["box"], [*sides, *sides], strict=True)]
        boxes.append([*corners, float(class_number(one["class"], dense.box_classes, f"{what}: box {number}"))])
    check_boxes(torch.tensor(boxes, dtype=torch.float64), what, dense)
    return boxes


def _numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(one, int | float) and not isinstance(one, bool) for one in value)
    )


def class_number(word: Any, names: Sequence[str] | None, what: str) -> int:
    """A class that is said by its name or number; ConfigError, beginning with `what`, for an unknown name."""
    if isinstance(word, int) and not isinstance(word, bool):
        return word
    numbers = {name.casefold(): label for label, name in enumerate(names or ())}
    label = numbers.get(str(word).casefold())
    if label is None and str(word).isdecimal():
        return int(word)
    if label is None:
        near = get_close_matches(str(word).casefold(), numbers, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names or ()) or 'no names'}."
        raise ConfigError(f"{what}: there is no class {word!r}; {hint}")
    return label
