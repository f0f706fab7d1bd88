"""Noise schedules against diffusers, and against their formulas."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from ldm.diffusion.noise_schedules import Cosine, Linear, SqrtLinear, ZeroTerminal


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        (Linear(), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        (SqrtLinear(), {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}),
        (SqrtLinear(0.00085, 0.012), {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        (Cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
    ],
    ids=["linear", "sqrt_linear", "sqrt_linear_sd", "cosine"],
)
def test_equal_diffusers(schedule, reference):
    np.testing.assert_allclose(schedule.betas(1000), DDPMScheduler(1000, **reference).betas, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("steps", [2, 50, 1000])
def test_cosine_follows_its_formula(steps):
    angle = (np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2
    expected = (np.cos(angle) / np.cos(angle[0])) ** 2
    bars = np.cumprod(1 - Cosine().betas(steps))
    np.testing.assert_allclose(bars[:-1], expected[1:-1], rtol=1e-9)  # the last beta is capped


@pytest.mark.parametrize("schedule", [Linear(), SqrtLinear(), Cosine()], ids=lambda s: type(s).__name__)
def test_zero_terminal_leaves_nothing(schedule):
    betas = schedule.betas(1000)
    changed = ZeroTerminal(schedule).betas(1000)
    bars = np.cumprod(1 - changed)
    assert bars[-1] == 0
    assert bars[0] == pytest.approx(1 - betas[0])
    assert (np.diff(bars) < 0).all()


def test_zero_terminal_equals_diffusers():
    betas = torch.from_numpy(SqrtLinear().betas(1000))
    expected = rescale_zero_terminal_snr(betas)
    np.testing.assert_allclose(ZeroTerminal(SqrtLinear()).betas(1000), expected.numpy(), rtol=1e-9, atol=1e-12)
