"""Makes later failures appear before the first step: everything that a run will use is tried once, without values.

    check           on torch's meta device, before there is a run folder: the adversarial branch, pictures, the averaged
                    network, guided denoising, the profiles of averages, optimizers and schedules
    Rehearsal       at the beginning of fit, with the run's own objects: whether its checkpoints can be loaded again

Validation and its metrics are tried on one real batch by Lightning's own sanity check (trainer.py).
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldm.autoencoder.module import AutoencoderKL
from ldm.checkpoints import state_tree
from ldm.config.targets import build
from ldm.diffusion.conditioners.base import dropped
from ldm.diffusion.module import LatentDiffusion, parts
from ldm.errors import CheckpointError, ConfigError, LdmError
from ldm.sampling.conditions import check_conditions
from ldm.sampling.guidance import classifier_free
from ldm.sampling.timesteps import default
from ldm.training import lightning_internals
from ldm.training.callbacks.previews import PREVIEW_STEPS, SampleLogger
from ldm.training.dry_run import place

Origin = Callable[[str], str]


def check(
    model: Any,
    tree: Mapping[str, Any],
    facts: Mapping[str, Any],
    batch: Mapping[str, Any],
    origin: Origin,
    trust: Sequence[str] = (),
) -> None:
    """Pass a batch without values through everything that training reaches after its first step.

    Args:
        model: of `dry_run.meta_model`; other models are checked only at the beginning of fit.
        tree: the configuration with every reference filled in.
        facts: of the data module (`data.facts()`).
        batch: of the data, without values (`data.meta_batch()`).
        origin: dotted key -> where it was written.
        trust: packages besides ldm's own that the configuration may name.

    Raises:
        ConfigError: something does not work; names the key.
    """
    steps = int(tree["lightning"]["trainer"]["max_steps"])
    if isinstance(model, AutoencoderKL):
        _first_stage(model, batch, steps, origin)
    elif isinstance(model, LatentDiffusion):
        _second_stage(model, batch, steps, facts["batch_size"], origin)
        _previews(model, tree, tuple(batch["latent"].shape[1:]), facts, origin, trust)
    else:
        return
    _optimizers(model, tree, steps, origin)


def _first_stage(model: AutoencoderKL, batch: Mapping[str, Any], steps: int, origin: Origin) -> None:
    images, loss = batch["image"], model.loss
    with _named("model", origin, "for its pictures, "):
        shown = model.images(dict(batch)).get("reconstruction", images)
        if shown.shape != images.shape:
            raise ConfigError(f"pictures {(*images.shape[1:],)} come back as {(*shown.shape[1:],)}")
    start = loss.disc_start
    if loss.discriminator is not None and start < steps:
        reconstruction, posterior = model.reconstruct(dict(batch))
        with _named("model.params.loss.params.discriminator", origin, f"from step {start} on, "):
            total, _ = loss(images, reconstruction, posterior, model.decoder.last_layer, start)
            # The rest of the backward pass is that of every step, and fails in the first one.
            trained = [parameter for parameter in loss.discriminator.parameters() if parameter.requires_grad]
            torch.autograd.grad(total, trained, allow_unused=True)


def _second_stage(
    model: LatentDiffusion, batch: Mapping[str, Any], steps: int, batch_size: int, origin: Origin
) -> None:
    latent, rows = batch["latent"], len(batch["latent"])
    network, conditioner = parts(model.ema.average)  # of which the others are copies
    with _named("model", origin, "in validation, "), torch.no_grad():
        model.loss(network, conditioner(batch), batch)
    with _named("model", origin, "for its samples, "), torch.no_grad():
        denoise = partial(model.objective.denoise, network)
        guided = classifier_free(denoise, conditioner(batch), dropped(conditioner, batch, rows), 2.0)
        guided(latent, torch.tensor(model.objective.t_max, device="cpu"))
    for profile in model.ema.profiles:
        for seen in (0, batch_size, batch_size * steps):
            with _named("model.params.ema", origin, f"after {seen} images, "):
                _within(profile(seen, batch_size), 1.0, "the old average's share")


def _previews(
    model: LatentDiffusion,
    tree: Mapping[str, Any],
    shape: tuple[int, int, int],
    facts: Mapping[str, Any],
    origin: Origin,
    trust: Sequence[str],
) -> None:
    """Check the conditions and steps of previews; `SampleLogger` itself would do so only after a cache is built."""
    reads = parts(model.denoiser)[1].keys
    objective = build(tree["model"]["params"]["objective"], trust)  # the model's own has no values
    for name, node in (tree["lightning"].get("callbacks") or {}).items():
        if node is None or node["target"] != f"{SampleLogger.__module__}.{SampleLogger.__name__}":
            continue
        params, key = node.get("params") or {}, f"lightning.callbacks.{name}.params"
        with _named(f"{key}.steps", origin):
            schedule = build(params["schedule"], trust) if params.get("schedule") else default
            schedule(objective, params.get("steps", PREVIEW_STEPS), shape)
        for given, conditions in (
            ("classes", [{"class_label": label} for label in params.get("classes") or ()]),
            ("conditions", params.get("conditions") or []),
        ):
            if conditions:
                with _named(f"{key}.{given}", origin):
                    check_conditions(conditions, reads, facts.get("num_classes"))


def _optimizers(model: Any, tree: Mapping[str, Any], steps: int, origin: Origin) -> None:
    """Construct the optimizers and schedules for the model's real parameter groups."""
    params = tree["model"]["params"]
    stand_in = _with_host_parameters(model)
    second = "discriminator_" if params.get("discriminator_optimizer") else ""
    if isinstance(stand_in, AutoencoderKL) and stand_in.loss.discriminator is not None:
        discriminator, stand_in.loss.discriminator = stand_in.loss.discriminator, None
        _configured(stand_in, "model.params.optimizer", "model.params.schedule", steps, origin)
        stand_in.loss.discriminator = discriminator
        keys = f"model.params.{second}optimizer", "model.params.discriminator_schedule"
    else:
        keys = "model.params.optimizer", "model.params.schedule"
    _configured(stand_in, *keys, steps, origin)


