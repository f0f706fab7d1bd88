"""Images to look at while a model trains.

Images are written to `<run folder>/images/{train,val}/`, the run folder being the trainer's `default_root_dir`, and
sent to wandb where it is among the loggers.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor

from ldm.data.asked_for import conditions as conditions_of
from ldm.diffusion.module import LatentDiffusion
from ldm.errors import ConfigError
from ldm.images import grid, picture, to_arrays
from ldm.latents.asked import DenseItems
from ldm.latents.datamodule import LatentDataModule
from ldm.ranges import Count, CountOrZero, Finite
from ldm.runtime import distributed
from ldm.sampling.generate import check, generate
from ldm.sampling.guidance import Guidance
from ldm.sampling.pipeline import Pipeline
from ldm.sampling.sample_folder import title
from ldm.sampling.samplers import ddim
from ldm.sampling.shown import beside
from ldm.sampling.shown import conditions as conditions_shown
from ldm.sampling.timesteps import default
from ldm.sizes import SIZES
from ldm.training.callbacks.live_pipeline import LivePipeline
from ldm.training.callbacks.step_callback import StepCallback

PREVIEW_STEPS = 50
"""The sampler's steps if a configuration does not say."""

log = logging.getLogger(__name__)


class ShowsImages(Protocol):
    """A module that returns named images of a batch, each (N, C, H, W) in [-1, 1]."""

    def images(self, batch: Any) -> dict[str, Tensor]: ...


class ImageLogger(StepCallback):
    """Stage 1: a sheet of what the module shows of a batch, a row for each name and a column for each image.

    From training batches to `train/`, from the first batch of each validation, always the same images, to `val/`.

    Args:
        every_n_steps: between two sheets of training batches.
        num_images: columns.
    """

    def __init__(self, every_n_steps: Count = 1000, num_images: Count = 8) -> None:
        super().__init__()
        self._every_n_steps = every_n_steps
        self._num_images = num_images

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        if trainer.global_step % self._every_n_steps == 0:
            self._show(trainer, pl_module, batch, "train")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if batch_idx == 0:
            self._show(trainer, pl_module, batch, "val")

    def _show(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, split: str) -> None:
        if not trainer.is_global_zero:
            return  # one forward of a few images: shorter than it would take to share it out
        training = module.training
        module.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            shown = cast(ShowsImages, module).images(_first(batch, self._num_images))
        module.train(training)
        rows = [to_arrays(images) for images in shown.values()]
        sheet = grid([image for row in rows for image in row], columns=len(rows[0]))
        if not trainer.sanity_checking:  # then it was tried whether there is one
            publish(trainer, split, "-".join(shown), sheet)


