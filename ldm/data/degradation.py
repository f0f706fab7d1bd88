"""Low-resolution pictures for super-resolution, made anew each time a picture is seen.

Blind super-resolution learns from pictures that were spoiled as real ones are: blurred, resized, noisy, compressed, in
any order (Zhang et al. 2021, "Designing a Practical Degradation Model for Deep Blind Image Super-Resolution", BSRGAN;
Wang et al. 2021, "Real-ESRGAN"). How far two machines agree: ldm/data/degradation_steps.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.chances import plain
from ldm.data.degradation_steps import (
    KERNELS,
    AnisotropicBlur,
    GaussianNoise,
    IsotropicBlur,
    Jpeg,
    OneOf,
    PoissonNoise,
    Resize,
    Sometimes,
    Step,
)
from ldm.errors import ConfigError
from ldm.ranges import Count
from ldm.sizes import nearest, spell


class Degradation:
    """A picture of 1/factor of the size, degraded; the column `low_resolution`, (C,H/factor,W/factor) uint8.

    The steps, the resizes and the downscale to the final size happen in random order, except that the resizes and the
    downscale keep theirs; then come the last ones. So noise or JPEG may come before or after the downscale.

    The default is BSRGAN's chain without its model of a camera's processor: two blurs, a resize by up to twice the
    factor, noise of 2 to 25 levels, JPEG of quality 30 to 95, at the end always, and before with probability 0.9. Its
    kernels are Pillow's; noise is half Gaussian, half Poisson, as Real-ESRGAN's.

    These ranges are for pictures of 256 pixels and more. Of 64 pixels, 4x, hardly anything remains to be recognized,
    since a blur after the downscale is as wide as one before: name milder steps there, or use the classes below. A
    picture of 3 channels, 4x, takes 2 ms at 64 pixels and 14 ms at 256 (medians of processor time, one core).

    Args:
        factor: by which both sides are divided.
        steps: in random order; None: the default's `steps`, `resizes` and `last`.
        resizes: to sizes between.
        last: in this order.
        kernels: of the downscale, names of Pillow's, each as likely as any other.
        key: the column that is degraded, uint8 of any number of channels (JPEG: 1 or 3).

    Raises:
        ConfigError: an unknown kernel; resizes or last steps without steps.
    """

    def __init__(
        self,
        factor: Count = 4,
        steps: Sequence[Step] | None = None,
        resizes: Sequence[Step] = (),
        last: Sequence[Step] = (),
        kernels: Sequence[str] = KERNELS,
        key: str = "image",
    ) -> None:
        if steps is None:
            if resizes or last:
                raise ConfigError("Degradation: found resizes or last without steps: name all; [] is none")
            steps, resizes, last = _blurs(factor, 1.0, 2), _resizes(factor, 0.75, KERNELS), [Jpeg((30, 95))]
            steps += [OneOf([GaussianNoise((2, 25)), PoissonNoise()]), Sometimes(Jpeg((30, 95)), 0.9)]
        self.factor = factor
        self.steps, self.resizes, self.last = list(steps), list(resizes), list(last)
        self.downscale = Resize((factor, factor), kernels)
        self.key = key

    @property
    def reads(self) -> Sequence[str]:
        return [self.key]

    def describe(self) -> dict[str, Any]:
        return {
            "target": f"{__name__}.Degradation",
            "factor": self.factor,
            "steps": plain(self.steps),
            "resizes": plain(self.resizes),
            "last": plain(self.last),
            "kernels": list(self.downscale.kernels),
            "key": self.key,
        }

    def columns(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        pictures = rows[self.key]
        if pictures.ndim != 4 or pictures.dtype != torch.uint8:
            raise ConfigError(
                f"'{self.key}': expected pictures (N,C,H,W) of uint8 to degrade, found {tuple(pictures.shape)} of "
                f"{pictures.dtype}: have data.params.aligned keep the pixels"
            )
        number, channels, height, width = pictures.shape
        if height % self.factor or width % self.factor:
            raise ConfigError(
                f"{type(self).__name__}.factor: expected sides that {self.factor} divides, found pictures of "
                f"{spell((height, width))} pixels; the nearest that fit are {nearest((height, width), self.factor)}"
            )
        for step in (*self.steps, *self.resizes, *self.last):
            step.check(channels)
        size = (number, channels, height // self.factor, width // self.factor)
        return {"low_resolution": torch.empty(size, dtype=torch.uint8, device="meta")}

    def draw(self, row: Mapping[str, Tensor], random: np.random.Generator) -> Tensor:
        pixels = row[self.key].numpy()
        full = pixels.shape[1:]
        for step in (*self._in_order(random), *self.last, self.downscale):  # again, for others that change the size
            pixels = step(pixels, full, random)
        return torch.from_numpy(np.array(pixels))

    def _in_order(self, random: np.random.Generator) -> list[Step]:
        """Steps, resizes and downscale in the order of this picture."""
        sizing = iter([*self.resizes, self.downscale])
        order = random.permutation(len(self.steps) + len(self.resizes) + 1).tolist()
        return [self.steps[place] if place < len(self.steps) else next(sizing) for place in order]


class LightDegradation(Degradation):
    """Milder: latent diffusion's `bsrgan_light`, of which its `bsr_sr` was trained.

    One blur, of a quarter of the width; the resize; noise of 1 to 2 levels; JPEG of quality 80 to 95. A picture of 3
    channels, 4x, takes 1.4 ms at 64 pixels and 8 ms at 256; at 64 pixels the resize alone may leave 8.

    Args:
        factor, key: as for `Degradation`.
    """

    def __init__(self, factor: Count = 4, key: str = "image") -> None:
        kernels = ("bilinear", "bicubic", "box")
        steps = [*_blurs(factor, 0.25, 1), GaussianNoise((1, 2)), Sometimes(Jpeg((80, 95)), 0.9)]
        super().__init__(factor, steps, _resizes(factor, 0.8, kernels), [Jpeg((80, 95))], kernels, key)


class BicubicDegradation(Degradation):
    """Bicubic downscale, antialiased, and nothing else, whatever the sample number is.

    A picture takes 0.2 ms at 64 pixels and 1 ms at 256.

    Args:
        factor, key: as for `Degradation`.
    """

    def __init__(self, factor: Count = 4, key: str = "image") -> None:
        super().__init__(factor, [], kernels=["bicubic"], key=key)


def _blurs(factor: int, width: float, number: int) -> list[Step]:
    """BSRGAN's: round or elliptic; the latter's variances, and the former's deviation, grow with the factor."""
    round_one = IsotropicBlur((0, width * (2 + 0.2 * factor)))
    return [OneOf([round_one, AnisotropicBlur((0, width * (4 + factor)))])] * number


def _resizes(factor: int, probability: float, kernels: Sequence[str]) -> list[Step]:
    return [Sometimes(Resize((1, 2 * factor), kernels), probability)]
