"""Learning rate as a function of the optimizer step.

Each class is a callable step -> multiplier of the optimizer's rate, for torch's LambdaLR. Steps count from 0: factor(0)
applies to the first update, factor(steps - 1) to the last of `steps`. A warm-up of w steps rises linearly and reaches
1 at its w-th update, factor(w - 1), so that no update is wasted at a rate of 0; published code starts at (nearly) 0 and
reaches 1 one update later, factor(w): that is `start`. A decay reaches its end at factor(steps), when all updates are
done. After that the factor is constant: a rate never rises again.
"""

import math

from ldm.ranges import Count, CountOrZero, Fraction


class Constant:
    """1, after a warm-up of `warm_up` steps.

    Args:
        warm_up: updates before 1 is reached.
        start: factor(0), from which the warm-up rises to 1 at factor(warm_up): 1e-6 in latent diffusion's
            configurations (its LambdaLinearScheduler's f_start), 0 in EDM2. None: from 1 / warm_up to 1 at
            factor(warm_up - 1).
    """

    def __init__(self, warm_up: CountOrZero = 0, start: Fraction | None = None) -> None:
        self.warm_up = warm_up
        self.start = start

    @property
    def peak(self) -> int:
        """The first step that is not reduced by the warm-up."""
        return max(self.warm_up - 1, 0) if self.start is None else self.warm_up

    def __call__(self, step: int) -> float:
        if step >= self.peak:
            return 1.0
        if self.start is None:
            return (step + 1) / self.warm_up
        return self.start + (1 - self.start) * step / self.warm_up


class InverseSqrt(Constant):
    """1 up to step `flat`, then 1 / sqrt(step / flat) (Karras et al. 2024, "EDM2", eq. 67), after a warm-up."""

    def __init__(self, flat: Count, warm_up: CountOrZero = 0, start: Fraction | None = None) -> None:
        super().__init__(warm_up, start)
        self.flat = flat

    def __call__(self, step: int) -> float:
        return super().__call__(step) / math.sqrt(max(1.0, step / self.flat))


class _Decay(Constant):
    """From 1 at the warm-up's end (or the first update) down to `final` after `steps` updates."""

    def __init__(
        self, steps: Count, warm_up: CountOrZero = 0, final: Fraction = 0.0, start: Fraction | None = None
    ) -> None:
        super().__init__(warm_up, start)
        self.steps = steps
        self.final = final

    def remaining(self, step: int) -> float:
        """1 up to the peak, falling to 0 at step `steps` and after."""
        peak = min(self.peak, self.steps - 1)
        return 0.0 if step >= self.steps else min(1.0, (self.steps - step) / (self.steps - peak))


class Linear(_Decay):
    """A straight line down to `final`."""

    def __call__(self, step: int) -> float:
        return super().__call__(step) * (self.final + (1 - self.final) * self.remaining(step))


class Cosine(_Decay):
    """Half a cosine down to `final` (Loshchilov and Hutter 2017, eq. 5, without restarts)."""

    def __call__(self, step: int) -> float:
        share = (1 - math.cos(math.pi * self.remaining(step))) / 2
        return super().__call__(step) * (self.final + (1 - self.final) * share)
