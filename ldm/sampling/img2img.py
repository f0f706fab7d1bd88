"""What steers a sample beside its seed and class: guidance, and a picture to begin with."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.sources.folder import read_image
from ldm.data.transforms import EvalTransform
from ldm.errors import ConfigError
from ldm.latents.manifest import Manifest
from ldm.sampling.guidance import Denoiser, autoguidance, classifier, classifier_free, within

if TYPE_CHECKING:  # generate.py builds on this file
    from ldm.sampling.generate import Pipeline


_ALWAYS_TOLD = "this model never saw a picture without its class (model.params.label_dropout: 0)"


@dataclass(frozen=True)
class Guidance:
    """How strongly samples are led, and away from what (diffusion/guidance.py).

    Args:
        scale: 1 = not at all; above: away from no class, or from `worse`, at twice the cost. Of a classifier: the
            factor on its gradient, 0 = not at all.
        rescale: 0 ... 1: how far each sample's spread is brought back to the unguided one's.
        above, up_to: the ratios sigma / alpha between which samples are led.
        worse: a smaller or less trained model of the same latents and path (autoguidance); None: no class.
        classifier: of noisy latents: (x (N,c,h,w), t (), labels (N,)) -> log p(label | x), (N,). Leads any model,
            also one that was trained without classes; None: the model alone.
        channels: of the latents, the first so many are led, and the others are as without guidance; None: all.

    Raises:
        ConfigError: values out of range, or that contradict one another.
    """

    scale: float = 1.0
    rescale: float = 0.0
    above: float = 0.0
    up_to: float = math.inf
    worse: "Pipeline | None" = None
    classifier: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ConfigError(f"guidance scale: expected a finite number, found {self.scale:g}")
        if not 0 <= self.rescale <= 1:
            raise ConfigError(f"guidance rescale: expected 0 to 1, found {self.rescale:g}")
        if not 0 <= self.above < self.up_to:
            raise ConfigError(
                f"guidance interval: expected 0 <= LOW < HIGH, as ratios sigma / alpha, "
                f"found {self.above:g} and {self.up_to:g}"
            )
        if self.channels is not None and self.channels < 1:
            raise ConfigError(f"guidance channels: expected 1 or more, found {self.channels}")
        others = [name for name in ("worse", "classifier") if getattr(self, name) is not None]
        if self.rescale and others:
            raise ConfigError(f"guidance rescale: belongs to classifier-free guidance; leave out it or {others[0]}")
        if len(others) == 2:
            raise ConfigError("guidance: by a worse model or by a classifier; leave one of them out")

    def check(self, pipeline: "Pipeline", told: bool, times: Tensor) -> None:
        """ConfigError where there is nothing to lead with, or nothing that was learned of no class.

        Args:
            pipeline: what is to be led.
            told: whether classes are asked for.
            times: of the sampler; a worse model has to speak of the same noise levels there.
        """
        if self.channels is not None and self.channels > (there := pipeline.manifest.plan.shape[0]):
            raise ConfigError(
                f"guidance channels: expected 1 to {there}, the channels of this model's latents, found {self.channels}"
            )
        if self.worse is not None:
            self._check_worse(pipeline, self.worse, times)
        elif self.classifier is not None and not told:
            raise ConfigError("guidance by a classifier: no classes are asked for; ask for some, or leave it out")
        elif self.classifier is None and self.scale != 1:
            self._check_classes(pipeline, told)
        if pipeline.num_classes is not None and not told and pipeline.label_dropout == 0:
            raise ConfigError(f"classes: found none, but {_ALWAYS_TOLD}; ask for some")

    def _check_classes(self, pipeline: "Pipeline", told: bool) -> None:
        found = f"guidance scale: found {self.scale:g}, but"
        if pipeline.num_classes is None:
            raise ConfigError(f"{found} this model was trained without classes; expected 1, or a worse model as well")
        if not told:
            raise ConfigError(f"{found} no classes are asked for; ask for some, or leave the scale at 1")
        if pipeline.label_dropout == 0:
            raise ConfigError(f"{found} {_ALWAYS_TOLD}; expected 1, or a worse model as well")

    def _check_worse(self, pipeline: "Pipeline", worse: "Pipeline", times: Tensor) -> None:
        ours, theirs = pipeline.manifest, worse.manifest
        classes = pipeline.num_classes, worse.num_classes
        found = worse.origin.get("checkpoint", "the worse model")
        same = ours.plan.autoencoder["weights"] == theirs.plan.autoencoder["weights"]
        if not same or (ours.plan.shape, ours.mean, ours.std) != (theirs.plan.shape, theirs.mean, theirs.std):
            raise ConfigError(f"{found}: was trained on other latents than the model that it is to guide")
        if classes[1] is not None and classes[1] != classes[0]:
            raise ConfigError(f"{found}: knows {classes[1]} classes, the model that it is to guide {classes[0]}")
        for name in ("alpha", "sigma"):
            mine, other = (getattr(one.objective, name)(times) for one in (pipeline, worse))
            if not torch.allclose(mine, other):
                raise ConfigError(f"{found}: noises latents in another way than the model that it is to guide")

    def denoiser(self, pipeline: "Pipeline", labels: Tensor | None, number: int) -> Denoiser:
        """For `number` rows of the classes `labels` (number,), None: of no class."""
        conditional = partial(pipeline.objective.denoise, pipeline.denoiser["network"])
        null = pipeline.conditioner.null(number)
        told = null if labels is None else pipeline.conditioner({"class_label": labels})
        plain = classifier_free(conditional, told, null, 1.0)
        if self.worse is not None:
            guided = autoguidance(plain, Guidance().denoiser(self.worse, labels, number), self.scale, self.channels)
        elif self.classifier is not None and labels is not None:
            sees, wanted = self.classifier, labels
            guided = classifier(plain, pipeline.objective, lambda x, t: sees(x, t, wanted), self.scale, self.channels)
        elif labels is not None:
            guided = classifier_free(conditional, told, null, self.scale, self.rescale, self.channels)
        else:
            guided = plain
        if self.above == 0 and math.isinf(self.up_to):
            return guided
        return within(guided, plain, pipeline.objective, self.above, self.up_to)


@dataclass(frozen=True)
class Original:
    """A picture that samples begin with.

    Args:
        image: (C,H,W) float in [-1, 1], of the size that the model makes.
        strength: 0 < strength <= 1: the share of the way to noise that it goes, hence of the sampler's steps; what it
            keeps of the picture is the rest.
        free: (H,W) bool: what may change; the rest stays as it is, pixel for pixel. None: all of it.

    Raises:
        ConfigError: a strength that there is not, or a mask that frees nothing.
    """

    image: Tensor
    strength: float = 1.0
    free: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ConfigError(f"strength: expected more than 0 and at most 1, found {self.strength:g}")
        if self.free is not None and not bool(self.free.any()):
            raise ConfigError("mask: all of it is black, so nothing is to be painted; white is what may change")

    @classmethod
    def read(cls, manifest: Manifest, image: Path, strength: float, mask: Path | None = None) -> "Original":
        """From files, brought to the size of the model's pictures; of the mask, white is what may change.

        Raises:
            ConfigError: a mask of another size than the picture.
            DataError: a file that cannot be read.
        """
        pixels = manifest.plan.pixels
        transform = EvalTransform(pixels["resolution"])
        picture, free = read_image(image), None
        if mask is not None:
            stencil = read_image(mask)
            if stencil.size != picture.size:
                raise ConfigError(
                    f"{mask}: expected the size of {image}, {picture.width} x {picture.height}, found "
                    f"{stencil.width} x {stencil.height}"
                )
            free = transform(stencil.convert("L"))[0] > 0
        return cls(transform(picture.convert("L" if pixels["channels"] == 1 else "RGB")), strength, free)

    def times(self, times: Tensor) -> Tensor:
        """Of a sampler's (steps + 1,) times those that are left, at least one step."""
        steps = max(1, round(self.strength * (len(times) - 1)))
        return times[-steps - 1 :]

    def kept(self, shape: tuple[int, int, int]) -> Tensor | None:
        """Where a latent (c, h, w) stays as it is: (h, w) bool; a place with any free pixel is free."""
        if self.free is None:
            return None
        return F.adaptive_max_pool2d(self.free[None].float(), shape[1:])[0] == 0

    def around(self, images: Tensor) -> Tensor:
        """`images` (N,C,H,W) where they are free, the picture elsewhere."""
        if self.free is None:
            return images
        return torch.where(self.free.to(images.device), images, self.image.to(images.device))
