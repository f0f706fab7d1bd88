"""Learning rate as a function of the optimizer step.

Each class is a callable step -> factor of the optimizer's rate, for torch's LambdaLR. Steps count from 0: factor(0)
belongs to the first update, factor(steps - 1) to the last of `steps`. A warm-up of w steps climbs linearly and reaches
1 with its w-th update; a decay reaches its end at factor(steps), when all updates are done, so that none is spent at
a rate of 0. Beyond that the factor stays: a rate never rises again.
"""

import math

from ldm.ranges import Count, CountOrZero, Fraction


class Constant:
    """1, after a warm-up of `warm_up` steps."""

    def __init__(self, warm_up: CountOrZero = 0) -> None:
        self.warm_up = warm_up

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warm_up) if self.warm_up else 1.0


class InverseSqrt(Constant):
    """1 up to step `flat`, then 1 / sqrt(step / flat) (Karras et al. 2024, "EDM2", eq. 67), after a warm-up."""

    def __init__(self, flat: Count, warm_up: CountOrZero = 0) -> None:
        super().__init__(warm_up)
        self.flat = flat

    def __call__(self, step: int) -> float:
        return super().__call__(step) / math.sqrt(max(1.0, step / self.flat))


class _Decay(Constant):
    """From 1 with the warm-up's last update (or the first) down to `final` after `steps` updates."""

    def __init__(self, steps: Count, warm_up: CountOrZero = 0, final: Fraction = 0.0) -> None:
        super().__init__(warm_up)
        self.steps = steps
        self.final = final

    def remaining(self, step: int) -> float:
        """1 up to the peak ... 0 from step `steps` on."""
        peak = min(max(self.warm_up - 1, 0), self.steps - 1)
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
