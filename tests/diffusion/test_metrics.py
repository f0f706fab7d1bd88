"""The metrics of stage 2."""

import pytest
import torch

from ldm.diffusion.metrics import Loss, LossEMA, Output, standard


@pytest.mark.parametrize("cut", [(10,), (4, 4, 2), (1, 9)])
def test_the_means_of_raw_and_averaged_losses(cut):
    losses = torch.rand(2, 10, generator=torch.Generator().manual_seed(0))
    metrics = Loss(), LossEMA()
    for rows in losses.split(list(cut), dim=1):
        for metric in metrics:
            metric.update({}, Output(*rows))
    expected = losses.double().mean(1)
    torch.testing.assert_close(torch.stack([metric.compute() for metric in metrics]), expected, rtol=1e-12, atol=0)


def test_the_standard_set():
    assert list(standard()) == ["loss", "loss_ema"]
