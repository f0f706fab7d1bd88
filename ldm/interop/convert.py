"""Converts foreign checkpoints to run folders. A checkpoint's family is recognized by the names of its tensors."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

from ldm.errors import CheckpointError, ConfigError
from ldm.interop import edm2, runs, sources, tiny_autoencoder
from ldm.interop.compvis import first_stage as compvis_first_stage
from ldm.interop.compvis import model as compvis_model
from ldm.interop.diffusers_models import autoencoder as diffusers_autoencoder
from ldm.interop.diffusers_models import folder as diffusers_folder
from ldm.interop.dit import model as dit
from ldm.interop.exports import own_format
from ldm.interop.models import Converted, Family, FirstStage, Request
from ldm.interop.sources import Source

__all__ = ["FAMILIES", "Request", "convert", "recognized"]


FAMILIES: Sequence[Family] = (
    own_format.FAMILY,
    compvis_model.FAMILY,
    compvis_first_stage.FAMILY,
    tiny_autoencoder.FAMILY,
    diffusers_folder.FAMILY,
    diffusers_autoencoder.FAMILY,
    dit.FAMILY,
    edm2.FAMILY,
)
"""The first that fits is taken: what is part of another's file comes after it."""
_SHOWN = 4
"""Names of tensors in a message."""


def convert(
    path: Path, request: Request, *, config: Path | None, license: str | None, name: str | None, logdir: Path
) -> Iterator[str]:
    """Write a run folder for each model in a checkpoint; yields a line for each.

    Args:
        path: file or folder (ldm/interop/sources.py).
        config: the description that belongs to it; None: what lies beside it.
        license: of the weights; None: what the family says, or "unknown".
        name: of the run; None: that of the file.
        logdir: where the run folders go.

    Raises:
        CheckpointError: it cannot be read, is of no known family, or does not fit the one whose marks it has.
        ConfigError: something that it takes besides the file is missing.
    """
    source = sources.read(path, config)
    family = recognized(source)
    _check_request(path, family, request)
    for model in family.convert(source, request):
        for folder in runs.write(_licensed(model, license), source, request, logdir, name):
            origin = json.loads(folder.origin_file.read_text(encoding="utf-8"))
            yield f"{folder.path}  from {origin['source']} ({origin['family']}; license: {origin['license']})"


def _check_request(path: Path, family: Family, request: Request) -> None:
    """ConfigError for what is asked and would be ignored."""
    if request.family not in (None, *family.kinds):
        kinds = f"one of {', '.join(family.kinds)}" if family.kinds else "no --family, since such a file tells its own"
        raise ConfigError(f"{path}: is a {family.name}; expected {kinds}, found --family {request.family}")
    for one in fields(Request):
        if one.name not in ("family", *family.takes) and getattr(request, one.name) is not None:
            raise ConfigError(
                f"{path}: is a {family.name}, of which --{one.name.replace('_', '-')} says nothing; leave it out"
            )


def _licensed(model: Converted, license: str | None) -> Converted:
    """Under this license, with the first stage out of the same file; as they are if it is None."""
    if license is None:
        return model
    model = replace(model, origin=replace(model.origin, license=license))
    if isinstance(model, FirstStage) or model.first_stage is None or model.first_stage.source is not None:
        return model
    first = model.first_stage
    return replace(model, first_stage=replace(first, origin=replace(first.origin, license=license)))


def recognized(source: Source) -> Family:
    """The family of a checkpoint.

    Raises:
        CheckpointError: it is of none; says which is the nearest, and what it lacks of that.
    """
    classes = _classes(source)
    names = {*source.tensors, *(f"class {name}" for name in classes)}
    for family in FAMILIES:
        if family.likeness(names) == 1:
            return family
    nearest = max(FAMILIES, key=lambda family: family.likeness(names))
    near = ""
    if nearest.likeness(names) > 0:
        near = f" The nearest is {nearest.name}, which would also have {', '.join(nearest.missing(names))}."
    found = ", ".join([*source.tensors][:_SHOWN]) or "none"
    raise CheckpointError(
        f"{source.path}: of no family that is known here. It has {_kinds(classes)}"
        f"{len(source.tensors)} tensors: {found}{', ...' if len(source.tensors) > _SHOWN else ''}.{near} Known are: "
        f"{', '.join(family.name for family in FAMILIES)}."
    )


def _kinds(classes: Sequence[str]) -> str:
    return f"the class {' and '.join(classes)}, and " if classes else ""


def _classes(source: Source) -> list[str]:
    """`_class_name` of a folder's config.json; of a pipeline's parts with the part before it: `unet UNet2DModel`."""
    own = source.config.get("_class_name")
    parts = {part: tree for part, tree in source.config.items() if isinstance(tree, dict)}
    return [own] if own else [f"{part} {tree['_class_name']}" for part, tree in parts.items() if "_class_name" in tree]
