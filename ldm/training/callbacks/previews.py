"""What a person looks at while a model trains: pictures, speed, progress.

Pictures are written to `<run folder>/images/{train,val}/`, the run folder being the trainer's `default_root_dir`, and
sent to wandb where it is among the loggers.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.loggers import WandbLogger
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from torch import Tensor

from ldm.autoencoder.codec import Codec
from ldm.diffusion.module import LatentDiffusion
from ldm.errors import ConfigError
from ldm.images import grid, picture
from ldm.randomness import Draws
from ldm.ranges import Count, CountOrZero, Finite, NotNegative
from ldm.runtime import distributed
from ldm.runtime.durations import so_far
from ldm.sampling.generate import Pipeline, check, generate, load_codec
from ldm.sampling.img2img import Guidance
from ldm.sampling.timesteps import Default

log = logging.getLogger(__name__)


class ShowsImages(Protocol):
    """A module with something to look at in a batch: named pictures, each (N, C, H, W) in [-1, 1], C = 1 or 3."""

    def images(self, batch: Any) -> dict[str, Tensor]: ...


class ImageLogger(pl.Callback):
    """Stage 1: a sheet of what the module shows of a batch, a row for each name and a column for each image.

    From training batches to `train/`, from the first batch of each validation, always the same images, to `val/`.

    Args:
        every_n_steps: between two sheets of training batches.
        num_images: columns.
    """

    def __init__(self, every_n_steps: Count = 1000, num_images: Count = 8) -> None:
        self._every_n_steps = every_n_steps
        self._num_images = num_images
        self._step = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # A step's micro-batches share its number.
        if trainer.global_step % self._every_n_steps == 0 and trainer.global_step != self._step:
            self._step = trainer.global_step
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
        rows = [to_uint8(images) for images in shown.values()]
        sheet = grid([image for row in rows for image in row], columns=len(rows[0]))
        if not trainer.sanity_checking:  # then it was tried whether there is one
            publish(trainer, split, "-".join(shown), sheet)


class SampleLogger(pl.Callback):
    """Stage 2: a sheet of samples of the averaged weights, a row for each class and a column for each seed.

    All ranks make their share of it.

    Args:
        every_n_steps: between two sheets.
        classes: labels; None: no class, one row.
        seeds: of the columns; the same picture is drawn each time.
        steps: network calls a picture.
        guidance_scale: 1 = none.
        autoencoder: run folder or checkpoint that decodes; None: the one that made the latents.
        trust: packages besides ldm's own that the autoencoder's configuration may name.
    """

    def __init__(
        self,
        every_n_steps: Count = 5000,
        classes: Sequence[CountOrZero] | None = None,
        seeds: Sequence[CountOrZero] = tuple(range(8)),
        steps: Count = 50,
        guidance_scale: Finite = 1.0,
        autoencoder: Path | str | None = None,
        trust: Sequence[str] = (),
    ) -> None:
        self._every_n_steps = every_n_steps
        self._columns = len(seeds)
        self._labels = None if classes is None else [label for label in classes for _ in seeds]
        self._seeds = list(seeds) if classes is None else list(seeds) * len(classes)
        self._steps = steps
        self._guidance = Guidance(guidance_scale)
        self._autoencoder = autoencoder
        self._trust = trust
        self._codec: Codec | None = None
        self._step = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What cannot be shown is refused before the first step."""
        pipeline = self._pipeline(trainer, pl_module)
        try:
            check(pipeline, self._seeds, self._labels, Default()(pipeline.objective, self._steps), self._guidance)
        except ConfigError as error:
            raise ConfigError(f"lightning.callbacks.images (SampleLogger): {error}") from error

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step % self._every_n_steps == 0 and trainer.global_step != self._step:
            self._step = trainer.global_step
            self.show(trainer, pl_module)

    def _pipeline(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Pipeline:
        if not isinstance(pl_module, LatentDiffusion):
            raise ConfigError(f"SampleLogger: expected a LatentDiffusion, found a {type(pl_module).__name__}.")
        manifest = trainer.datamodule.manifest  # type: ignore[attr-defined]  # Lightning's own, set by fit
        if self._codec is None:
            self._codec = load_codec(
                manifest,
                self._autoencoder,
                "the preview of samples",
                self._trust,
                "in the parameter autoencoder of SampleLogger",
            )
        return Pipeline.from_module(pl_module, self._codec.to(pl_module.device), manifest)

    def show(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make a sheet now; every rank has to call it."""
        pipeline = self._pipeline(trainer, pl_module)
        world, number = distributed.world_size(), len(self._seeds)
        # As many on each rank, some twice: where the weights are sharded, all ranks call the network together.
        mine = [place % number for place in range(distributed.rank(), -(-number // world) * world, world)]
        seeds = [self._seeds[place] for place in mine]
        labels = None if self._labels is None else [self._labels[place] for place in mine]
        with trainer.precision_plugin.forward_context():
            samples = list(generate(pipeline, seeds, labels, steps=self._steps, guidance=self._guidance))
        shares = distributed.gather([sample.image for sample in samples])
        if trainer.is_global_zero:
            images = [shares[place % len(shares)][place // len(shares)] for place in range(len(self._seeds))]
            publish(trainer, "val", "samples", grid(images, self._columns))


class Throughput(pl.Callback):
    """Logs `images_per_second` over all ranks and `data_wait`, the share of the time spent waiting for a batch.

    By the host's clock over many steps, without waiting for the device. Validation and saves do not count. Stands last
    among the callbacks that draw pictures, so that their time does not pass for waiting.

    Args:
        every_n_steps: optimizer steps averaged over; best the trainer's `log_every_n_steps`.
    """

    def __init__(self, every_n_steps: Count = 50) -> None:
        self._every_n_steps = every_n_steps
        self._images = 0
        self._waited = self._worked = 0.0
        self._mark: float | None = None  # when the last batch ended, unless something else came in between
        self._step = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if self._mark is not None:
            self._waited += now - self._mark
        self._mark = now

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if self._mark is not None:
            self._worked += now - self._mark
            self._images += len(batch["draws"]) * trainer.world_size
        self._mark = now
        if trainer.global_step % self._every_n_steps == 0 and trainer.global_step != self._step:
            self._step = trainer.global_step
            total = max(self._waited + self._worked, 1e-9)
            speed = {"images_per_second": self._images / total, "data_wait": self._waited / total}
            pl_module.log_dict(speed, on_step=True, on_epoch=False, batch_size=1)
            self._images, self._waited, self._worked = 0, 0.0, 0.0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._mark = None


class Progress(ProgressBar):
    """Steps done, key figures, images a second, time elapsed and left: a bar in a terminal, else a line now and then.

    The figures are the entry `figures` of what the module's `training_step` returns (a mapping of names to scalar
    tensors), then the loss. They are read from the device when they are shown, not at every step.

    Args:
        refresh_seconds: between two looks in a terminal.
        log_seconds: between two lines elsewhere.
    """

    def __init__(self, refresh_seconds: NotNegative = 1.0, log_seconds: NotNegative = 30.0) -> None:
        super().__init__()
        self._console = Console()
        self._pause = refresh_seconds if self._console.is_terminal else log_seconds
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._shown_at = self._images = 0.0
        self._began_at, self._began = 0.0, 0  # when, and at which step
        self._enabled = True

    def disable(self) -> None:
        """Called by Lightning on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._shown_at, self._images = time.monotonic(), 0
        self._began_at, self._began = self._shown_at, trainer.global_step
        if self._enabled and self._console.is_terminal:
            words = TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.completed:.0f}/{task.total:.0f}")
            self._bar = Bar(*words, TextColumn("{task.fields[figures]}"), console=self._console)
            self._task = self._bar.add_task("training", figures="", total=trainer.max_steps)
            self._bar.update(self._task, completed=trainer.global_step)
            self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += len(batch["draws"]) * trainer.world_size
        now = time.monotonic()
        elapsed = now - self._shown_at
        last = trainer.global_step == trainer.max_steps
        if not self._enabled or (elapsed < self._pause and not last):
            return
        # Lightning has divided the loss by the number of micro-batches, where the optimisation is its own.
        divided_by = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        figures = {name: float(value) for name, value in _figures(outputs).items()}
        figures |= {"loss": figures["loss"] * divided_by} if "loss" in figures else {}
        words = [f"{name} {value:.4g}" for name, value in figures.items()]
        words.append(f"{self._images / max(elapsed, 1e-9):.3g} images/s")
        words.append(self._times(trainer))
        self._shown_at, self._images = now, 0
        self._show(trainer, "training", "  ".join(words))

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._enabled and self._bar is not None and not trainer.sanity_checking:
            self._bar.update(self._task, description="validating")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A line of all that was validated, in the order in which the module logs it."""
        if not self._enabled or trainer.sanity_checking:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        words = [f"{name} {value:.4g}" for name, value in metrics.items()]
        if trainer.state.fn == "fit":
            words.append(self._times(trainer))
        self._say(f"step {trainer.global_step}: " + "  ".join(words))
        self._shown_at, self._images = time.monotonic(), 0

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _times(self, trainer: pl.Trainer) -> str:
        """By the steps that this process has done, with all that came between them."""
        done, total = trainer.global_step - self._began, trainer.max_steps - self._began
        return so_far(time.monotonic() - self._began_at, done, total)

    def _show(self, trainer: pl.Trainer, what: str, figures: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=what, completed=trainer.global_step, figures=figures)
        else:
            self._say(f"step {trainer.global_step}/{trainer.max_steps}: {figures}")

    def _say(self, line: str) -> None:
        # One line, however long: a log file is as wide as it likes.
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _figures(outputs: Any) -> dict[str, Tensor]:
    """What `training_step` wants shown, by name: its `figures`, then its loss."""
    if isinstance(outputs, Tensor):
        return {"loss": outputs}
    if not isinstance(outputs, Mapping):
        return {}
    loss = {"loss": outputs["loss"]} if isinstance(outputs.get("loss"), Tensor) else {}
    return {**outputs.get("figures", {}), **loss}


def to_uint8(images: Tensor) -> list[np.ndarray]:
    """(N, C, H, W) in [-1, 1], C = 1 or 3 -> N pictures (H, W, C) uint8; values beyond are clamped."""
    levels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return list(levels.permute(0, 2, 3, 1).cpu().numpy())


def publish(trainer: pl.Trainer, split: str, name: str, sheet: np.ndarray) -> None:
    """Write (H, W, C) uint8 to `images/<split>/<name>_<step>.png` and send it to wandb; never ends the run."""
    path = Path(trainer.default_root_dir) / "images" / split / f"{name}_{trainer.global_step:08d}.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(sheet).save(path)
    except OSError as error:
        log.warning("%s: cannot be written (%s); training goes on", path, error)
        return
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(f"{split}/{name}", [str(path)], step=trainer.global_step)


def _first(batch: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The first rows of a batch, with their own draws."""
    return {
        key: Draws(value.seed, value.numbers[:number], value.batch_size, value.device)
        if isinstance(value, Draws)
        else value[:number]
        for key, value in batch.items()
    }
