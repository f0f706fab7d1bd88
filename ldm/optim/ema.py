"""Moving averages of a model's weights, counted in images; an average of any width afterwards, from snapshots of two.

Early weights are close to the random initialization, so an average with a long memory would produce noise for a long
time: every profile here starts without memory and lengthens it.
"""

import copy
from collections.abc import Sequence
from typing import Annotated, Any, Protocol

import numpy as np
import torch
from annotated_types import Interval
from torch import Tensor, nn

from ldm.errors import ConfigError
from ldm.ranges import Fraction, Positive


class Profile(Protocol):
    """profile(images_seen before the update, images in the update) -> weight of the old average, in [0, 1]."""

    def __call__(self, images_seen: int, images: int) -> float: ...


class HalfLife:
    """The contribution of past weights halves every `images` images, whatever the batch size.

    Until 1/ramp half-lives have passed, the half-life is `ramp` times the images seen (Karras et al. 2022, "EDM").
    """

    def __init__(self, images: Positive, ramp: Positive = 0.05) -> None:
        self.images = images
        self.ramp = ramp

    def __call__(self, images_seen: int, images: int) -> float:
        half_life = min(self.images, self.ramp * images_seen)
        return 0.5 ** (images / half_life) if half_life > 0 else 0.0


class FixedDecay:
    """The classic: a constant decay per update, at first limited to (1 + n) / (10 + n) in the nth, n = 1, 2, ...

    As in latent diffusion's LitEma, whose count is incremented before it is read: 2/11 in the first update. Where the
    batch size varies, n is counted in batches of the present size.
    """

    def __init__(self, decay: Fraction = 0.9999) -> None:
        self.decay = decay

    def __call__(self, images_seen: int, images: int) -> float:
        update = images_seen / images + 1
        return min(self.decay, (1 + update) / (10 + update))


class PowerFunction:
    """Past weights contribute in proportion to a power of the images then seen (Karras et al. 2024, "EDM2", sec. 3.1).

    The average's memory is a fixed fraction of the training so far, so that its early value is never random noise, and
    any other width can be reconstructed from snapshots of two of these (`mixture`).

    Args:
        std: relative standard deviation of the profile, sigma_rel: the paper uses 0.05 and 0.1.
    """

    def __init__(self, std: Annotated[float, Interval(gt=0, lt=12**-0.5)]) -> None:
        self.exponent = power_exponent(std)

    def __call__(self, images_seen: int, images: int) -> float:
        return float((images_seen / (images_seen + images)) ** (self.exponent + 1))


def power_exponent(std: float) -> float:
    """The exponent gamma of a power-function average with relative standard deviation `std`, 0 < std < 0.28.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), EDM2, eq. 123-126; the largest root.
    """
    if not 0 < std < 12**-0.5:
        raise ConfigError(f"EMA: std {std:g}: expected more than 0 and less than {12**-0.5:.3f} (the uniform average)")
    return float(np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real.max())


def mixture(times: Sequence[float], exponents: Sequence[float], time: float, exponent: float) -> np.ndarray:
    """Coefficients (n,), summing to 1, of n snapshots whose combination best fits the power function of `exponent`.

    Least squares over the profile at all times (EDM2, algorithm 3).

    Args:
        times: images seen at each snapshot, > 0.
        exponents: of each snapshot's own average.
        time: images seen at the target average, at most the latest snapshot's.
        exponent: of the target average.
    """
    t, g = np.asarray(times, dtype=np.float64) / time, np.asarray(exponents, dtype=np.float64)
    products = _overlap(t[:, None], g[:, None], t, g)  # (n, n)
    wanted = _overlap(t, g, np.ones(1), np.full(1, exponent))  # (n,)
    shares = np.linalg.solve(products, wanted)
    return shares / shares.sum()  # so that constants are reproduced exactly


def _overlap(t: np.ndarray, g: np.ndarray, u: np.ndarray, h: np.ndarray) -> np.ndarray:
    """The integral of (g + 1) tau^g / t^(g + 1) times (h + 1) tau^h / u^(h + 1), up to the earlier of t and u."""
    earlier, later, power = np.minimum(t, u), np.maximum(t, u), np.where(t < u, h, g)
    return (g + 1) * (h + 1) / (g + h + 1) * (earlier / later) ** power / later


class EMA(nn.Module):
    """Holds averages as submodules: float32 copies, always in eval mode, never trained.

    Args:
        model: the model to average.
        profile: of `average`, which is used for sampling.
        extra: of further averages, for `scripts/reconstruct_ema.py`.

    Attributes:
        average: the averaged model.
        extra: further averages.
        images_seen: images counted so far; kept on the host (reading it never waits) and saved with the weights.
    """

    def __init__(self, model: nn.Module, profile: Profile, extra: Sequence[Profile] = ()) -> None:
        super().__init__()
        self.average = copy.deepcopy(model).float().requires_grad_(False)
        self.extra = nn.ModuleList(copy.deepcopy(self.average) for _ in extra)
        self.profiles = [profile, *extra]
        self.images_seen = 0
        self.train(False)

    @torch.no_grad()
    def update(self, model: nn.Module, images: int) -> None:
        """Update with the weights after an optimizer step over `images` images (the global batch)."""
        for average, profile in zip([self.average, *self.extra], self.profiles, strict=True):
            pairs = [*zip(average.parameters(), model.parameters(), strict=True)]
            averages: list[Tensor] = [a for a, w in pairs if w.requires_grad]  # frozen weights are their own average
            weights = [w.to(a.dtype) for a, w in pairs if w.requires_grad]
            torch._foreach_lerp_(averages, weights, 1 - profile(self.images_seen, images))
            for ours, theirs in zip(average.buffers(), model.buffers(), strict=True):
                ours.copy_(theirs)
        self.images_seen += images

    def train(self, mode: bool = True) -> "EMA":
        """Stays in eval mode, whatever the mode of the enclosing module."""
        return super().train(False)

    def get_extra_state(self) -> dict[str, Any]:
        return {"images_seen": self.images_seen}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.images_seen = state["images_seen"]
