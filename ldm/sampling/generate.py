"""From seeds and classes to pictures: the one way samples are made, for previews, evaluation and scripts/sample.py.

    checkpoint -> denoiser, objective, codec -> guided denoiser -> sampler -> codec.decode -> uint8

An image depends on its seed and its class alone: not on the batch it was made in, its neighbours or their order. (Up
to float rounding: a batch of another size may take another matrix kernel, which moves a pixel by one level at most.)
The starting noise is drawn on the CPU, so that a seed names the same picture on every machine.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ldm.diffusion.objectives import Objective
from ldm.errors import ConfigError, NumericError
from ldm.randomness import Draws
from ldm.runtime.progress import shown
from ldm.sampling.guidance import Denoiser, Guidance
from ldm.sampling.img2img import InitImage, inpaint
from ldm.sampling.pipeline import Pipeline
from ldm.sampling.samplers import ddim, start
from ldm.sampling.timesteps import Default, TimestepSchedule

UNGUIDED = Guidance()

SEED = 0
"""Of every generation: the images' own seeds take the place of sample numbers."""


class Sampler(Protocol):
    """From `x` (N,c,h,w) at times[0] to data of that shape; see samplers.py."""

    def __call__(
        self, denoise: Denoiser, objective: Objective, x: Tensor, times: Tensor, *, draws: Draws
    ) -> Tensor: ...


class Sample(NamedTuple):
    """A picture and what it was made from: `image` (H,W,C) uint8, C = 1 or 3; `label` None: of no class."""

    seed: int
    label: int | None
    image: np.ndarray


def generate(
    pipeline: Pipeline,
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    *,
    sampler: Sampler = ddim,
    steps: int = 50,
    schedule: TimestepSchedule | None = None,
    guidance: Guidance = UNGUIDED,
    init_image: InitImage | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Iterator[Sample]:
    """One picture for each seed, in order.

    Args:
        seeds: any integers of 64 bits; the same seed gives the same starting noise, whatever the class.
        labels: as many classes, each in [0, num_classes); None: of no class, also from a conditional model.
        sampler: such as `ddim`, `ancestral` or `partial(ddim, eta=0.5)`.
        steps: of the sampler, each one call of the network (heun: two).
        schedule: where the steps lie between noise and data; None: as the objective has them.
        guidance: how strongly they are led to their classes.
        init_image: a picture to begin with (image-to-image, inpainting); None: noise alone.
        batch_size: pictures made at once; decides speed and memory only.
        progress: show how far it is.

    Raises:
        ConfigError: labels that the model does not know, a number of steps it does not have, guidance by a model
            of other latents, or away from a class that the model never went without.
        NumericError: the network gave something that is not finite.
    """
    times = (schedule or Default())(pipeline.objective, steps)
    check(pipeline, seeds, labels, times, guidance)
    with shown("sampling", silent=not progress) as show:
        for first in range(0, len(seeds), batch_size):
            show(first, len(seeds))
            rows = slice(first, first + batch_size)
            few = None if labels is None else labels[rows]
            images = _images(pipeline, seeds[rows], few, sampler, times, guidance, init_image)
            yield from map(Sample, seeds[rows], [None] * len(images) if few is None else few, images)
        show(len(seeds), len(seeds))


def check(
    pipeline: Pipeline, seeds: Sequence[int], labels: Sequence[int] | None, times: Tensor, guidance: Guidance
) -> None:
    """What `generate` refuses before it begins; its arguments and errors, `times` (steps + 1,) of the schedule."""
    guidance.check(pipeline, labels is not None, times)
    if labels is None:
        return
    if len(labels) != len(seeds):
        raise ValueError(f"expected a label for each of {len(seeds)} seeds, got {len(labels)}")
    # A classifier knows the classes of the latents, whatever the model knows.
    number = pipeline.num_classes if guidance.classifier is None else pipeline.manifest.plan.num_classes
    if number is None:
        raise ConfigError("this model was trained without classes: ask for none")
    wrong = [label for label in labels if not 0 <= label < number]
    if wrong:
        raise ConfigError(f"class {wrong[0]}: expected 0 to {number - 1}, the {number} classes of the training data")


# Not inference_mode: the tables that objective and manifest keep for a device would then be lost to training.
@torch.no_grad()
def _images(
    pipeline: Pipeline,
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    sampler: Sampler,
    times: Tensor,
    guidance: Guidance,
    init_image: InitImage | None,
) -> np.ndarray:
    """(N,H,W,C) uint8."""
    number, device, manifest = len(seeds), pipeline.device, pipeline.manifest
    with _evaluating(pipeline.denoiser):
        classes = None if labels is None else torch.tensor(labels, device=device)
        denoise = guidance.denoiser(pipeline, classes, number)
        noise = Draws(SEED, seeds, number).normal("noise", manifest.plan.shape).to(device)
        known = None
        if init_image is not None:
            times = init_image.times(times)
            known = manifest.standardize(pipeline.codec.encode(init_image.image[None])[0])  # (1,c,h,w)
            if (kept := init_image.latent_mask(manifest.plan.shape)) is not None:
                denoise = inpaint(denoise, known, kept.to(device))
        x = start(pipeline.objective, noise, times[0], known)
        latents = sampler(denoise, pipeline.objective, x, times, draws=Draws(SEED, seeds, number, device))
        images = pipeline.codec.decode(manifest.unstandardize(latents))
        if init_image is not None:
            images = init_image.composite(images)
    if not bool(torch.isfinite(images).all()):
        steered = "" if guidance.scale == 1 else f", or guidance {guidance.scale:g} leads out of what numbers can hold"
        raise NumericError(
            f"a sample of the seeds {list(seeds)} is not finite: the weights are damaged or diverged{steered}"
        )
    return ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off within the block: raw weights come from a network that may be in the middle of training."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
