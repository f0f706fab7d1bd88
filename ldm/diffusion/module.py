"""Stage 2: trains a denoiser on latents from the cache. The autoencoder is never loaded here."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer
from torchmetrics import Metric

from ldm.data.datamodule import ElasticDataModule
from ldm.diffusion.conditioners.base import Conditioner, Conditioning, Keeping, dropped, require_conditioner
from ldm.diffusion.conditioners.token_transformer import TokenTransformer
from ldm.diffusion.masked_loss import MaskedLoss
from ldm.diffusion.metrics import Output, standard
from ldm.diffusion.objectives import Network, Objective
from ldm.errors import ConfigError
from ldm.optim.ema import EMA
from ldm.optim.optimizers import Scheduled, keep_settings, unscales
from ldm.ranges import Fraction, Positive
from ldm.runtime import fsdp
from ldm.runtime.step_metrics import StepMean, is_logged
from ldm.runtime.validation_metrics import ValidationMetrics

Batch = dict[str, Any]


def parts(denoiser: nn.Module) -> tuple[Network, Conditioner]:
    """The network and the conditioner of a denoiser, raw or averaged."""
    return cast(nn.ModuleDict, denoiser)["network"], cast(Conditioner, cast(nn.ModuleDict, denoiser)["conditioner"])


@runtime_checkable
class Constrained(Protocol):
    """A network whose weights are projected back onto a constraint after each optimizer step."""

    def constrain(self) -> None: ...


class Adapter(Protocol):
    """Freezes a denoiser, in place, and puts parameters beside its layers that are trained instead."""

    def __call__(self, denoiser: nn.ModuleDict) -> None: ...


class LatentDiffusion(LightningModule):
    """A conditional denoiser trained with an objective, and its moving average.

    A batch holds `latent` (N,C,h,w) float32, standardized, `draws` (its randomness, with the global batch size), and
    the keys that the conditioner reads.

    Args:
        network: net(x (N,C,h,w), noise_level (N,), conditioning) -> the shape of x.
        conditioner: batch -> conditioning of the network.
        objective: defines the loss; samplers need it later, too.
        optimizer: parameters -> optimizer.
        schedule: optimizer step (from 0) -> multiplier of the learning rate; None: constant.
        ema: model -> its moving average.
        label_dropout: fraction of rows trained without their conditioning, for classifier-free guidance; what a Joint
            keeps stays.
        gradient_clip: maximum gradient norm; None: no clipping.
        compile_blocks: compile the network's blocks with torch.compile for training; their names stay the same. The
            first step then takes a minute or more, and every later step is faster, especially on GPUs. With buckets
            this is done for each size.
        metrics: validation metrics by name, beside the standard ones of ldm/diffusion/metrics.py (loss, loss_ema,
            latent_std) or in place of the one of that name; null: without it.
        adapter: trained instead of the denoiser (ldm/interop/lora.py); None: all of the denoiser is trained.
        masked_loss: where errors count, for inpainting; None: everywhere alike.
    """

    def __init__(
        self,
        network: nn.Module,
        conditioner: nn.Module,
        objective: Objective,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        ema: Callable[[nn.Module], EMA],
        schedule: Callable[[int], float] | None = None,
        label_dropout: Fraction = 0.0,
        gradient_clip: Positive | None = None,
        compile_blocks: bool = False,
        metrics: Mapping[str, Metric | None] | None = None,
        adapter: Adapter | None = None,
        masked_loss: MaskedLoss | None = None,
    ) -> None:
        super().__init__()
        require_conditioner(conditioner)
        self.denoiser = nn.ModuleDict({"network": network, "conditioner": conditioner})
        self.adapter = adapter
        if adapter is not None:
            adapter(self.denoiser)
        self.objective = objective
        self.ema = ema(self.denoiser)
        self.make_optimizer = optimizer
        self.schedule = schedule
        self.label_dropout = label_dropout
        self.gradient_clip = gradient_clip
        self.compile_blocks = compile_blocks
        self.masked_loss = masked_loss
        self.metrics = ValidationMetrics(standard(), metrics)
        self._images_per_step = 0
        self._step_mean = StepMean()

    def configure_model(self) -> None:
        """If the strategy has a mesh of ranks: keep only this rank's rows of the denoiser and of its average."""
        if self.device_mesh is None:
            return
        mesh = self.device_mesh["data_parallel"]
        # Otherwise only autocast converts, as on one device.
        compute = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
        for denoiser in (self.denoiser, self.ema.average, *self.ema.extra):
            network, conditioner = cast(nn.ModuleDict, denoiser).values()
            blocks = _blocks(network, "lightning.strategy: FSDP2 gathers", "train it with ldm.training.strategies.DDP")
            # A constrained network normalizes its weights in float32 and casts them itself.
            fsdp.shard(network, mesh, blocks, None if isinstance(network, Constrained) else compute)
            deep = [part for part in conditioner.modules() if isinstance(part, TokenTransformer)]
            methods = ["null", "dropped"] if isinstance(conditioner, Keeping) else ["null"]
            fsdp.shard(conditioner, mesh, [layer for part in deep for layer in part.layers], methods=methods)
        fsdp.shard(self.objective, mesh, methods=["loss"])

    def on_fit_start(self) -> None:
        if self.compile_blocks:
            network, _ = self.denoiser.values()
            blocks = _blocks(network, "model.params.compile_blocks: torch.compile translates", "leave it out")
            # Blocks of one class share one recompilation limit, beyond which they would run uncompiled.
            limits: Any = torch._dynamo.config
            data = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning's own, set by fit
            bucketing = data.bucketing if isinstance(data, ElasticDataModule) else None
            sizes = 1 if bucketing is None else len(bucketing.sizes())
            limits.recompile_limit = max(limits.recompile_limit, 4 * len(blocks) * sizes)
            for block in blocks:
                # Made for each size: what serves them all would depend on which came first, as after a resume.
                block.compile(dynamic=False) if sizes > 1 else block.compile()
        plugin = self.trainer.precision_plugin
        scaled = isinstance(plugin, MixedPrecision) and plugin.scaler is not None
        if scaled and any(map(unscales, self.trainer.optimizers)):
            raise ConfigError(
                "model.params.optimizer.params.fused: in fp16 a fused optimizer undoes the loss scaling by itself, so "
                "gradients can be neither measured nor clipped before; leave it out, or use precision bf16-mixed"
            )

    def loss(self, network: Network, conditioning: Conditioning, batch: Mapping[str, Any]) -> Tensor:
        """The objective's losses of a batch's rows, with errors weighted as `masked_loss` says: (N,)."""
        weights = None if self.masked_loss is None else self.masked_loss(batch)
        return self.objective.loss(network, batch["latent"], conditioning, batch["draws"], weights)

    def total_loss(self, batch: Batch) -> Tensor:
        """The training loss, a scalar: mean over the batch, with label dropout."""
        latent, draws = batch["latent"], batch["draws"]
        network, conditioner = parts(self.denoiser)
        conditioning = conditioner(batch)
        if self.label_dropout > 0:
            chosen = draws.uniform("label_dropout") < self.label_dropout  # (N,)
            conditioning = dropped(conditioner, batch, len(latent)).where(chosen, conditioning)
        return self.loss(network, conditioning, batch).mean()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.total_loss(batch)
        self._images_per_step = batch["draws"].batch_size
        if is_logged(self.trainer):
            self._step_mean.add({"train/loss": loss})
        return loss

    def configure_gradient_clipping(self, optimizer: Optimizer, *_: Any, **__: Any) -> None:
        """Lightning's hook, once per global batch; its default refuses fused optimizers and does not support shards."""
        logged = is_logged(self.trainer)
        if logged:
            # Not in Lightning's progress bar, which would read it back and wait for the device.
            self.log_dict(self._step_mean.take(), batch_size=1)
        if self.gradient_clip is None and not logged:
            return  # measuring takes a pass over all gradients
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = fsdp.total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self.gradient_clip is not None:
            clip_grads_with_norm_(parameters, self.gradient_clip, norm)
        self.log("train/gradient", norm, batch_size=1)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Called by Lightning once per global batch, after accumulation, so the average's images are counted here."""
        super().optimizer_step(*args, **kwargs)
        self.ema.update(self.denoiser, self._images_per_step)
        network, _ = self.denoiser.values()
        if isinstance(network, Constrained):
            network.constrain()

    def evaluate(self, batch: Batch) -> Output:
        """What metrics see of a batch."""
        losses = []
        for denoiser in (self.denoiser, self.ema.average):
            network, conditioner = parts(denoiser)
            losses.append(self.loss(network, conditioner(batch), batch))
        return Output(*losses)

    def on_validation_epoch_start(self) -> None:
        self.metrics.start(self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.metrics.update(batch, self.evaluate(batch))

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.metrics.compute())

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        # The objective is included, since a weighting may have parameters. The average is not trained.
        parameters = [*self.denoiser.parameters(), *self.objective.parameters()]
        optimizer = self.make_optimizer([parameter for parameter in parameters if parameter.requires_grad])
        keep_settings(optimizer)
        scheduler = Scheduled(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def checkpoint_facts(self) -> dict[str, Any]:
        """The metadata of this module's checkpoints, in plain containers."""
        metrics = self.trainer.callback_metrics
        return {
            "kind": "diffusion",
            "latents": self.trainer.datamodule.manifest.to_dict(),  # type: ignore[attr-defined]  # Lightning's own
            "metrics": {name: float(value) for name, value in metrics.items() if name.startswith("val/")},
        }


def _blocks(network: nn.Module, asking: str, fix: str) -> Sequence[nn.Module]:
    """The network's blocks; ConfigError, naming who needs them and the fix, if it does not list them."""
    if isinstance(network, fsdp.InBlocks):
        return network.blocks()
    raise ConfigError(
        f"{asking} a network block by block, and {type(network).__name__} has no method blocks() that lists them; {fix}"
    )
