"""Folders of diffusers as models of ours: one network beside its config.json, or a pipeline of several.

    vae + unet + text_encoder    StableDiffusionPipeline       vae + transformer    DiTPipeline
    vqvae + unet                 LDMPipeline                   unet                 DDPMPipeline, DDIMPipeline: pixels

and those that `ldm export --to diffusers` writes, which say themselves how their latents are scaled and which class
stands for none.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.config.load import build
from ldm.errors import CheckpointError, ConfigError
from ldm.interop import statistics
from ldm.interop.diffusers_models import autoencoder, dit
from ldm.interop.diffusers_models.networks import CLASSES, UNETS, Imported, imported
from ldm.interop.diffusers_models.schedulers import objective_from
from ldm.interop.models import RUN, Denoiser, Family, FirstStage, Origin, Request, node
from ldm.interop.sources import Source

NAME = "diffusers model"
_NETWORKS, _FIRST_STAGES = ("unet", "transformer"), ("vae", "vqvae")
_OURS = "LatentDiffusionPipeline"
_LABEL_DROPOUT = 0.1
"""Of the published models that know no class, or the empty text."""
_PIXELS = ("DDPMPipeline", "DDIMPipeline")


def convert(source: Source, request: Request) -> Sequence[Denoiser]:
    """The denoiser of a folder, with the first stage of the same pipeline."""
    index = source.rest.get("model_index", {})
    part = next((name for name in _NETWORKS if isinstance(source.config.get(name), Mapping)), "")
    config, tensors = _part(source, part)
    settings = index if _class(index) == _OURS else {}
    if settings.get("norm_groups") or settings.get("patch_size", 1) != 1:
        raise ConfigError(
            f"{source.path / 'model_index.json'}: norm_groups, patch_size: its pipeline.py changes how its networks "
            f"compute, which their config.json does not say; bring back what --to safetensors wrote of this model"
        )
    where = str(source.path / part / "config.json")
    found = imported(
        config,
        tensors,
        where,
        f"{source.path / part} (diffusers' {config['_class_name']})",
        no_class=settings.get("num_classes") is not None,
        class_tokens=bool(settings.get("class_tokens")),
    )
    _check_classes(source, settings, config.get("num_class_embeds"), part)
    sizes = found.params["network"]["params"]
    if sizes["spatial_channels"]:
        raise ConfigError(
            f"{where}: in_channels, out_channels: its network reads a picture of {sizes['spatial_channels']} channels "
            f"besides the latent, which no conditioner of this folder makes; convert the original model's file"
        )
    first = _first_stage(source, request)
    pixels = first is None and (_class(index) in _PIXELS or (bool(settings) and "vae" not in source.config))
    conditioner, weights, write_files = _conditioner(source, request, found, settings, where)
    objective = _objective(source, settings, where)
    mean, std = _scale(first, settings, sizes["in_channels"], str(source.path / "model_index.json"))
    nulls = found.knows_null or conditioner["target"].endswith("FrozenText")
    return [
        Denoiser(
            name=source.name,
            params={
                "network": found.params["network"],
                "conditioner": conditioner,
                "objective": objective,
                "label_dropout": _LABEL_DROPOUT if nulls else 0.0,
            },
            weights=weights,
            average=None,
            mean=mean,
            std=std,
            size=_size(config, request, first, pixels, where),
            origin=Origin(NAME, dropped=found.dropped, notes=found.notes),
            first_stage=first,
            pixels=pixels,
            write_files=write_files,
        )
    ]


def _class(index: Mapping[str, Any]) -> str:
    """Of a pipeline; one that a folder carries itself is a pair, the file and the class."""
    name = index.get("_class_name", "")
    return str(name[-1] if isinstance(name, list) and name else name)


def _check_classes(source: Source, settings: Mapping[str, Any], rows: int | None, part: str) -> None:
    """ConfigError unless a pipeline of ours has one class fewer than its table has rows."""
    classes = settings.get("num_classes")
    if classes is not None and rows is not None and classes != rows - 1:
        raise ConfigError(
            f"{source.path / 'model_index.json'}: num_classes={classes!r}: expected {rows - 1}, one fewer than "
            f"num_class_embeds in {part}/config.json, the last row of which is that of no class"
        )


def _part(source: Source, part: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors of a pipeline's network; "": the folder is the network's own."""
    config = dict(source.config[part] if part else source.config)
    if config["_class_name"] == "Transformer2DModel":  # which DiTTransformer2DModel was a part of
        config["_class_name"] = dit.NAME
    if config["_class_name"] not in CLASSES:
        raise CheckpointError(
            f"{source.path / part}: _class_name={config['_class_name']!r}: expected one of {', '.join(CLASSES)}"
        )
    return config, source.part(f"{part}.") if part else dict(source.tensors)


