"""What an importer makes of a foreign checkpoint: a first stage or a denoiser in our terms, not yet on disk."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config.load import build
from ldm.config.randomness import STANDARD
from ldm.interop.sources import Source

BATCH_SIZE = 8
"""Of the training that a converted run is configured for."""
RUN = "<run folder>"
"""Stands for the run folder in the parameters of a model, whose folder has no name yet."""


@dataclass(frozen=True)
class Request:
    """What the command line says about a conversion, where the file does not.

    Attributes:
        autoencoder: first stage of a denoiser that comes without one: run folder, checkpoint or folder of diffusers.
        resolution: of the images, pixels; None: what the file or its family says.
        statistics: file with the latents' mean and standard deviation per channel; None: the family's own.
        text_encoder: folder of the text encoder and its tokenizer that a model of captions was trained with; of one
            that holds its encoder, its tokenizer, which may be a file.
        picture_encoder: folder of the vision model that a model of pictures' features was trained with.
        family: which of the kinds of `Family.kinds`, where a file does not tell.
    """

    autoencoder: Path | None = None
    resolution: int | None = None
    statistics: Path | None = None
    text_encoder: Path | None = None
    family: str | None = None
    picture_encoder: Path | None = None


@dataclass(frozen=True)
class Origin:
    """Where a model comes from, in plain values, for its checkpoint's facts and its run folder.

    Attributes:
        family: what the file was recognized as.
        license: of the weights, as given; "unknown" if nothing says.
        dropped: {reason: number of tensors} of what has no place in our model.
        notes: what a person should know, a sentence each.
    """

    family: str
    license: str = "unknown"
    dropped: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class FirstStage:
    """An autoencoder.

    Attributes:
        name: of its run.
        params: of AutoencoderKL: nodes of encoder, decoder, loss, and quantizer where there is one; of the optimizer,
            where the original's is known.
        weights: of these parts, by our names: `encoder.conv_in.weight`, `loss.discriminator...`.
        resolution: of the images it was trained on, pixels.
        statistics: {"mean", "std"} of its latents per channel, as models on it are trained: z = (latent - mean) / std.
            A scale factor is 1 / std and a shift the mean. They become the run's facts and `Codec.statistics`, in the
            place of what validation would measure. None: nothing says.
        source: what its weights are of; None: of the file that is converted.
    """

    name: str
    params: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    resolution: int
    origin: Origin
    statistics: Mapping[str, Any] | None = None
    source: Source | None = None


@dataclass(frozen=True)
class Denoiser:
    """A diffusion model.

    Attributes:
        name: of its run.
        params: of LatentDiffusion: nodes of network, conditioner, objective; and label_dropout. A text that begins with
            `RUN` is a path in its run folder.
        weights: `network...`, `conditioner...`, of the last step.
        average: the same of the moving average; None: the file has one set of weights alone, which is used as both.
        mean, std: of the latents per channel, as the model was trained: z = (latent - mean) / std.
        size: (height, width) of the latents.
        first_stage: that of the same file; None: it is another run (`Request.autoencoder`).
        pixels: it denoises the images themselves and has no first stage.
        write_files: writes what else is kept in its run folder; None: nothing.
        latents: the manifest that the checkpoint held, of a model of ours; None: the rest of this describes them.
        objective: the weights of its objective, such as those of a learned weighting.
        data: parameters of the data module, beside those that every run has: `aligned`, `drawn`, `masked`.
        randomness: the section of a model of ours, so that its samples stay the same.
    """

    name: str
    params: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None
    mean: Sequence[float]
    std: Sequence[float]
    size: tuple[int, int]
    origin: Origin
    first_stage: FirstStage | None = None
    pixels: bool = False
    write_files: Callable[[Path], None] | None = None
    latents: Mapping[str, Any] | None = None
    objective: Mapping[str, Tensor] = field(default_factory=dict)
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    randomness: Mapping[str, Any] = field(default_factory=lambda: STANDARD)


Converted = FirstStage | Denoiser


@dataclass(frozen=True)
class Family:
    """One kind of checkpoint.

    Attributes:
        name: for messages.
        marks: for each way in which such a file is known: what must all be in it, names of tensors, or `class NAME` for
            the class that a folder's config.json names.
        convert: makes our models of it.
        takes: fields of `Request` that it reads; any other that is given is refused.
        kinds: words for `Request.family`, if its files do not tell for themselves what they are.
    """

    name: str
    marks: Sequence[Sequence[str]]
    convert: Callable[[Source, Request], Sequence[Converted]]
    takes: Sequence[str]
    kinds: Sequence[str] = ()

    def likeness(self, names: set[str]) -> float:
        """The share of the marks that are there, of the way that fits best: 1 is this family."""
        return max(_share(marks, names) for marks in self.marks)

    def missing(self, names: set[str]) -> list[str]:
        """The marks that are not there, of the way that fits best."""
        return [mark for mark in max(self.marks, key=lambda marks: _share(marks, names)) if mark not in names]


def _share(marks: Sequence[str], names: set[str]) -> float:
    return sum(mark in names for mark in marks) / len(marks)


def node(target: str, **params: Any) -> dict[str, Any]:
    """A configuration's node of a class of ldm."""
    return {"target": f"ldm.{target}", "params": params}


def on_meta(made: Mapping[str, Any]) -> nn.Module:
    """What a node builds, without memory for its weights."""
    with torch.device("meta"):
        module: nn.Module = build(made)
    return module


def shapes(made: Mapping[str, Any]) -> dict[str, torch.Size]:
    """{name of a tensor: its shape} of what a node builds; no memory is taken."""
    return {name: tensor.shape for name, tensor in on_meta(made).state_dict().items()}


def part_shapes(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, torch.Size]:
    """The same of several nodes, each under the name of its part: `encoder.conv_in.weight`."""
    return {f"{part}.{name}": shape for part, made in parts.items() for name, shape in shapes(made).items()}
