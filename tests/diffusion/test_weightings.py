"""Weightings against the papers' formulas, stated there for different predictions."""

import pytest
import torch

from ldm.diffusion.predictions import X0, EDMPreconditioned, Eps, V
from ldm.diffusion.weightings import (
    P2,
    VLB,
    KarrasWeighting,
    Level,
    MinSNR,
    Plain,
    PlainAndVLB,
    Sigmoid,
    SoftMinSNR,
    Uncertainty,
)

ALPHA = torch.tensor([0.999, 0.9, 0.6, 0.1])
SIGMA = (1 - ALPHA**2).sqrt()
SNR = (ALPHA / SIGMA) ** 2
ONE = torch.ones(4)


def factor(weighting, prediction):
    """What multiplies the squared error of the prediction's output."""
    return weighting(
        ONE, Level(SNR, torch.tensor([torch.inf, 20.0, 2.0, 0.1]), prediction.x0_error_scale(ALPHA, SIGMA))
    )


def test_plain_changes_nothing():
    assert torch.equal(factor(Plain(), Eps()), ONE)


def test_min_snr_is_the_paper_s_for_each_prediction():
    """Hang et al. 2023, section 3.4."""
    least = SNR.clamp(max=5)
    torch.testing.assert_close(factor(MinSNR(), X0()), least)
    torch.testing.assert_close(factor(MinSNR(), Eps()), least / SNR)
    torch.testing.assert_close(factor(MinSNR(), V()), least / (SNR + 1))


def test_soft_min_snr_and_sigmoid_are_one():
    torch.testing.assert_close(factor(SoftMinSNR(4.0), X0()), 4 * SNR / (4 + SNR))
    torch.testing.assert_close(factor(Sigmoid(-1.5), Eps()), torch.sigmoid(-1.5 - SNR.log()))


def test_p2():
    torch.testing.assert_close(factor(P2(0.5, 2.0), Eps()), (2 + SNR) ** -0.5)


def test_karras_weighting_is_plain_for_edm_s_own_output():
    sigma = torch.tensor([0.01, 0.5, 5.0, 80.0])
    level = Level(sigma**-2, sigma**-2, EDMPreconditioned(0.5).x0_error_scale(ONE, sigma))
    torch.testing.assert_close(KarrasWeighting(0.5)(ONE, level), ONE)


def test_bound_is_half_of_what_a_step_gains():
    expected = torch.stack([SNR[0], 20 - SNR[1], 2 - SNR[2], 0.1 - SNR[3]]) / 2
    torch.testing.assert_close(factor(VLB(), X0()), expected)


def test_a_little_of_the_bound_is_added_to_the_plain_error():
    torch.testing.assert_close(factor(PlainAndVLB(0.25), X0()), ONE + factor(VLB(), X0()) / 4)


def test_uncertainty_starts_as_nothing_and_learns_the_loss():
    """loss / e^u + u is least where u = ln(loss): then every level contributes alike."""
    torch.manual_seed(0)
    weighting = Uncertainty(Plain())
    snr = torch.tensor([100.0, 1.0, 0.01]).repeat(50)
    losses = torch.tensor([0.01, 0.3, 2.0]).repeat(50)
    level = Level(snr, snr, torch.ones_like(snr))
    torch.testing.assert_close(weighting(losses, level), losses)
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.02)
    for _ in range(500):
        optimizer.zero_grad()
        weighting(losses, level).mean().backward()
        optimizer.step()
    told = weighting(torch.zeros_like(losses), level)  # u alone
    assert told.tolist() == pytest.approx(losses.log().tolist(), abs=0.05)