def _configured(model: Any, optimizer_key: str, schedule_key: str, steps: int, origin: Origin) -> None:
    with _named(optimizer_key, origin, "with this model's parameters, "):
        made = model.configure_optimizers()
    if isinstance(made, dict):
        optimizers, schedulers = [made["optimizer"]], [made["lr_scheduler"]["scheduler"]]
    else:
        optimizers, schedulers = made
    for optimizer in optimizers:
        _learns(optimizer, optimizer_key, origin)
    for scheduler in schedulers:
        assert isinstance(scheduler, LambdaLR)
        for factor in scheduler.lr_lambdas:
            for step in (0, steps - 1, steps):
                with _named(schedule_key, origin, f"at step {step}, "):
                    _within(factor(step), math.inf, "the factor of the learning rate")


def _learns(optimizer: Optimizer, key: str, origin: Origin) -> None:
    with _named(key, origin):
        if not any(group.get("initial_lr", group["lr"]) > 0 for group in optimizer.param_groups):
            raise ConfigError("a learning rate of 0 trains nothing; expected a number above 0")


def _within(value: float, highest: float, what: str) -> None:
    if not (math.isfinite(value) and 0 <= value <= highest):
        limit = "of 0 or more" if math.isinf(highest) else f"from 0 to {highest:g}"
        raise ConfigError(f"{what}: expected a number {limit}, found {value}")


def _with_host_parameters(model: Any) -> Any:
    """A copy whose parameters have their shapes but share one number: fused optimizers refuse the meta device."""
    stand_in = copy.deepcopy(model)
    for module in stand_in.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            zeros = torch.zeros((), dtype=parameter.dtype, device="cpu").expand(parameter.shape)
            setattr(module, name, nn.Parameter(zeros, parameter.requires_grad))
    return stand_in


@contextmanager
def _named(key: str, origin: Origin, when: str = "") -> Iterator[None]:
    """Within the block, whatever is raised becomes a ConfigError of `key`."""
    try:
        yield
    except Exception as error:
        text = (
            str(error) if isinstance(error, LdmError) else f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        )
        raise ConfigError(f"{key} ({place(key, origin)}): {when}it does not work: {text}") from error


class Rehearsal(pl.Callback):
    """Assembles a checkpoint before the first step, and checks that it could be loaded again.

    Nothing is copied or written, and no random number drawn. This takes a few milliseconds, or the time to gather the
    weights if they are sharded.

    Raises:
        ConfigError: a callback's state, or what the model adds, is more than plain data; names the callback.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        try:
            state = lightning_internals.assemble_checkpoint(trainer)
            # Tensors can be saved, sharded ones in their own way (runtime/fsdp.py): what is checked is everything else.
            state_tree.check_plain(
                state_tree.replaced(state, lambda key, leaf: 0 if isinstance(leaf, torch.Tensor) else leaf)
            )
        except CheckpointError as error:
            raise ConfigError(_guilty(trainer, str(error))) from error
        except LdmError:
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            raise ConfigError(f"model, lightning.callbacks: a checkpoint cannot be put together: {text}") from error


def _guilty(trainer: pl.Trainer, text: str) -> str:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it where mypy does not see
        if f"key callbacks.{callback.state_key}" in text:
            return f"lightning.callbacks ({type(callback).__qualname__}): its state cannot be saved: {text}"
    return f"this run could not be saved: {text}"