def _first_stage(source: Source, request: Request) -> FirstStage | None:
    part = next((name for name in _FIRST_STAGES if isinstance(source.config.get(name), Mapping)), None)
    if part is None:
        return None
    if request.autoencoder is not None:
        raise ConfigError(f"{source.path}: holds its first stage, {part}; leave out --autoencoder")
    config = source.config[part]
    if config.get("_class_name") not in autoencoder.DEFAULTS:
        raise CheckpointError(
            f"{source.path / part}: _class_name={config.get('_class_name')!r}: expected one of "
            f"{', '.join(autoencoder.DEFAULTS)}"
        )
    return autoencoder.first_stage(source.part(f"{part}."), config, source, request, part)


def _scale(
    first: FirstStage | None, settings: Mapping[str, Any], channels: int, where: str
) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the latents: as our own pipeline says, else as the first stage does."""
    if not settings:
        found = {} if first is None or first.statistics is None else first.statistics
        return found.get("mean", [0.0] * channels), found.get("std", [1.0] * channels)
    mean, std = (settings.get(key) for key in ("latents_mean", "latents_std"))
    for values in (mean, std):
        if not isinstance(values, list) or len(values) != channels or any(type(one) is not float for one in values):
            raise ConfigError(f"{where}: latents_mean, latents_std: expected {channels} numbers each, found {values!r}")
    assert mean is not None
    assert std is not None
    statistics.check(mean, std, channels, where)
    return mean, std


def _conditioner(
    source: Source, request: Request, found: Imported, settings: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], Mapping[str, Tensor], Callable[[Path], None] | None]:
    """The node of the conditioner, all weights, and what writes the text encoder into the run folder."""
    context, classes = found.params["network"]["params"].get("context_dim"), found.params.get("conditioner")
    if context is None or (classes is not None and classes["target"].endswith("ClassToken")):
        assert classes is not None
        return classes, found.weights, None
    text, folder = source.config.get("text_encoder", {}), source.path / "text_encoder"
    if request.text_encoder is None and text.get("model_type") is None:
        raise ConfigError(
            f"{where}: cross_attention_dim={context}: its network reads the tokens of a text encoder, and this folder "
            f"holds none of transformers. Name the one it was trained with: --text-encoder DIR"
        )
    given = {"channels": context}
    if request.text_encoder is None:
        limit = settings.get("max_length") or text.get("max_position_embeddings")
        given |= {} if limit is None else {"max_length": limit}
        encoder = f"{RUN}/text_encoder"
    else:
        encoder = str(request.text_encoder)
    captions = node("diffusion.conditioners.text.FrozenText", encoder=encoder, **given)
    write = None if request.text_encoder is not None else _copies(folder)
    if classes is None:
        return captions, found.weights, write
    both = node("diffusion.conditioners.joint.Joint", conditioners={"classes": classes, "captions": captions})
    names = {"conditioner.table.weight": "conditioner.conditioners.classes.table.weight"}
    return both, {names.get(name, name): one for name, one in found.weights.items()}, write


def _copies(encoder: Path) -> Callable[[Path], None]:
    """Writes the text encoder and its tokenizer into a run folder."""

    def write(run: Path) -> None:
        for folder in (encoder, encoder.with_name("tokenizer")):
            if folder.is_dir():
                shutil.copytree(folder, run / folder.name)

    return write


def _objective(source: Source, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Of the pipeline's scheduler, also where its network alone was named."""
    inside, beside = (folder / "scheduler" / "scheduler_config.json" for folder in (source.path, source.path.parent))
    config = source.config.get("scheduler")
    if config is None and beside.is_file():
        try:
            config = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{beside}: cannot be read as a scheduler's description: {error}") from error
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"{where}: nothing says on which noise levels it was trained: expected scheduler/scheduler_config.json in "
            f"the pipeline's folder. Name that folder, with its model_index.json"
        )
    file = str(inside if "scheduler" in source.config else beside)
    objective = objective_from(config, file, settings.get("timestep_scale", 1.0))
    try:
        build(objective)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    return objective


def _size(
    config: Mapping[str, Any], request: Request, first: FirstStage | None, pixels: bool, where: str
) -> tuple[int, int]:
    """(height, width) of the latents."""
    factor = 1 if first is None else 2 ** (len(first.params["encoder"]["params"]["channel_mult"]) - 1)
    if request.resolution is not None and (first is not None or pixels):
        if request.resolution % factor:
            raise ConfigError(f"--resolution: expected a multiple of {factor}, found {request.resolution}")
        return request.resolution // factor, request.resolution // factor
    size = config.get("sample_size", dit.DEFAULTS["sample_size"] if config["_class_name"] == dit.NAME else None)
    sides = size if isinstance(size, list) and len(size) == 2 else [size, size]
    if all(type(side) is int and side > 0 for side in sides):
        return sides[0], sides[1]
    fix = "say it: --resolution PIXELS" if first is not None or pixels else "write it there"
    raise ConfigError(f"{where}: sample_size={size!r}: expected the side of its latents; {fix}")


FAMILY = Family(
    name=NAME,
    marks=(
        *((f"class {name}",) for name in (*CLASSES, "Transformer2DModel")),
        *((f"class unet {name}",) for name in UNETS),
        *((f"class transformer {name}",) for name in (dit.NAME, "Transformer2DModel")),
    ),
    convert=convert,
    takes=("autoencoder", "resolution", "text_encoder"),
)
