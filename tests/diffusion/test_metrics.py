"""The metrics of stage 2."""

import pytest
import torch

from ldm.diffusion.metrics import LatentStd, Loss, LossEMA, Output, standard


@pytest.mark.parametrize("cut", [(10,), (4, 4, 2), (1, 9)])
def test_the_means_of_raw_and_averaged_losses(cut):
    losses = torch.rand(2, 10, generator=torch.Generator().manual_seed(0))
    metrics = Loss(), LossEMA()
    for rows in losses.split(list(cut), dim=1):
        for metric in metrics:
            metric.update({}, Output(*rows))
    expected = losses.double().mean(1)
    torch.testing.assert_close(torch.stack([metric.compute() for metric in metrics]), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("scale", "expected"), [([1, 1.5, 0.9], 1.5), ([1.2, 1, 0.25], 0.25), ([1, 1, 0], 0)])
def test_the_channel_farthest_from_unit_variance(scale, expected):
    noise = torch.randn(5000, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    latent = 3 + noise * torch.tensor(scale).view(3, 1, 1)
    metric = LatentStd()
    for rows in latent.split([1, 999, 4000]):
        metric.update({"latent": rows}, Output(torch.zeros(1), torch.zeros(1)))
    assert metric.compute().item() == pytest.approx(expected, rel=0.02)


def test_the_standard_set():
    assert list(standard()) == ["loss", "loss_ema", "latent_std"]
