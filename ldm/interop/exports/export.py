"""From a run to a folder that others load: the formats, and a folder that is whole or absent."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from safetensors import SafetensorError

from ldm import errors, files
from ldm.errors import ConfigError, ResourceError
from ldm.interop import lora
from ldm.interop.diffusers_models import pipeline as diffusers_pipeline
from ldm.interop.exports import card, lora_format, merged_format, onnx_format, safetensors_format, torch_format
from ldm.interop.exports.trained import Trained
from ldm.interop.exports.usage import Choices, Usage, optional_packages

__all__ = ["FORMATS", "Choices", "Usage", "check", "export"]

Write = Callable[[Trained, Path, Choices], Usage]
"""Writes a model's files into an empty folder; returns how others load them, for the model card."""


def _merged(write: Write) -> Write:
    """Of a format without adapters: one that a model has is added to its weights first."""

    def merge_and_write(model: Trained, out: Path, choices: Choices) -> Usage:
        if model.diffusion is not None:
            lora.merge(model.diffusion.denoiser["network"])
        return write(model, out, choices)

    return merge_and_write


FORMATS: Mapping[str, Write] = {
    "safetensors": _merged(safetensors_format.write),
    "onnx": _merged(onnx_format.write),
    "torch": _merged(torch_format.write),
    "diffusers": _merged(diffusers_pipeline.write),
    "lora": lora_format.write,
    "merged": merged_format.write,
}
"""{--to NAME: what writes it}."""


def check(format: str, out: Path, force: bool) -> Write:
    """What writes a format, before anything is loaded.

    Raises:
        ConfigError: there is no such format; `out` exists, and `force` is not given, or it is no exported folder; a
            package is missing.
    """
    if format not in FORMATS:
        near = get_close_matches(format, FORMATS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(FORMATS)}."
        raise ConfigError(f"--to {format}: unknown format: {hint}")
    if out.exists() and not force:
        raise ConfigError(f"--out {out}: is already there; name another folder, or have it replaced with --force")
    if out.exists() and not card.written_by_us(out) and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {out}: --force replaces folders of `ldm export` alone, and this is another; name one")
    with optional_packages("ldm export"):
        import huggingface_hub  # noqa: F401  # of the model card
    return FORMATS[format]


def export(model: Trained, format: str, out: Path, choices: Choices, *, force: bool = False) -> Iterator[str]:
    """Write the folder; yields a line for each file, and one for all of them.

    Args:
        model: what is written.
        format: one of FORMATS.
        out: the folder.
        force: replace it, if it is there.

    Raises:
        ConfigError: what `check` refuses, a package is missing, or the format has no place for such a model.
        ResourceError: the folder cannot be written; what was there is there still.
    """
    write = check(format, out, force)
    with _published(out) as aside:
        _check_space(model, aside)
        card.write(model, choices, write(model, aside, choices), aside)
        _as_readable_as_the_card(aside)
    yield from listed(out)


def listed(folder: Path) -> Iterator[str]:
    """A line for each file of a folder, with its size, and one for all of them."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in found:
        yield f"  {path.relative_to(folder)}  {spelled(path.stat().st_size)}"
    yield f"{folder}: {len(found)} files, {spelled(sum(path.stat().st_size for path in found))}"


def spelled(size: int) -> str:
    """A number of bytes as people read it: 512 bytes, 3.4 kB, 1.2 GB."""
    power = min(3, (len(str(size)) - 1) // 3)
    return f"{size} bytes" if power == 0 else f"{size / 1000**power:.1f} {('kB', 'MB', 'GB')[power - 1]}"


def _as_readable_as_the_card(folder: Path) -> None:
    """safetensors writes files that their owner alone can read, whatever the umask says."""
    mode = (folder / card.NAME).stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _check_space(model: Trained, folder: Path) -> None:
    needed = sum(one.nbytes for module in model.modules.values() for one in module.state_dict().values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"{folder.parent}: the weights are {spelled(needed)}, and {spelled(free)} are free. Make room, or name "
            f"another place with --out"
        )


@contextmanager
def _published(out: Path) -> Iterator[Path]:
    """An empty folder to write into; `out` is then there with all of it, or as it was before."""
    aside = files.temporary(out.absolute())
    try:
        aside.mkdir(parents=True)
        yield aside
        if out.exists():
            before = aside.with_name(f"{aside.name}.before")
            out.rename(before)
            try:
                aside.rename(out)
            except BaseException:
                before.rename(out)
                raise
            shutil.rmtree(before)
        else:
            aside.rename(out)
    except (OSError, SafetensorError) as error:
        known = errors.of_place(error) if isinstance(error, OSError) and error.filename else None
        raise known or ResourceError(f"{out}: cannot be written ({error}). Make room, or name another place") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
