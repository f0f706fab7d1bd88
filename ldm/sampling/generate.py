"""From seeds and conditions to images: the only code that generates samples, for previews, evaluation and sample.py.

    checkpoint -> denoiser, objective, codec -> guided denoiser -> sampler -> codec.decode -> uint8

An image depends only on its seed and its condition, not on the batch it was made in, its neighbors or their order.
(Up to float rounding: another batch size may select another matrix kernel, which changes a pixel by one level at most,
or, in a pipeline that computes in bfloat16, by as much as that itself changes it.)
The initial noise is drawn on the CPU, so that a seed gives the same image on every machine.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ldm.autoencoder.tiling import Tiling, decode, encode
from ldm.diffusion.conditioners.base import defaults
from ldm.errors import NumericError
from ldm.images import to_arrays
from ldm.randomness import Draws
from ldm.runtime.progress import Show, shown
from ldm.sampling import dense
from ldm.sampling.conditions import Columns, Condition, check_conditions, rows
from ldm.sampling.guidance import ConditionalDenoiser, Guidance
from ldm.sampling.img2img import InitImage, inpaint
from ldm.sampling.precision import autocast
from ldm.sampling.samplers import Sampler, ddim
from ldm.sampling.steps import start
from ldm.sampling.tile_count import calls, counted
from ldm.sampling.tiled import tiled
from ldm.sampling.timesteps import TimestepSchedule, default
from ldm.sizes import Size, uncropped

if TYPE_CHECKING:  # its `generate` calls the one of this file
    from ldm.sampling.pipeline import Pipeline

UNGUIDED = Guidance()

SEED = 0
"""The seed of all sampling: the images' own seeds are used as sample numbers."""


class Sample(NamedTuple):
    """An image and what it was made from: `image` (H,W,C) uint8; `condition` None: unconditional."""

    seed: int
    condition: Condition | None
    image: np.ndarray


