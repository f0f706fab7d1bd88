"""Parts of loops around networks of others."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def l1_and_kl(images: Tensor, reconstruction: Tensor, kl: Tensor) -> Tensor:
    """Absolute error, summed over an image, and 1e-6 times the KL (N,); mean over the batch."""
    return ((images - reconstruction).abs().sum() + 1e-6 * kl.sum()) / len(images)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float = 0.9999) -> None:
    """As in the train.py of DiT, SiT and LightningDiT, which cannot be imported without what it trains on."""
    averages: Mapping[str, Tensor] = dict(average.named_parameters())
    for name, weight in model.named_parameters():
        averages[name].mul_(decay).add_(weight.data, alpha=1 - decay)
