"""Guidance: denoisers built from denoisers. All act on the estimated x0, so they work for any objective and sampler.

x0 is affine in the network's prediction, whatever that is, so extrapolating one extrapolates the other. That also holds
per channel: if `channels` is given, only the first `channels` channels are guided, and the others are left unguided.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.diffusion.conditioners.base import Conditioning, dropped, kept_keys
from ldm.diffusion.objectives import Objective
from ldm.errors import ConfigError
from ldm.latents.manifest import same_encoder
from ldm.sampling.conditions import Condition, check_conditions, columns, rows
from ldm.sampling.precision import network

if TYPE_CHECKING:  # generate.py builds on this file
    from ldm.sampling.pipeline import Pipeline

# denoise(x (N, ...), t () on the host, conditioning of N rows) -> x0, and the same with the conditioning bound.
ConditionalDenoiser = Callable[[Tensor, Tensor, Conditioning], Tensor]
Denoiser = Callable[[Tensor, Tensor], Tensor]


def classifier_free(
    denoise: ConditionalDenoiser,
    conditioning: Conditioning,
    null: Conditioning,
    scale: float,
    rescale: float = 0.0,
    channels: int | None = None,
) -> Denoiser:
    """x0 = null + scale (conditional - null) (Ho and Salimans 2022, eq. 6, with their w = scale - 1).

    One network call on 2N rows; at scale 1, the conditional denoiser itself, one call on N rows.

    Args:
        rescale: 0 ... 1: how far each row's standard deviation is rescaled to that of the conditional x0 (Lin et al.
            2024, section 3.4, there on v); without it large scales overexpose images.
        channels: number of guided channels; None: all, as usual. DiT and LightningDiT report results with the first 3.
    """
    if scale == 1:
        return lambda x, t: denoise(x, t, conditioning)
    both = conditioning.cat(null)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        # lerp(null, conditional, scale) in one pass.
        whole, unconditional_x0 = denoise(torch.cat([x, x]), t, both).chunk(2)
        conditional_x0 = whole[:, :channels]
        x0 = torch.lerp(unconditional_x0[:, :channels], conditional_x0, scale)
        if rescale > 0:
            x0 = x0 * (1 - rescale + rescale * _spread(conditional_x0) / _spread(x0))
        return _completed(x0, whole)

    return guided


def autoguidance(denoise: Denoiser, guide: Denoiser, scale: float, channels: int | None = None) -> Denoiser:
    """x0 = guide + scale (denoise - guide): away from the errors of a smaller or less trained model.

    Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself", eq. 3.
    """

    def guided(x: Tensor, t: Tensor) -> Tensor:
        better = denoise(x, t)
        return _completed(torch.lerp(guide(x, t)[:, :channels], better[:, :channels], scale), better)

    return guided


def limited_interval(
    guided: Denoiser, plain: Denoiser, objective: Objective, interval: tuple[float, float]
) -> Denoiser:
    """Guidance only while low < sigma / alpha <= high; `plain` elsewhere (Kynkäänniemi et al. 2024)."""
    low, high = interval

    def chosen(x: Tensor, t: Tensor) -> Tensor:
        ratio = float(objective.sigma(t) / objective.alpha(t))  # t is on the host, so this does not wait for the device
        return (guided if low < ratio <= high else plain)(x, t)

    return chosen


def classifier(
    denoise: Denoiser,
    objective: Objective,
    log_probability: Callable[[Tensor, Tensor], Tensor],
    scale: float,
    channels: int | None = None,
) -> Denoiser:
    """x0 + scale sigma^2 / alpha grad log p(class | x_t) (Dhariwal and Nichol 2021, algorithm 2, there on eps).

    Args:
        log_probability: (x (N, ...), t ()) -> (N,), of each row's target class, by a classifier of noisy latents.
    """

    def guided(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = objective.alpha(t), objective.sigma(t)
        x0 = denoise(x, t)
        if float(alpha) == 0:
            return x0  # pure noise says nothing about the class
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(log_probability(leaf, t).sum(), leaf)
        return _completed((x0 + scale * sigma**2 / alpha * slope)[:, :channels], x0)

    return guided


def _completed(first: Tensor, x0: Tensor) -> Tensor:
    """`first` (N, c, ...) as the first channels of `x0` (N, C, ...)."""
    channels = first.shape[1]
    return first if channels == x0.shape[1] else torch.cat([first, x0[:, channels:]], dim=1)


def _spread(x: Tensor) -> Tensor:
    """The standard deviation of each row, (N, 1, ...)."""
    return x.flatten(1).std(1).reshape(-1, *[1] * (x.ndim - 1))


_ALWAYS_CONDITIONED = (
    "this model was never trained without its conditions (model.params.label_dropout: 0, and no dropout of each of "
    "several conditioners)"
)


@dataclass(frozen=True)
class Guidance:
    """How strongly samples are guided, and away from what (the functions above).

    Args:
        scale: 1 = no guidance; above 1: away from the unconditional prediction, or from that of `guide`, at twice the
            cost. With a classifier: the factor on its gradient, 0 = no guidance.
        rescale: 0 ... 1: how far each sample's standard deviation is rescaled to that of the unguided one.
        interval: (low, high), the ratios sigma / alpha between which samples are guided.
        guide: a smaller or less trained model of the same latents and path (autoguidance); it may be unconditional.
        classifier: of noisy latents: (x (N,c,h,w), t (), labels (N,)) -> log p(label | x), (N,). Guides any model,
            including one that was trained without classes; None: no classifier.
        channels: number of leading latent channels that are guided, the others being left unguided; None: all.
        negative: what samples are guided away from, such as {"caption": "blurred"}; keys that it lacks are each row's
            own. None: from the unconditional prediction, which a model must then have learned.

    Raises:
        ConfigError: values that are out of range or contradict one another.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, math.inf)
    guide: "Pipeline | None" = None
    classifier: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    channels: int | None = None
    negative: Condition | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ConfigError(f"guidance scale: expected a finite number, found {self.scale:g}")
        if not 0 <= self.rescale <= 1:
            raise ConfigError(f"guidance rescale: expected 0 to 1, found {self.rescale:g}")
        low, high = self.interval
        if not 0 <= low < high:
            raise ConfigError(
                f"guidance interval: expected 0 <= LOW < HIGH, as ratios sigma / alpha, found {low:g} and {high:g}"
            )
        if self.channels is not None and self.channels < 1:
            raise ConfigError(f"guidance channels: expected 1 or more, found {self.channels}")
        others = [name for name in ("guide", "classifier") if getattr(self, name) is not None]
        if self.rescale and others:
            raise ConfigError(f"guidance rescale: only for classifier-free guidance; leave out it or {others[0]}")
        if len(others) == 2:
            raise ConfigError("guidance: found both another model and a classifier; leave one of them out")
        if self.negative is not None and (others or self.scale == 1):
            reason = f"leave out it or {others[0]}" if others else "name a scale other than 1, which is no guidance"
            raise ConfigError(f"guidance negative: only for classifier-free guidance; {reason}")

    def check(self, pipeline: "Pipeline", conditional: bool, times: Tensor) -> None:
        """ConfigError if there is nothing to guide with, or the model never learned the unconditional prediction.

        Args:
            pipeline: the model to guide.
            conditional: whether conditions are requested.
            times: of the sampler; the guiding model must have the same noise levels at these times.
        """
        if self.channels is not None and self.channels > (there := pipeline.manifest.plan.shape[0]):
            raise ConfigError(
                f"guidance channels: expected 1 to {there}, the channels of this model's latents, found {self.channels}"
            )
        if self.guide is not None:
            self._check_guide(pipeline, self.guide, conditional, times)
        elif self.classifier is not None and not conditional:
            raise ConfigError("guidance by a classifier: no classes are requested; request some, or leave it out")
        elif self.classifier is None and self.scale != 1:
            self._check_conditions(pipeline, conditional)
        if not conditional:
            _require_unconditional(pipeline, "conditions: found none, but")

    def _check_conditions(self, pipeline: "Pipeline", conditional: bool) -> None:
        found = f"guidance scale: found {self.scale:g}, but"
        if not pipeline.conditioner.keys:
            raise ConfigError(f"{found} this model was trained without conditions; expected 1, or a guiding model")
        if not conditional:
            raise ConfigError(f"{found} no conditions are requested; request some, or leave the scale at 1")
        if self.negative is not None:
            reads = pipeline.conditioner.keys
            if unknown := [key for key in self.negative if key not in reads]:
                raise ConfigError(f"guidance negative: {unknown[0]}: the model reads {', '.join(reads)} alone")
            check_conditions([self.negative], [*self.negative], pipeline.manifest.plan.num_classes)
        elif not pipeline.knows_null:
            raise ConfigError(f"{found} {_ALWAYS_CONDITIONED}; expected 1, or a guiding model")

    def _check_guide(self, pipeline: "Pipeline", guide: "Pipeline", conditional: bool, times: Tensor) -> None:
        ours, theirs = pipeline.manifest, guide.manifest
        reads = pipeline.conditioner.keys, guide.conditioner.keys
        found = guide.origin.get("checkpoint", "the guiding model")
        same = same_encoder(ours.plan.autoencoder, theirs.plan.autoencoder)
        if not same or (ours.plan.shape, ours.mean, ours.std) != (theirs.plan.shape, theirs.mean, theirs.std):
            raise ConfigError(f"{found}: was trained on other latents than the model to guide")
        if not {*reads[1]} <= {*reads[0]}:
            wanted, given = (", ".join(keys) or "no conditions" for keys in (reads[1], reads[0]))
            raise ConfigError(f"{found}: reads {wanted}, the model to guide {given}")
        if not conditional:
            _require_unconditional(guide, f"{found}: conditions: found none, but")
        classes = ours.plan.num_classes, theirs.plan.num_classes
        if "class_label" in reads[1] and classes[1] != classes[0]:
            raise ConfigError(f"{found}: was trained with {classes[1]} classes, the model to guide with {classes[0]}")
        for name in ("alpha", "sigma"):
            mine, other = (getattr(one.objective, name)(times) for one in (pipeline, guide))
            if not torch.allclose(mine, other):
                raise ConfigError(f"{found}: uses another path from data to noise than the model to guide")

    def denoiser(
        self,
        pipeline: "Pipeline",
        batch: Mapping[str, Any] | None,
        number: int,
        within: Callable[[ConditionalDenoiser], ConditionalDenoiser] = lambda denoise: denoise,
    ) -> Denoiser:
        """The guided denoiser of `number` rows.

        Args:
            batch: the rows' conditions as columns of a batch, on the pipeline's device; None: unconditional.
            within: how each network is called, such as window by window (tiled.py).
        """
        conditional = within(partial(pipeline.objective.denoise, network(pipeline)))
        conditioner = pipeline.conditioner
        null = conditioner.null(number) if batch is None else dropped(conditioner, batch, number)
        conditioning = null if batch is None or not conditioner.keys else conditioner(batch)
        plain = classifier_free(conditional, conditioning, null, 1.0)
        if self.guide is not None:
            guide = Guidance().denoiser(self.guide, batch, number, within)
            guided = autoguidance(plain, guide, self.scale, self.channels)
        elif self.classifier is not None and batch is not None:
            sees, labels = self.classifier, batch["class_label"]
            guided = classifier(plain, pipeline.objective, lambda x, t: sees(x, t, labels), self.scale, self.channels)
        elif batch is not None:
            away = null if self.negative is None else conditioner(self._negated(batch, number, pipeline.device))
            guided = classifier_free(conditional, conditioning, away, self.scale, self.rescale, self.channels)
        else:
            guided = plain
        if self.interval == (0.0, math.inf):
            return guided
        return limited_interval(guided, plain, pipeline.objective, self.interval)

    def _negated(self, batch: Mapping[str, Any], number: int, device: torch.device) -> dict[str, Any]:
        """The rows' conditions, with those of `negative` in their place."""
        assert self.negative is not None
        return {**batch, **rows(columns([self.negative] * number), slice(None), device)}


def _require_unconditional(pipeline: "Pipeline", found: str) -> None:
    """ConfigError, which begins with `found`, unless the model can do without conditions."""
    if pipeline.conditioner.keys and not pipeline.knows_null:
        raise ConfigError(f"{found} {_ALWAYS_CONDITIONED}; request some")
    if kept := kept_keys(pipeline.conditioner):
        raise ConfigError(f"{found} this model was never trained without {', '.join(kept)}; request some")