def generate(
    pipeline: "Pipeline",
    seeds: Sequence[int],
    conditions: Sequence[Condition] | None = None,
    *,
    sampler: Sampler = ddim,
    steps: int = 50,
    schedule: TimestepSchedule = default,
    guidance: Guidance = UNGUIDED,
    init_image: InitImage | None = None,
    size: Size | None = None,
    tile: Tiling | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Iterator[Sample]:
    """One image for each seed, in order.

    Args:
        seeds: any integers of 64 bits; the same seed gives the same starting noise, whatever the condition.
        conditions: one for each seed, such as {"class_label": 3}; None: unconditional samples, even from a conditional
            model. Of sizes that a model reads (ldm/latents/numbers.py) none need be said. Pictures, masks, maps and
            layouts: dense.py.
        sampler: of samplers.py, such as `ddim` or `partial(ddim, eta=0.5)`.
        steps: of the sampler, one network call each (heun: two).
        schedule: of timesteps.py, where the steps lie between noise and data.
        guidance: how strongly samples are guided toward their conditions.
        init_image: an image to start from (image-to-image, inpainting), of that `size`; None: pure noise.
        size: (height, width) of the images, pixels; None: that of the training images, or of most of them.
        tile: make them in tiles, as are larger than the training images; one image at a time. None: as a whole.
        batch_size: images generated at once; affects only speed and memory.
        progress: show a progress bar, of the pictures, or of their tiles.

    Raises:
        ConfigError: conditions that the model does not know, an invalid number of steps, guidance by a model of other
            latents, classifier-free guidance of a model that was never trained without its conditions, a size that
            the autoencoder or the network cannot divide, or tiles that do not fit it.
        NumericError: the network's output is not finite.
    """
    shape = pipeline.latent_shape(size, tile)
    batch_size = batch_size if tile is None else 1
    times = schedule(pipeline.objective, steps, shape)
    table = check(pipeline, seeds, conditions, times, guidance, size)
    if init_image is not None:
        init_image.require(pipeline.codec.down_factor, shape)
    with shown("sampling", silent=not progress) as show:
        for first in range(0, len(seeds), batch_size):
            show(first, len(seeds))
            watched = None if tile is None else _shown(tile, show, f"picture {first + 1} of {len(seeds)}")
            few = slice(first, first + batch_size)
            batch = None if table is None else rows(table, few, pipeline.device)
            images = _images(pipeline, seeds[few], batch, sampler, times, guidance, init_image, shape, watched)
            yield from map(Sample, seeds[few], [None] * len(images) if conditions is None else conditions[few], images)
        show(len(seeds), len(seeds))


def check(
    pipeline: "Pipeline",
    seeds: Sequence[int],
    conditions: Sequence[Condition] | None,
    times: Tensor,
    guidance: Guidance,
    size: Size | None = None,
) -> Columns | None:
    """Everything `generate` checks before it starts; its arguments and errors, `times` (steps + 1,) of the schedule.

    Returns the columns of the conditions, if there are any. Sizes that a model reads, and no condition says, are those
    of a picture that has the `size` that is made, and of which nothing was cropped; likewise other defaults.
    """
    guidance.check(pipeline, conditions is not None, times)
    if conditions is None:
        return None
    if len(conditions) != len(seeds):
        raise ValueError(f"expected a condition for each of {len(seeds)} seeds, got {len(conditions)}")
    # A classifier reads the class, whether or not the model does.
    own = () if guidance.classifier is None else ("class_label",)
    reads = tuple(dict.fromkeys([*pipeline.conditioner.keys, *own]))
    left_out = defaults(pipeline.conditioner)
    sizes = uncropped(pipeline.image_size(size))
    whole = {**left_out, **{name: value for name, value in sizes.items() if name in reads}}
    said = [{**whole, **condition} for condition in conditions] if whole else conditions
    wanted = dense.asked([*reads, *left_out], said[0] if said else {})
    table = check_conditions(said, wanted, pipeline.manifest.plan.num_classes)
    dense.check(pipeline, table, size)
    return table


def _shown(tile: Tiling, show: Show, what: str) -> Tiling:
    """Tiles of which is also shown how many are done."""

    def report(doing: str, done: int, total: int) -> None:
        tile.report(doing, done, total)
        show(done, total, f"{what}, {doing} tiles")

    return replace(tile, report=report)


# Not inference_mode: training could then not use the tables that objective and manifest cache on a device.
@torch.no_grad()
def _images(
    pipeline: "Pipeline",
    seeds: Sequence[int],
    batch: Mapping[str, Any] | None,
    sampler: Sampler,
    times: Tensor,
    guidance: Guidance,
    init_image: InitImage | None,
    shape: tuple[int, int, int],
    tile: Tiling | None,
) -> np.ndarray:
    """(N,H,W,C) uint8."""
    number, device, manifest = len(seeds), pipeline.device, pipeline.manifest
    batch = None if batch is None else dense.completed(pipeline, batch, tile)
    with _evaluating(pipeline.denoiser):
        draws = Draws(SEED, seeds, number, device, normals=pipeline.normals)
        if batch is not None:
            size = torch.empty(number, *shape, device="meta")  # of which a conditioner may read the height and width
            batch = {**batch, "draws": draws, "latent": size}
        times = times if init_image is None else init_image.times(times)
        networks = 1 if guidance.guide is None else 2
        within = _within(pipeline, shape, tile, lambda: networks * calls(sampler, pipeline.objective, times, device))
        denoise = guidance.denoiser(pipeline, batch, number, within)
        noise = Draws(SEED, seeds, number, normals=pipeline.normals).normal("noise", shape).to(device)
        known = None
        if init_image is not None:
            known = manifest.standardize(encode(pipeline.codec, init_image.image[None], tile)[0])  # (1,c,h,w)
            if (kept := init_image.latent_mask(shape)) is not None:
                denoise = inpaint(denoise, known, kept.to(device))
        x = start(pipeline.objective, noise, times[0], known)
        latents = sampler(denoise, pipeline.objective, x, times, draws=draws)
        with autocast(pipeline):
            images = decode(pipeline.codec, manifest.unstandardize(latents), tile)
        if init_image is not None:
            images = init_image.composite(images)
        images = dense.kept(pipeline, images, batch)
    if not bool(torch.isfinite(images).all()):
        steered = "" if guidance.scale == 1 else f", or guidance {guidance.scale:g} overflows"
        raise NumericError(
            f"a sample of the seeds {list(seeds)} is not finite: the weights are damaged or have diverged{steered}"
        )
    return to_arrays(images)


def _within(
    pipeline: "Pipeline", shape: tuple[int, int, int], tile: Tiling | None, calls: Callable[[], int]
) -> Callable[[ConditionalDenoiser], ConditionalDenoiser]:
    """How a network is called on a latent of this `shape`, so many times."""
    if tile is None:
        return lambda denoise: denoise
    factor = pipeline.codec.down_factor
    windows = tile.windows((shape[1] * factor, shape[2] * factor), factor, device=pipeline.device)
    if len(windows) == 1:
        return lambda denoise: denoise
    done = counted(tile.report, len(windows) * calls())
    return partial(tiled, windows=windows, at_once=tile.at_once, done=done)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout is off within the block, since raw weights belong to a network that may be in the middle of training."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
