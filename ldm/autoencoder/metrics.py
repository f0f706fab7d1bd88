"""Validation metrics of stage 1: what they see of a batch, and the standard ones.

How a configuration names others: ldm/runtime/validation_metrics.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from ldm.autoencoder.posterior import Posterior
from ldm.autoencoder.quantizer import Quantized, usage
from ldm.errors import ConfigError
from ldm.runtime.validation_metrics import Mean

Batch = Mapping[str, Any]

_SMALLEST_FOR_SSIM = 6  # its Gaussian window is 11 wide, and 5 pixels are mirrored at each edge


@dataclass(frozen=True)
class Output:
    """What metrics see of a batch, beside its `image` (N, C, H, W) in [-1, 1].

    Attributes:
        reconstruction: (N, C, H, W) float32, as decoded; it may leave [-1, 1].
        posterior: of the images.
        measure: what `losses` are, computed for the first metric that asks for them: LPIPS is a network of its own.
    """

    reconstruction: Tensor
    posterior: Posterior
    measure: Callable[[], Mapping[str, Tensor]]

    @cached_property
    def losses(self) -> Mapping[str, Tensor]:
        """By name, each (N,) float32; see `AutoencoderLoss.per_image`."""
        return self.measure()


def standard(codebook: bool) -> dict[str, Metric]:
    """The metrics that validation has without a word, in the order in which they are shown."""
    metrics: dict[str, Metric] = {"psnr": PSNR(), "ssim": SSIM(), "losses": Losses()}
    return {**metrics, "codes": CodebookUsage()} if codebook else metrics


class PSNR(Mean):
    """Peak signal-to-noise ratio in dB of each image, clamped to [-1, 1]."""

    def values(self, batch: Batch, output: Output) -> Tensor:
        images, shown = _pictures(batch, output)
        return peak_signal_noise_ratio(shown, images, data_range=2.0, reduction="none", dim=(1, 2, 3))


class SSIM(Mean):
    """Structural similarity (Wang et al. 2004) of each image, clamped to [-1, 1]; 1 for equal images.

    Raises:
        ConfigError: (at the first images) they have fewer than 6 pixels on a side.
    """

    def values(self, batch: Batch, output: Output) -> Tensor:
        images, shown = _pictures(batch, output)
        height, width = images.shape[2:]
        if min(height, width) < _SMALLEST_FOR_SSIM:
            raise ConfigError(
                f"validation measures SSIM, whose window needs pictures of {_SMALLEST_FOR_SSIM} pixels or more on each "
                f"side, found {height} x {width}: take larger ones, or leave it out (model.params.metrics.ssim=null)"
            )
        ssim = structural_similarity_index_measure(shown, images, data_range=2.0, reduction="none")
        assert isinstance(ssim, Tensor)  # a tuple only if its map is requested
        return ssim


class Perceptual(Mean):
    """The mean of a distance of images that the loss does not hold, such as LPIPS.

    Args:
        distance: reconstructions, as decoded, and images, in [-1, 1], each (N, C, H, W) -> (N,).
    """

    def __init__(self, distance: nn.Module) -> None:
        super().__init__()
        self.distance = distance

    def values(self, batch: Batch, output: Output) -> Tensor:
        distance: Tensor = self.distance(output.reconstruction.to(self.device), batch["image"].float().to(self.device))
        return distance


class Losses(Mean):
    """The mean of each of the losses, by its own name: `l1`, `l2`, `lpips`, `rec_loss`, and `kl` or `codebook`."""

    def __init__(self) -> None:
        super().__init__()
        self._names: list[str] = []

    def values(self, batch: Batch, output: Output) -> Tensor:
        self._names = [*output.losses]
        return torch.stack([*output.losses.values()])

    def compute(self) -> dict[str, Tensor]:
        return dict(zip(self._names, super().compute(), strict=True))


class CodebookUsage(Metric):
    """`perplexity` of the codes and `codes_used`, the fraction in use, over all images; see `quantizer.usage`.

    Raises:
        ConfigError: (at the first images) there is no codebook.
    """

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        # It takes its shape, one count a code, from the first batch.
        self.add_state("counts", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, batch: Batch, output: Output) -> None:
        if not isinstance(output.posterior, Quantized):
            raise ConfigError(
                "model.params.metrics: CodebookUsage counts the codes of a codebook, and this model has none; leave it "
                "out, or give the model a model.params.quantizer"
            )
        self.counts = self.counts + output.posterior.counts()

    def compute(self) -> dict[str, Tensor]:
        return usage(self.counts)


def _pictures(batch: Batch, output: Output) -> tuple[Tensor, Tensor]:
    """Images and reconstructions as they are shown, (N, C, H, W) float32 in [-1, 1]."""
    return batch["image"].float(), output.reconstruction.clamp(-1.0, 1.0)