class SampleLogger(StepCallback):
    """Stage 2: a sheet of samples of the averaged weights, a row for each condition and a column for each seed.

    All ranks make their share of it.

    Args:
        every_n_steps: between two sheets.
        classes: labels, a row each; short for conditions of `class_label`.
        prompts: captions, a row each; short for conditions of `caption`.
        conditions: a row each, with the keys that the model reads. With none of these, a row of unconditional samples.
        held_out: that many further rows, of what validation items (without any, training items) say, always the same:
            classes, captions, and what lies on their pictures, which is shown in front of a row, and the picture itself
            at its end.
        seeds: of the columns; the same picture is drawn each time.
        steps: of the sampler.
        sampler: of ldm/sampling/samplers.py, such as {target: ldm.sampling.samplers.heun, partial: true}.
        schedule: of ldm/sampling/timesteps.py, where the steps lie.
        guidance_scale: 1 = none.
        autoencoder: run folder, checkpoint or folder of diffusers that decodes; None: the one that made the latents.
        trust: packages besides ldm's own that the autoencoder's configuration may name.
    """

    def __init__(
        self,
        every_n_steps: Count = 5000,
        classes: Sequence[CountOrZero] | None = None,
        prompts: Sequence[str] | None = None,
        conditions: Sequence[Mapping[str, Any]] | None = None,
        held_out: CountOrZero = 0,
        seeds: Sequence[CountOrZero] = tuple(range(8)),
        steps: Count = PREVIEW_STEPS,
        sampler: Callable[..., Tensor] = ddim,
        schedule: Callable[..., Tensor] = default,
        guidance_scale: Finite = 1.0,
        autoencoder: Path | str | None = None,
        trust: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not seeds:
            raise ConfigError("SampleLogger: seeds: expected one or more; without previews, write images: null")
        self._every_n_steps = every_n_steps
        self._columns = [*seeds]
        given = {"classes": classes, "prompts": prompts, "conditions": conditions}
        if len(twice := [name for name, rows in given.items() if rows]) > 1:
            raise ConfigError(f"SampleLogger: found {' and '.join(twice)}, which say the same; leave one of them out")
        self._asked: list[Mapping[str, Any]] = [
            *(conditions or ()),
            *({"class_label": label} for label in classes or ()),
            *({"caption": prompt} for prompt in prompts or ()),
        ]
        self._held_out = held_out
        self._rows = self._asked
        self._truths: list[np.ndarray] = []  # of the last rows, (H,W,C) uint8
        self._steps = steps
        self._sampler = sampler
        self._schedule = schedule
        self._guidance = Guidance(guidance_scale)
        self._live = LivePipeline(autoencoder, trust, "the preview of samples", "SampleLogger")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What cannot be shown is refused before the first step."""
        pipeline = self._pipeline(trainer, pl_module)
        if self._held_out:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]  # Lightning's own, set by fit
            items = data.train_dataset if data.validation_dataset is None else data.validation_dataset
            reads = [key for key in pipeline.conditioner.keys if key not in SIZES]
            found = conditions_of(items, reads, self._held_out)
            if not found and isinstance(data, LatentDataModule):
                dense = DenseItems.of(data.dense, pipeline.manifest)
                pairs = dense.some(items, reads, self._held_out)
                found, self._truths = [row for row, _ in pairs], [_array(image) for _, image in pairs]
            self._rows = [*self._asked, *found]
        try:
            times = self._schedule(pipeline.objective, self._steps, pipeline.manifest.plan.shape)
            check(pipeline, self._seeds, self._conditions, times, self._guidance)
        except ConfigError as error:
            raise ConfigError(f"lightning.callbacks.images (SampleLogger): {error}") from error

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        if trainer.global_step % self._every_n_steps == 0:
            self.show(trainer, pl_module)

    @property
    def _seeds(self) -> list[int]:
        """Of the pictures of the sheet, row by row."""
        return self._columns * max(1, len(self._rows))

    @property
    def _conditions(self) -> list[Mapping[str, Any]] | None:
        """Of the pictures of the sheet, row by row; None: unconditional."""
        return [row for row in self._rows for _ in self._columns] or None

    def _pipeline(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Pipeline:
        if not isinstance(pl_module, LatentDiffusion):
            raise ConfigError(f"SampleLogger: expected a LatentDiffusion, found a {type(pl_module).__name__}.")
        return self._live.of(trainer, pl_module)

    def show(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make a sheet now; every rank must call it."""
        pipeline = self._pipeline(trainer, pl_module)
        all_seeds, all_conditions = self._seeds, self._conditions
        world, number = distributed.world_size(), len(all_seeds)
        # As many on each rank, some twice: where the weights are sharded, all ranks call the network together.
        mine = [place % number for place in range(distributed.rank(), -(-number // world) * world, world)]
        seeds = [all_seeds[place] for place in mine]
        conditions = None if all_conditions is None else [all_conditions[place] for place in mine]
        with trainer.precision_plugin.forward_context():
            made = generate(
                pipeline,
                seeds,
                conditions,
                sampler=self._sampler,
                steps=self._steps,
                schedule=self._schedule,
                guidance=self._guidance,
            )
            samples = list(made)
        shares = distributed.gather([sample.image for sample in samples])
        if trainer.is_global_zero:
            images = [shares[place % len(shares)][place // len(shares)] for place in range(number)]
            titles = [title(row, pipeline.manifest.plan.class_names) for row in self._rows]
            publish(trainer, "val", "samples", self._sheet(pipeline, images, titles), titles)

    def _sheet(self, pipeline: Pipeline, images: Sequence[np.ndarray], titles: Sequence[str]) -> np.ndarray:
        """A row for each condition: what can be drawn of it, the samples, and the truth where it is known."""
        number = len(self._columns)
        drawn = [conditions_shown(row, pipeline.image_size(), pipeline.dense) for row in self._rows]
        if not any(drawn):
            return grid(images, number, titles=titles)
        missing = len(drawn) - len(self._truths)
        blank = np.full_like(images[0], 255)
        truths = [*[blank] * missing, *self._truths]
        rows = [
            [*drawn[row], *images[row * number : (row + 1) * number], *([truths[row]] if self._truths else [])]
            for row in range(len(drawn))
        ]
        cells = beside([image for row in rows for image in row])
        return grid(cells, len(rows[0]), titles=titles if any(titles) else ())


def publish(trainer: pl.Trainer, split: str, name: str, sheet: np.ndarray, titles: Sequence[str] = ()) -> None:
    """Write (H, W, C) uint8 to `images/<split>/<name>_<step>.png` and send it to wandb; never ends the run.

    Args:
        titles: of the sheet's rows, wandb's caption.
    """
    path = Path(trainer.default_root_dir) / "images" / split / f"{name}_{trainer.global_step:08d}.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(sheet).save(path)
    except OSError as error:
        log.warning("%s: cannot be written (%s); training goes on", path, error)
        return
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            captions = {"caption": ["; ".join(titles)]} if titles else {}
            logger.log_image(f"{split}/{name}", [str(path)], step=trainer.global_step, **captions)


def _array(image: Tensor) -> np.ndarray:
    """(C,H,W) -> (H,W,C)."""
    found: np.ndarray = image.permute(1, 2, 0).numpy()
    return found


def _first(batch: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The first rows of a batch, with their own draws."""
    return {key: value[:number] for key, value in batch.items()}
