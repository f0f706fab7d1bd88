"""Learning-rate factors: exact at the first and last steps and beyond, and never rising after the peak."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.optim.lr_schedules import Constant, Cosine, InverseSqrt, Linear


def test_constant():
    assert [Constant()(step) for step in (0, 1, 10**9)] == [1, 1, 1]


@pytest.mark.parametrize("schedule", [Constant(4), InverseSqrt(100, 4), Linear(100, 4), Cosine(100, 4)])
def test_warm_up_starts_above_zero_and_ends_at_one(schedule):
    assert [schedule(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_warm_up_of_published_code():
    """A warm-up of latent diffusion's schedulers and of EDM2's: step 0 at `start`, 1 at step `warm_up`."""
    ramps = [
        Constant(4, start=0.2),
        InverseSqrt(100, 4, start=0.2),
        Linear(10**9, 4, start=0.2),
        Cosine(10**9, 4, start=0.2),
    ]
    for schedule in ramps:
        assert [schedule(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    assert [InverseSqrt(70_000, 5000, start=0.0)(step) for step in (0, 2500, 5000)] == [0, 0.5, 1]
    assert Constant(10_000, start=1e-6)(0) == 1e-6


def test_cosine_after_a_published_warm_up_is_latent_diffusion_s():
    """The formula of its LambdaWarmUpCosineScheduler, whose cosine begins where the warm-up ends."""
    warm_up, steps, final, start = 5, 40, 0.02, 1e-6
    schedule = Cosine(steps, warm_up, final, start)
    for step in range(60):
        share = min((step - warm_up) / (steps - warm_up), 1.0)
        decayed = final + 0.5 * (1 - final) * (1 + math.cos(share * math.pi))
        expected = start + (1 - start) / warm_up * step if step < warm_up else decayed
        assert schedule(step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", [Linear, Cosine])
def test_decay_at_its_ends_and_beyond(schedule):
    factor = schedule(steps=10, final=0.1)
    assert factor(0) == 1
    assert factor(9) > 0.1
    assert [factor(step) for step in (10, 11, 10**9)] == [0.1] * 3


def test_shapes():
    assert [Linear(4)(step) for step in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]
    assert [Linear(8, warm_up=4)(step) for step in (3, 4, 7, 8)] == [1, 0.8, 0.2, 0]
    assert Cosine(4)(2) == pytest.approx(0.5)
    assert Cosine(4)(1) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert [InverseSqrt(100)(step) for step in (0, 100, 400)] == [1, 1, 0.5]


@given(
    st.sampled_from([Linear, Cosine]),
    st.integers(1, 60),
    st.integers(0, 80),
    st.floats(0, 1),
    st.integers(0, 150),
    st.sampled_from([None, 0.0, 0.3]),
)
def test_up_once_then_never_again(schedule, steps, warm_up, final, step, start):
    factor = schedule(steps, warm_up, final, start)
    peak = max(warm_up - 1, 0) if start is None else warm_up
    assert 0 <= factor(step) <= 1
    if step < steps:
        assert factor(step) > 0 or final == 0 or start == 0
    if step >= peak:
        assert factor(step + 1) <= factor(step) + 1e-12
    if peak < steps:
        assert factor(peak) == 1
        assert factor(steps + 100) == pytest.approx(final)


def test_equals_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for step in range(20):
        assert Cosine(20)(step) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()
