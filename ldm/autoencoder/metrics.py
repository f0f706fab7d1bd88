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
from torchmetrics.functional.image.psnr import peak_signal_noise_ratio
from torchmetrics.functional.image.ssim import structural_similarity_index_measure

from ldm.autoencoder.posterior import Posterior, latent_sums
from ldm.autoencoder.quantizer import Quantized, usage
from ldm.errors import ConfigError
from ldm.runtime.float64 import double
from ldm.runtime.validation_metrics import Mean

Batch = Mapping[str, Any]

DEAD = 0.01
"""The share of a channel's variance that the posterior's means make up, below which it is dead; see `Latents`."""
EXACT = 100.0
"""PSNR in dB of a picture that is reconstructed exactly, such as a blank one: infinity would be the mean of all."""
OF_SSIM = {"data range": 1}
"""What records say of an SSIM, since former ones are of pictures in [-1, 1], which is another number."""
SMALLEST_FOR_SSIM = 6  # its Gaussian window is 11 wide, and 5 pixels are mirrored at each edge


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
    return {**metrics, "codes": CodebookUsage()} if codebook else {**metrics, "latents": Latents()}


class PSNR(Mean):
    """Peak signal-to-noise ratio in dB of each image, clamped to [-1, 1]; at most `EXACT`."""

    def values(self, batch: Batch, output: Output) -> Tensor:
        images, shown = _pictures(batch, output)
        return peak_signal_noise_ratio(shown, images, data_range=2.0, reduction="none", dim=(1, 2, 3)).clamp(max=EXACT)


class SSIM(Mean):
    """Structural similarity (Wang et al. 2004) of each image, clamped to [-1, 1]; 1 for equal images.

    Raises:
        ConfigError: (at the first images) they have fewer than 6 pixels on a side.
    """

    def values(self, batch: Batch, output: Output) -> Tensor:
        images, shown = _pictures(batch, output)
        height, width = images.shape[2:]
        if min(height, width) < SMALLEST_FOR_SSIM:
            raise ConfigError(
                f"validation measures SSIM, whose window needs pictures of {SMALLEST_FOR_SSIM} pixels or more on each "
                f"side, found {height} x {width}: take larger ones, or leave it out (model.params.metrics.ssim=null)"
            )
        return structural_similarity(shown, images)


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


class Latents(Metric):
    """What the latents carry, over all images.

    `latent_std`: their standard deviation, draws included, root mean square over the channels. `dead_channels`: the
    fraction of channels that hardly know which image they are of: the posterior's means make up less than a hundredth
    of the channel's variance, its noise the rest. Such a channel tells the decoder at most 0.005 nats a value. (Burda
    et al. 2016, arXiv:1509.00519, sec. 5.2, count units as inactive whose means have a variance of less than 0.01;
    here in units of the channel's own variance, since little holds it at one where the KL weighs little.)
    """

    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Takes its shape, of latent_sums and below it the squares of the means, from the first batch.
        self.add_state("sums", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, batch: Batch, output: Output) -> None:
        mean = double(output.posterior.mean)  # (N, c, h, w)
        squares = mean.square().sum((0, *range(2, mean.ndim)))
        self.sums = self.sums + torch.cat([latent_sums(output.posterior), squares[None]])  # (4, c)

    def compute(self) -> dict[str, Tensor]:
        count, first, second, squares = self.sums
        mean = first / count
        variance, of_means = (second / count - mean.square()).clamp_min(0.0), squares / count - mean.square()
        alive = of_means > DEAD * variance  # a constant has no variance at all
        return {"dead_channels": 1.0 - double(alive).mean(), "latent_std": variance.mean().sqrt()}


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


def structural_similarity(shown: Tensor, images: Tensor) -> Tensor:
    """SSIM (Wang et al. 2004) of pictures (N, C, H, W) in [-1, 1]: (N,).

    It is of intensities, from 0 to 1 here: it compares means by a ratio, which of others would not be theirs.
    """
    ssim = structural_similarity_index_measure((shown + 1) / 2, (images + 1) / 2, data_range=1.0, reduction="none")
    assert isinstance(ssim, Tensor)  # a tuple only if its map is requested
    return ssim


def _pictures(batch: Batch, output: Output) -> tuple[Tensor, Tensor]:
    """Images and reconstructions as they are shown, (N, C, H, W) float32 in [-1, 1]."""
    return batch["image"].float(), output.reconstruction.clamp(-1.0, 1.0)
