"""Warnings about a run that trains, but not well: what was seen, the key to turn, and a section of docs/healthy.md."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from ldm.autoencoder.module import AutoencoderKL
from ldm.diffusion.module import LatentDiffusion
from ldm.ranges import CountOrZero
from ldm.runtime.step_metrics import was_logged
from ldm.training.callbacks.step_callback import StepCallback

PAGE = "docs/healthy.md"
LOWEST = "lowest "
"""Before the name of a metric: the lowest value that this run has had."""
TRAINED = ("train/discriminator", "train/logits_real", "train/logits_fake")
"""Metrics of training that are judged, as their means over the logged steps since the last validation."""
FOLLOWED = ("val/rec_loss", "val/loss")
"""Metrics of which the lowest value is kept."""
LOGARITHM = "the loss is a logarithm"
"""Read as 1 where stage 2's weighting is learned (Kendall et al. 2018, arXiv:1705.07115; EDM2)."""

Read = Callable[[str], float]
"""The value of a metric; NaN, which is neither above nor below anything, if it is not logged."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Symptom:
    """What a validation may show.

    Attributes:
        section: of docs/healthy.md, as an anchor.
        seen: the metrics -> what is to be said, without the link; None: the run is healthy in this respect.
        in_a_row: validations that have to show it before it is said.
    """

    section: str
    seen: Callable[[Read], str | None]
    in_a_row: int = 1


def collapsed(read: Read) -> str | None:
    """No channel holds anything of the image: by the definition of `dead_channels`, under 0.005 nats a value."""
    if not read("val/dead_channels") >= 1:
        return None
    return (
        f"posterior collapse: all latent channels are dead (val/dead_channels 1, val/kl {read('val/kl'):.3g}), so the "
        "decoder learns no more than an average picture; lower model.params.loss.params.kl_weight"
    )


def dead(read: Read) -> str | None:
    """Some channels hold nothing. One is enough to say so: it costs stage 2 as much as any other."""
    if not 0 < (share := read("val/dead_channels")) < 1:
        return None
    return (
        f"{share:.0%} of the latent channels are dead (val/dead_channels {share:.3g}): stage 2 would learn to make "
        "noise in them; lower model.params.loss.params.kl_weight, or the latent_channels of encoder and decoder"
    )


def exploding(read: Read) -> str | None:
    """Latents far outside of the prior. Published Gaussian autoencoders have 0.7 to 5.5 (1 / their scale factor)."""
    if not (std := read("val/latent_std")) > 10:
        return None
    return (
        f"the latents are exploding: their standard deviation is {std:.3g} (val/latent_std), the prior's is 1; raise "
        "model.params.loss.params.kl_weight"
    )


def saturated(read: Read) -> str | None:
    """At chance the discriminator's loss is 1 (hinge) or 0.7 (logistic); below 0.1 it is sure of nearly every patch.

    A negative loss is one of another kind.
    """
    if not 0 <= (loss := read("train/discriminator")) < 0.1:
        return None
    gap = read("train/logits_real") - read("train/logits_fake")
    return (
        f"the discriminator is saturated: since the last validation its loss is {loss:.2g} (train/discriminator) and "
        f"its logits of real and reconstructed images lie {gap:.3g} apart; lower its learning rate "
        "(model.params.discriminator_optimizer), or start it later (model.params.loss.params.disc_start)"
    )


def not_standardized(read: Read) -> str | None:
    """A factor of two: held-out images differ from those that the statistics are of, but not by that much."""
    std = read("val/latent_std")
    if not (std < 0.5 or std > 2):
        return None
    return (
        f"the latents are not near unit variance: a channel's standard deviation is {std:.3g} (val/latent_std), so "
        "noise levels do not mean what they should; the held-out images are of another kind than those trained on "
        "(data.params.validation), or the data module does not standardize"
    )


def ratio(value: float, other: float, read: Read) -> float:
    """Of two losses, whether or not they are logarithms, which are near zero where nothing is wrong, or below; or NaN.

    exp(u) is the mean error of a level where e / exp(u) + u is least: 1 + u.
    """
    if read(LOGARITHM) == 1:
        return math.exp(min(value - other, 700.0))  # NaN stays NaN; beyond it the exponential overflows
    return value / other if other > 0 else math.nan


def average_worse(read: Read) -> str | None:
    """By more than a hundredth: once the learning rate has decayed, raw and averaged differ by less, either way."""
    raw, averaged = read("val/loss"), read("val/loss_ema")
    if not ratio(averaged, raw, read) > 1.01:
        return None
    return (
        f"the averaged weights, with which samples are made, have long been worse than the raw ones (val/loss_ema "
        f"{averaged:.4g}, val/loss {raw:.4g}); shorten their memory (model.params.ema.params.profile)"
    )


def risen(name: str, factor: float) -> Callable[[Read], str | None]:
    """More than `factor` times the lowest that the run has had.

    Stage 1: 1.5, since the start of a discriminator raises the error by a part of this. Stage 2: 1.2, since the loss
    of unit variance varies little: v prediction, for example, from 1 (knows nothing) to about 0.4.
    """

    def seen(read: Read) -> str | None:
        value, lowest = read(name), read(LOWEST + name)
        if not ratio(value, lowest, read) > factor:
            return None
        return (
            f"{name} is {value:.4g}, and was {lowest:.4g}: training undoes what it had learned; lower "
            "model.params.optimizer.params.lr, lengthen its warm-up, or clip gradients (model.params.gradient_clip)"
        )

    return seen


SYMPTOMS: dict[type, tuple[Symptom, ...]] = {
    AutoencoderKL: (
        Symptom("posterior-collapse", collapsed),
        Symptom("dead-latent-channels", dead),
        Symptom("exploding-latents", exploding),
        Symptom("saturated-discriminator", saturated),
        Symptom("learning-rate-too-high", risen("val/rec_loss", 1.5)),
    ),
    LatentDiffusion: (
        Symptom("latents-not-near-unit-variance", not_standardized),
        # One that starts without memory is behind for a moment, where the loss falls fast.
        Symptom("averaged-weights-worse-than-raw", average_worse, in_a_row=3),
        Symptom("learning-rate-too-high", risen("val/loss", 1.2)),
    ),
}


class Health(StepCallback):
    """Looks at the metrics of each validation, and warns of every symptom once, until it has gone and come back.

    All ranks have the same metrics; the main one speaks. Nothing is read from the device but at a validation.

    Args:
        after: optimizer steps before which nothing is judged: the latents of an untrained encoder say little.
    """

    def __init__(self, after: CountOrZero = 300) -> None:
        super().__init__()
        self._after = after
        self._in_a_row: dict[str, int] = {}
        self._lowest: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self._in_a_row, "lowest": self._lowest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._in_a_row, self._lowest = dict(state_dict["in_a_row"]), dict(state_dict["lowest"])

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        if was_logged(trainer):
            found = {name: trainer.callback_metrics[name] for name in TRAINED if name in trainer.callback_metrics}
            self._sums = {name: value + self._sums.get(name, 0.0) for name, value in found.items()}
            self._steps += bool(found)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        metrics = {**self._metrics(trainer.callback_metrics), LOGARITHM: float(_learns_its_weighting(pl_module))}
        if trainer.global_step < self._after:
            return
        for kind, symptoms in SYMPTOMS.items():
            if isinstance(pl_module, kind):
                for symptom in symptoms:
                    self._judge(symptom, metrics, trainer)

    def _metrics(self, logged: Mapping[str, Tensor]) -> dict[str, float]:
        validated = {name: float(value) for name, value in logged.items() if name.startswith("val/")}
        trained = {name: float(value) / self._steps for name, value in self._sums.items()}
        self._sums, self._steps = {}, 0
        for name in FOLLOWED:
            self._lowest[name] = min(self._lowest.get(name, math.inf), validated.get(name, math.inf))
        return {**validated, **trained, **{LOWEST + name: value for name, value in self._lowest.items()}}

    def _judge(self, symptom: Symptom, metrics: Mapping[str, float], trainer: pl.Trainer) -> None:
        text = symptom.seen(lambda name: metrics.get(name, math.nan))
        row = self._in_a_row[symptom.section] = self._in_a_row.get(symptom.section, 0) + 1 if text else 0
        if row == symptom.in_a_row and trainer.is_global_zero:
            log.warning("step %d: %s; see %s#%s", trainer.global_step, text, PAGE, symptom.section)


def _learns_its_weighting(module: pl.LightningModule) -> bool:
    return isinstance(module, LatentDiffusion) and any(True for _ in module.objective.parameters())
