"""The Fréchet distance of samples to the training pictures while a model trains: a metric of validation.

    lightning:
      callbacks:
        fd:
          target: ldm.training.callbacks.frechet.FrechetDistance
          params: {every: 5000, images: 2000}
        checkpoints: {target: ldm.training.callbacks.checkpoints.Checkpoints, params: {monitor: val/fd}}

The samples are those of `ldm evaluate` with the same settings, of the averaged weights, one for each seed from 0; but
they are made in the precision of training (bf16 where it is `bf16-mixed`), where `ldm evaluate` makes them in float32.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from ldm.data.dataset import class_labels
from ldm.diffusion.module import LatentDiffusion
from ldm.errors import ConfigError
from ldm.evaluation.distances.frechet import frechet_distance
from ldm.evaluation.features.base import MAIN, Features
from ldm.evaluation.features.choose import choose
from ldm.evaluation.moments import Moments
from ldm.evaluation.pictures.configured import scattered
from ldm.evaluation.pictures.items import Items
from ldm.evaluation.pictures.labels import ITEMS, rule, usual
from ldm.evaluation.pictures.made import Generated, Recipe
from ldm.evaluation.pictures.stored import DatasetPictures
from ldm.evaluation.reference import PicturesReference
from ldm.latents.asked import DenseItems
from ldm.latents.datamodule import LatentDataModule
from ldm.ranges import Count, Finite
from ldm.runtime import distributed
from ldm.sampling.guidance import Guidance
from ldm.sampling.pipeline import Pipeline
from ldm.sampling.samplers import ddim
from ldm.sampling.timesteps import default
from ldm.training.callbacks.live_pipeline import LivePipeline
from ldm.training.callbacks.stop import StopOnSignal

log = logging.getLogger(__name__)

METRIC = "val/fd"
TRIAL = 2
"""Samples of the trial before the first step, on each rank."""


class FrechetDistance(pl.Callback):
    """Logs `val/fd`, the Fréchet distance of samples to the training pictures, in some of the validations.

    All ranks make their share of the samples, and their features are reduced once. The features of the training
    pictures are computed before the first step, and kept in `cache/.features` for later runs. A validation batch before
    the first step is followed by a trial with a few samples, so that what fails there does not fail hours later.

    Only distances of equally many samples, in the same features, may be compared; it is the FID with `inception` alone.

    Args:
        every: optimizer steps: measured in the first validation at or after each multiple of it, and in the last one.
        images: samples; with fewer than the features have numbers the distance is biased, and a warning says so.
        features: a name of ldm/evaluation/features/choose.py.
        weights: file of the features' weights; None: where they usually lie.
        reference_images: so many training pictures, scattered over the data set; None: all.
        labels: `balanced`, `random` or `proportional`: the classes of a class-conditional model's samples, as in
            ldm/evaluation/pictures/labels.py; `items`: the classes and captions of the training items, in turn; None:
            `items` for a model that reads captions, else `balanced`.
        steps: of the sampler.
        sampler: of ldm/sampling/samplers.py, such as {target: ldm.sampling.samplers.heun, partial: true}.
        schedule: of ldm/sampling/timesteps.py, where the steps lie.
        guidance_scale: 1 = none.
        batch_size: samples made at once on a rank.
        autoencoder: run folder, checkpoint or folder of diffusers that decodes; None: the one that made the latents.
        trust: packages besides ldm's own that the autoencoder's configuration may name.

    Raises:
        ConfigError: the model cannot be sampled so, or one sample alone is asked for.
        CheckpointError: the weights of the features, or the autoencoder, are missing.
    """

    def __init__(
        self,
        every: Count,
        images: Count = 2000,
        features: str = "alexnet",
        weights: Path | str | None = None,
        reference_images: Count | None = 50_000,
        labels: str | None = None,
        steps: Count = 50,
        sampler: Callable[..., Tensor] = ddim,
        schedule: Callable[..., Tensor] = default,
        guidance_scale: Finite = 1.0,
        batch_size: Count = 64,
        autoencoder: Path | str | None = None,
        trust: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if images < 2:
            raise ConfigError(f"FrechetDistance: images: expected 2 or more, found {images}: one sample has no spread")
        self._every = every
        self._images = images
        self._choose = partial(choose, features, weights=None if weights is None else Path(weights))
        self._reference_images = reference_images
        self._labels = labels
        self._recipe = Recipe(sampler, steps, schedule, Guidance(guidance_scale), {})
        self._batch_size = batch_size
        self._live = LivePipeline(autoencoder, trust, "the Fréchet distance of samples", "FrechetDistance")
        self._features: Features | None = None
        self._reference: Moments | None = None
        self._last: dict[str, Any] = {}  # the newest measurement, which checkpoints hold

    @property
    def logged_metrics(self) -> Sequence[str]:
        return [METRIC]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What cannot be measured is refused, and the training pictures' features are computed."""
        if trainer.datamodule.validation_dataset is None or not trainer.enable_validation:  # type: ignore[attr-defined]
            raise ConfigError(
                "FrechetDistance: is measured when a run is validated, which this one never is. Hold pictures out "
                "(data.params.num_validation), or leave the callback out."
            )
        self._prepare(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            value = self._measure(trainer, pl_module, TRIAL * distributed.world_size())
        elif trainer.state.fn == "validate" or self._is_due(trainer):
            begun = time.monotonic()
            value = self._measure(trainer, pl_module, self._images)
            self._last = {"step": trainer.global_step, "value": value, **self._protocol(str(trainer.precision))}
            if trainer.is_global_zero:
                seconds = time.monotonic() - begun
                log.info("%s %.4g at step %d (%.0f s)", METRIC, value, trainer.global_step, seconds)
        else:
            return
        pl_module.log(METRIC, value)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The newest measurement is one of the checkpoint's facts, with all that decides the number."""
        if self._last:
            facts = checkpoint.setdefault("ldm", {})
            facts["fd"] = self._last
            facts.setdefault("metrics", {})[METRIC] = self._last["value"]

    def state_dict(self) -> dict[str, Any]:
        return {"last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last = state_dict["last"]

    def _is_due(self, trainer: pl.Trainer) -> bool:
        measured = self._last.get("step", 0)
        return trainer.global_step // self._every > measured // self._every or trainer.global_step >= trainer.max_steps

    def _prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Features and reference, once."""
        if self._reference is not None:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # Lightning's own, set by fit
        device = module.device
        pipeline = self._pipeline(trainer, module)
        try:
            self._recipe = replace(self._recipe, **self._asked(pipeline, data))
            generated = Generated(pipeline, self._recipe, self._images)
            times = self._recipe.schedule(pipeline.objective, self._recipe.steps, pipeline.manifest.plan.shape)
            self._recipe.guidance.check(pipeline, bool(pipeline.conditioner.keys), times)
        except ConfigError as error:
            raise ConfigError(f"lightning.callbacks.fd (FrechetDistance): {error}") from error
        self._features = self._choose(device=device)
        # The same pictures in the same order as `ldm evaluate` compares the run with, so that either finds them cached.
        pictures = DatasetPictures(scattered(data.train_dataset), data.transform, generated.shape[0])
        reference = PicturesReference(pictures, "training pictures", self._reference_images)
        reference.prepare([self._features], self._batch_size)
        self._reference = reference.moments(self._features)
        self._leave_device()
        if min(reference.number, self._images) <= self._reference.size and trainer.is_global_zero:
            log.warning(
                "lightning.callbacks.fd: %d samples and %d training pictures for %d features: below one of each the "
                "distance is far too large; it orders checkpoints, and says little by itself",
                *(self._images, reference.number, self._reference.size),
            )

    def _asked(self, pipeline: Pipeline, data: Any) -> dict[str, Any]:
        """The part of the recipe that says what samples are asked for by."""
        dataset = data.train_dataset
        reads = pipeline.conditioner.keys
        name = self._labels or usual(reads)
        if name == ITEMS:
            dense = DenseItems.of(data.dense, pipeline.manifest) if isinstance(data, LatentDataModule) else None
            return {"items": Items(scattered(dataset), reads, dense)}
        return {"labels": rule(name, class_labels(dataset))}

    def _pipeline(self, trainer: pl.Trainer, module: pl.LightningModule) -> Pipeline:
        if not isinstance(module, LatentDiffusion):
            raise ConfigError(
                f"lightning.callbacks.fd (FrechetDistance): expected a LatentDiffusion, found a "
                f"{type(module).__name__}. An autoencoder's distance is a metric of its own: "
                "model.params.metrics.rfd={target: ldm.evaluation.reconstruction.ReconstructionDistance}"
            )
        return self._live.of(trainer, module)

    def _measure(self, trainer: pl.Trainer, module: pl.LightningModule, number: int) -> float:
        """The distance of `number` samples; every rank calls it."""
        self._prepare(trainer, module)
        assert self._features is not None
        assert self._reference is not None
        generated = Generated(self._pipeline(trainer, module), self._recipe, number)
        features = self._features.to(module.device)
        part, moments = features.parts[MAIN], Moments(self._reference.size)
        for places in self._share(number):
            self._stop_if_asked(trainer)
            with trainer.precision_plugin.forward_context():
                images = generated.images([place % number for place in places])
            if own := sum(place < number for place in places):
                moments.add(features(images[:own].to(module.device))[:, part])
        self._leave_device()
        return frechet_distance(moments.over_ranks(), self._reference)

    def _leave_device(self) -> None:
        """Nothing is kept on the device through training."""
        if self._features is not None:
            self._features.to("cpu")
        self._live.leave_device()

    def _share(self, number: int) -> Iterator[Sequence[int]]:
        """This rank's samples, in batches; those beyond `number` are made and left out.

        So every rank makes equally many: where weights are sharded, all ranks call the network together.
        """
        world = distributed.world_size()
        mine = range(distributed.rank(), -(-number // world) * world, world)
        for start in range(0, len(mine), self._batch_size):
            yield mine[start : start + self._batch_size]

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        """A signal need not wait for thousands of samples: the resumed run begins this validation anew."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning's own
            if isinstance(callback, StopOnSignal):
                callback.stop_in_validation(trainer)

    def _protocol(self, precision: str) -> dict[str, Any]:
        """What else decides the number, in plain values."""
        assert self._features is not None
        assert self._reference is not None
        return {
            "images": self._images,
            "features": self._features.name,
            "weights": self._features.weights,
            "reference_images": self._reference.count,
            "labels": self._recipe.asked,
            "steps": self._recipe.steps,
            "sampler": _spelled(self._recipe.sampler),
            "schedule": _spelled(self._recipe.schedule),
            "guidance": self._recipe.guidance.scale,
            "precision": precision,
        }


def _spelled(function: Callable[..., Any]) -> str:
    """A sampler or schedule by its name and its settings."""
    made = function if isinstance(function, partial) else partial(function)
    return " ".join([made.func.__name__, *(f"{key}={value}" for key, value in sorted(made.keywords.items()))])
