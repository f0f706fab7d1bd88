"""Stage 1 as a LightningModule: one forward and one backward pass per micro-batch, then a step of both optimizers."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from ldm.autoencoder.losses import AutoencoderLoss
from ldm.autoencoder.metrics import Output, standard
from ldm.autoencoder.networks import Decoder, Encoder
from ldm.autoencoder.posterior import DiagonalGaussian, Posterior, latent_sums, statistics
from ldm.autoencoder.quantizer import VectorQuantizer
from ldm.autoencoder.tiny import TinyDecoder, TinyEncoder
from ldm.checkpoints.store import is_untrained
from ldm.errors import ConfigError
from ldm.optim.optimizers import Scheduled, keep_settings, place_schedules
from ldm.ranges import Positive
from ldm.runtime.float64 import home
from ldm.runtime.fsdp import total_norm
from ldm.runtime.step_metrics import StepMean, is_logged
from ldm.runtime.validation_metrics import ValidationMetrics

Batch = dict[str, Any]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
Schedule = Callable[[int], float]


class AutoencoderKL(pl.LightningModule):
    """Encoder, decoder and their loss; `global_step` counts optimizer steps, one per global batch.

    Optimization is manual, so accumulation (from the datamodule) and clipping happen here. bf16 comes from the
    trainer's precision; fp16 is not supported, since gradients are taken before a scaler could see them.

    What depends on how the global batch is split over ranks and micro-batches: the adaptive adversarial weight, and
    the discriminator's batch statistics where it has any.

    Args:
        encoder: images to moments, or, for a quantizer, to latents.
        decoder: latents to images.
        loss: includes the discriminator, if there is one.
        optimizer: makes the optimizer of encoder, decoder, codebook and log-variance (if that is learned).
        schedule: optimizer step (from 0) -> multiplier of its learning rate; None: constant.
        discriminator_optimizer: makes the discriminator's optimizer; defaults to `optimizer`.
        discriminator_schedule: the same for the discriminator, counted from its own first step.
        gradient_clip: maximum gradient norm of each optimizer; None: no clipping. The loss is a sum over an image, so
            a useful threshold grows with the number of pixels.
        quantizer: a codebook instead of the Gaussian; None: the posterior is a diagonal Gaussian.
        metrics: validation metrics by name, beside the standard ones of ldm/autoencoder/metrics.py (psnr, ssim, losses,
            and latents, or codes of a codebook) or in place of the one of that name; null: without it.
        train_encoder: False trains the decoder alone, for an encoder (and codebook) with weights from elsewhere, which
            stay what they are: latents and caches made with them go on being valid.
    """

    def __init__(
        self,
        encoder: Encoder | TinyEncoder,
        decoder: Decoder | TinyDecoder,
        loss: AutoencoderLoss,
        optimizer: MakeOptimizer,
        schedule: Schedule | None = None,
        discriminator_optimizer: MakeOptimizer | None = None,
        discriminator_schedule: Schedule | None = None,
        gradient_clip: Positive | None = None,
        quantizer: VectorQuantizer | None = None,
        metrics: Mapping[str, Metric | None] | None = None,
        train_encoder: bool = True,
    ) -> None:
        super().__init__()
        if encoder.outputs != (1 if quantizer else 2):
            raise ConfigError(
                f"model.params.encoder.params.moments: expected {quantizer is None}, found {quantizer is not None}: "
                f"a Gaussian needs mean and log-variance, a quantizer the latent itself"
            )
        if quantizer is not None and quantizer.channels != encoder.latent_channels:
            raise ConfigError(
                f"model.params.quantizer.params.channels: expected the encoder's latent_channels, "
                f"{encoder.latent_channels}, found {quantizer.channels}"
            )
        self.automatic_optimization = False
        self.encoder = encoder
        self.decoder = decoder
        self.quantizer = quantizer
        self.loss = loss
        self.train_encoder = train_encoder
        for part in self._frozen():
            part.requires_grad_(False)
        self._recipes = [(optimizer, schedule), (discriminator_optimizer or optimizer, discriminator_schedule)]
        self._gradient_clip = gradient_clip
        self._micro_batches = 0  # seen since the last optimizer step
        self._step_mean = StepMean()
        self._latent_sums = torch.zeros(3, encoder.latent_channels, dtype=torch.float64)
        self._latents: dict[str, list[float]] | None = None
        self._validated: dict[str, float] = {}  # by the last validation of the run that goes on
        self.metrics = ValidationMetrics(standard(codebook=quantizer is not None), metrics)

    # ------------------------------------------------------------------ the model

    def encode(self, images: Tensor) -> Posterior:
        """(N, C, H, W) in [-1, 1] -> the posterior over (N, c, h, w), in float32."""
        with nullcontext() if self.train_encoder else torch.no_grad():
            output = self.encoder(images).float()
            return DiagonalGaussian(output) if self.quantizer is None else self.quantizer(output)

    def decode(self, latents: Tensor) -> Tensor:
        """(N, c, h, w) -> (N, C, H, W), about [-1, 1]."""
        return self.decoder(latents)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Posterior]:
        """Encode, draw a latent with `noise` (N, c, h, w; drawn here if not given), decode."""
        posterior = self.encode(images)
        return self.decode(posterior.sample(noise)), posterior

    def reconstruct(self, batch: Batch) -> tuple[Tensor, Posterior]:
        """forward() with the batch's own posterior draw."""
        return self(batch["image"], _noise(self.encoder, batch, "posterior"))

    # ------------------------------------------------------------------ training

    def train(self, mode: bool = True) -> "AutoencoderKL":
        """What is not trained stays in eval mode: its latents are those that stage 2 sees, without dropout."""
        super().train(mode)
        for part in self._frozen():
            part.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        return [] if self.train_encoder else [part for part in (self.encoder, self.quantizer) if part is not None]

    def total_loss(self, batch: Batch) -> Tensor:
        """The scalar whose single backward gives the gradients of both optimizers."""
        return self._losses(batch)[0]

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        loss, logs = self._losses(batch)
        # The loss is a negative log-likelihood, which can fall below zero; the mean absolute error is easier to read.
        figures = {"l1": logs["l1"]} if "l1" in logs else {}
        logged = is_logged(self.trainer)  # asked before the step, which advances the count
        if logged:
            self._step_mean.add(logs)
        accumulation = self._accumulation()
        self._micro_batches += 1
        last = self._micro_batches == accumulation
        with self._no_sync() if not last else nullcontext():
            self.manual_backward(loss / accumulation + self._touch_idle())
        if last:
            self._micro_batches = 0
            logs = self._step_optimizers(logged)
            if logged:
                logs |= self._step_mean.take()
            self.log_dict({f"train/{name}": value for name, value in logs.items()}, batch_size=1)
        return {"loss": loss.detach(), "figures": figures}

    def configure_optimizers(self) -> tuple[list[Optimizer], list[Scheduled]]:
        # The log-variance is in the group even if it is fixed, and then has no gradient: a run in which that is changed
        # can still resume, since an optimizer's state is stored by parameter position.
        groups = [[*self.decoder.parameters(), self.loss.logvar]]
        if self.train_encoder:
            codebook = [] if self.quantizer is None else [*self.quantizer.parameters()]
            groups = [[*self.encoder.parameters(), *groups[0], *codebook]]
        if self.loss.discriminator is not None:
            groups.append(list(self.loss.discriminator.parameters()))
        optimizers, schedulers = [], []
        for parameters, (make_optimizer, schedule) in zip(groups, self._recipes, strict=False):
            optimizer = make_optimizer(parameters)
            keep_settings(optimizer)
            optimizers.append(optimizer)
            schedulers.append(Scheduled(optimizer, schedule))
        return optimizers, schedulers

    def _losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        reconstruction, posterior = self.reconstruct(batch)
        trained = posterior if self.train_encoder else None
        return self.loss(batch["image"], reconstruction, trained, self.decoder.last_layer, self.global_step)

    def _accumulation(self) -> int:
        return self.trainer.datamodule.accumulation(self.trainer.world_size)  # type: ignore[attr-defined]

    def _no_sync(self) -> Any:
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def _touch_idle(self) -> Tensor | float:
        """Zero, through the idle discriminator: DistributedDataParallel needs a gradient for every parameter."""
        discriminator = self.loss.discriminator
        if discriminator is None or self.trainer.world_size == 1 or self.loss.adversarial_at(self.global_step):
            return 0.0
        return 0.0 * torch.stack([parameter.sum() for parameter in discriminator.parameters()]).sum()

    def _step_optimizers(self, logged: bool) -> dict[str, Tensor]:
        """Clip, step, advance the schedule, zero the gradients; for the discriminator once it has started."""
        optimizers = self.optimizers()
        generator, *others = optimizers if isinstance(optimizers, list) else [optimizers]
        norms = {}
        # Asked before the generator's step, which advances the count.
        if self.loss.adversarial_at(self.global_step):
            for optimizer in others:
                norms["discriminator_gradient"] = self._step(optimizer, self._uncounted_step, logged)
        else:
            for optimizer in others:
                optimizer.zero_grad()
        norms["gradient"] = self._step(generator, LightningOptimizer.step, logged)
        return {name: norm for name, norm in norms.items() if norm is not None}

    def _uncounted_step(self, optimizer: LightningOptimizer) -> None:
        """Lightning adds the steps of every optimizer to global_step; ours counts batches, so one must not be counted.

        This is what LightningOptimizer.step does, but for the counting.
        """
        self.trainer.strategy.optimizer_step(optimizer.optimizer, lambda: None)

    def _step(
        self, optimizer: LightningOptimizer, step: Callable[[LightningOptimizer], Any], logged: bool
    ) -> Tensor | None:
        """One step of one optimizer; returns the gradient's norm before clipping, if it is logged or clipped."""
        norm, clip = None, self._gradient_clip
        if logged or clip is not None:  # measuring takes a pass over all gradients
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            norm = total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
            if clip is not None:
                nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        step(optimizer)
        optimizer.zero_grad()
        for config in self.trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if isinstance(scheduler, Scheduled) and scheduler.optimizer is optimizer.optimizer:
                scheduler.step()
        return norm

    # ------------------------------------------------------------------ validation

    def evaluate(self, batch: Batch) -> Output:
        """What metrics see of a batch, in float32."""
        reconstruction, posterior = self.reconstruct(batch)
        images, reconstruction = batch["image"].float(), reconstruction.float()

        def losses() -> dict[str, Tensor]:
            with torch.autocast(images.device.type, enabled=False):
                return self.loss.per_image(images, reconstruction, posterior)

        return Output(reconstruction, posterior, losses)

    def on_validation_epoch_start(self) -> None:
        self.metrics.start(self.device)
        self._latent_sums = torch.zeros_like(self._latent_sums, device=home(self.device))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        output = self.evaluate(batch)
        self._latent_sums += latent_sums(output.posterior)
        self.metrics.update(batch, output)

    def on_validation_epoch_end(self) -> None:
        sums = self.trainer.strategy.reduce(self._latent_sums, reduce_op="sum")
        if not self.trainer.sanity_checking:
            self._latents = statistics(sums)
        self.log_dict(self.metrics.compute())

    @torch.no_grad()
    def images(self, batch: Batch) -> dict[str, Tensor]:
        """Images to show: input, reconstruction, their difference and decoded standard normal latents (or their codes).

        Each (N, C, H, W) in [-1, 1]; in the difference, gray means equal.
        """
        images = batch["image"]
        reconstruction, _ = self.reconstruct(batch)
        draws = _noise(self.encoder, batch, "prior")
        prior = self.decode(draws if self.quantizer is None else self.quantizer(draws).mode())
        pictures = {
            "input": images,
            "reconstruction": reconstruction,
            "difference": reconstruction - images,
            "prior": prior,
        }
        return {name: picture.float().clamp(-1.0, 1.0) for name, picture in pictures.items()}

    # ------------------------------------------------------------------ the checkpoint's facts

    def checkpoint_facts(self) -> dict[str, Any]:
        """The metadata of a checkpoint of this model: per-channel latent statistics, metrics of the last validation.

        `latents` is {"mean": [c floats], "std": [c floats]}, or None before the first validation.
        """
        try:
            current = self.trainer.callback_metrics
        except RuntimeError:  # no trainer has had this model yet
            current = {}
        validated = {name: float(value) for name, value in current.items() if name.startswith("val/")}
        return {"kind": "autoencoder", "latents": self._latents, "metrics": validated or self._validated}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        facts = checkpoint.get("ldm", {})
        self._latents = facts.get("latents")
        self._validated = dict(facts.get("metrics", {}))
        if is_untrained(checkpoint):
            # What is trained beside it, such as a discriminator, is this run's own.
            own = {name: value for name, value in self.state_dict().items() if name.startswith("loss.")}
            checkpoint["state_dict"] = own | checkpoint["state_dict"]
        done = checkpoint.get("global_step", 0)
        place_schedules(checkpoint, [done, max(0, done - self.loss.disc_start)])


def _noise(encoder: Encoder | TinyEncoder, batch: Batch, purpose: str) -> Tensor:
    """Standard normal of the latent's shape, addressed by the batch's sample numbers: (N, c, h, w)."""
    height, width = batch["image"].shape[2:]
    shape = (encoder.latent_channels, height // encoder.down_factor, width // encoder.down_factor)
    return batch["draws"].normal(purpose, shape)
