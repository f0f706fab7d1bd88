"""From a foreign checkpoint to a run folder: the families that can be converted, told apart by their tensors' names."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ldm.errors import CheckpointError
from ldm.interop import compvis_first_stage, own_export, runs, sources
from ldm.interop.models import Family, Request
from ldm.interop.sources import Source

__all__ = ["FAMILIES", "Request", "convert", "recognized"]


FAMILIES: Sequence[Family] = (own_export.FAMILY, compvis_first_stage.FAMILY)
"""The first that fits is taken: what is part of another's file comes after it."""


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
    for model in recognized(source).convert(source, request):
        if license is not None:
            model = replace(model, origin=replace(model.origin, license=license))
        for folder in runs.write(model, source, request, logdir, name):
            yield f"{folder.path}  from {source.path.name} ({model.origin.family}; license: {model.origin.license})"


def recognized(source: Source) -> Family:
    """The family of a checkpoint.

    Raises:
        CheckpointError: it is of none; says what was looked for, and which is the nearest.
    """
    names = {*source.tensors, *(f"class {name}" for name in _classes(source))}
    for family in FAMILIES:
        if family.likeness(names) == 1:
            return family
    nearest = max(FAMILIES, key=lambda family: family.likeness(names))
    looked_for = "\n".join(
        f"  {family.name}: {'; or '.join(', '.join(marks) for marks in family.marks)}" for family in FAMILIES
    )
    near = f" The nearest is {nearest.name}." if nearest.likeness(names) > 0 else ""
    raise CheckpointError(
        f"{source.path}: of no family that is known here ({len(source.tensors)} tensors, the first is "
        f"{next(iter(source.tensors), 'none')}).{near} Looked for:\n{looked_for}"
    )


def _classes(source: Source) -> list[str]:
    """`_class_name` of a folder's config.json; of a pipeline's parts with the part before it: `unet UNet2DModel`."""
    own = source.config.get("_class_name")
    parts = {part: tree for part, tree in source.config.items() if isinstance(tree, dict)}
    return [own] if own else [f"{part} {tree['_class_name']}" for part, tree in parts.items() if "_class_name" in tree]
