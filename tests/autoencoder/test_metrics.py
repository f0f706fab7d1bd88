"""The metrics of stage 1: closed forms, and torchmetrics' own functions on the whole set."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from ldm.autoencoder.losses import AutoencoderLoss
from ldm.autoencoder.lpips import LPIPS
from ldm.autoencoder.metrics import PSNR, SSIM, CodebookUsage, Latents, Losses, Output, Perceptual, standard
from ldm.autoencoder.posterior import DiagonalGaussian
from ldm.autoencoder.quantizer import VectorQuantizer
from ldm.errors import ConfigError

CUTS = [(7,), (3, 3, 1), (1, 6)]
GAUSSIAN = DiagonalGaussian(torch.zeros(7, 4, 2, 2))


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    """Seven and how they come back, not all within [-1, 1], each with an error of its own: (7, 3, 20, 32)."""
    generator = torch.Generator().manual_seed(0)
    original = torch.rand(7, 3, 20, 32, generator=generator) * 2 - 1
    strength = torch.linspace(0.01, 0.8, 7).view(-1, 1, 1, 1)
    return original, original + strength * torch.randn(original.shape, generator=generator)


def measure(metric, images, cut, posterior=GAUSSIAN, losses=None):
    """As validation does, in batches of these sizes."""
    original, reconstruction = images
    first = 0
    for size in cut:
        rows = slice(first, first + size)
        of_rows = {name: values[rows] for name, values in (losses or {}).items()}
        metric.update(
            {"image": original[rows]}, Output(reconstruction[rows], posterior, lambda of_rows=of_rows: of_rows)
        )
        first += size
    assert first == len(original)
    return metric.compute()


@pytest.mark.parametrize("cut", CUTS)
def test_psnr(images, cut):
    original, shown = images[0], images[1].clamp(-1, 1)
    mse = (original - shown).double().square().mean((1, 2, 3))
    found = measure(PSNR(), images, cut).item()
    assert found == pytest.approx((10 * (4 / mse).log10()).mean().item(), rel=1e-6)
    whole = peak_signal_noise_ratio(shown, original, data_range=2.0, reduction="elementwise_mean", dim=(1, 2, 3))
    assert found == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("cut", CUTS)
def test_ssim(images, cut):
    shown, original = ((one.clamp(-1, 1) + 1) / 2 for one in reversed(images))
    whole = structural_similarity_index_measure(shown, original, data_range=1.0)
    assert measure(SSIM(), images, cut).item() == pytest.approx(whole.item(), rel=1e-6)
    assert measure(SSIM(), (images[0], images[0]), cut).item() == pytest.approx(1.0)


def test_ssim_is_that_of_its_paper_of_pictures_from_0_to_1(images):
    """Wang et al. 2004, eq. 13 to 16, by scipy; the pictures are dark, where a shift by 1 would change most."""
    dark = images[0] / 4 - 0.7, images[1].clamp(-1, 1) / 4 - 0.7
    x, y = (((one + 1) / 2).double().numpy() for one in dark)

    def blurred(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, sigma=(0, 0, 1.5, 1.5), truncate=3.5, mode="mirror")  # 11 pixels wide

    means = blurred(x), blurred(y)
    variances = blurred(x * x) - means[0] ** 2, blurred(y * y) - means[1] ** 2
    covariance = blurred(x * y) - means[0] * means[1]
    luminance = (2 * means[0] * means[1] + 0.01**2) / (means[0] ** 2 + means[1] ** 2 + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variances[0] + variances[1] + 0.03**2)
    assert measure(SSIM(), dark, (7,)).item() == pytest.approx((luminance * structure).mean(), rel=1e-4)


def test_values_out_of_range_are_cut_as_in_a_picture(images):
    extreme = images[0].sign(), 3 * images[0].sign()
    assert measure(SSIM(), extreme, (7,)).item() == pytest.approx(1.0)
    assert measure(PSNR(), extreme, (7,)).item() == 100


def test_ssim_of_flat_pictures():
    """Of means a and b from 0 to 1 without variance: (2ab + c) / (a^2 + b^2 + c) with c = 0.01^2."""
    a, b, c = 0.25, 0.125, 0.01**2
    flat = torch.full((7, 1, 12, 12), 2 * a - 1), torch.full((7, 1, 12, 12), 2 * b - 1)
    assert measure(SSIM(), flat, (3, 4)).item() == pytest.approx((2 * a * b + c) / (a * a + b * b + c), rel=1e-4)


@pytest.mark.parametrize("size", [(5, 32), (32, 4)])
def test_pictures_smaller_than_the_window_of_ssim(size):
    small = torch.zeros(7, 3, *size), torch.zeros(7, 3, *size)
    with pytest.raises(ConfigError, match=f"6 pixels or more on each side, found {size[0]} x {size[1]}.*ssim=null"):
        measure(SSIM(), small, (7,))
    edge = torch.zeros(7, 3, 6, 6)
    assert measure(SSIM(), (edge, edge), (7,)).item() == pytest.approx(1.0)


@pytest.mark.parametrize("cut", CUTS)
def test_a_perceptual_distance_that_is_no_loss(images, cut):
    lpips = LPIPS()
    expected = lpips(*images).double().mean().item()
    assert measure(Perceptual(lpips), images, cut).item() == pytest.approx(expected, rel=1e-5)


def test_what_lpips_needs_is_said_by_the_metric(images):
    metric = Perceptual(LPIPS(pretrained=False))
    four = torch.zeros(7, 4, 20, 20)
    with pytest.raises(ConfigError, match=r"1 or 3 channels .*found 4"):
        measure(metric, (four, four), (7,))
    with pytest.raises(ConfigError, match="16 pixels or more on each side, found 15 x 20"):
        measure(metric, (four[:, :3, :15], four[:, :3, :15]), (7,))


@pytest.mark.parametrize("cut", CUTS)
def test_losses(images, cut):
    lpips = LPIPS()
    original, reconstruction = images
    loss = AutoencoderLoss(lpips, perceptual_weight=0.5, l2_weight=2.0)
    posterior = DiagonalGaussian(torch.randn(7, 4, 5, 8, generator=torch.Generator().manual_seed(1)))
    losses = loss.per_image(original, reconstruction, posterior)
    found = {name: value.item() for name, value in measure(Losses(), images, cut, losses=losses).items()}
    difference = (original - reconstruction).double()
    l1, l2 = difference.abs().mean().item(), difference.square().mean().item()
    distance = lpips(reconstruction, original).double().mean().item()
    expected = {"l1": l1, "l2": l2, "lpips": distance}
    expected |= {"rec_loss": (l1 + 2.0 * l2 + 0.5 * distance) * original[0].numel()}
    expected |= {"kl": posterior.kl().double().mean().item()}
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=1e-6)
    # And training's are the same.
    error, parts = loss.reconstruction_loss(original, reconstruction)
    assert {name: value.item() for name, value in parts.items()} == pytest.approx(
        {name: found[name] for name in ("l1", "l2", "lpips")}, rel=1e-5
    )
    assert error.item() == pytest.approx(found["rec_loss"], rel=1e-5)


def latents(std_of_means: list[float], std: list[float], offset: float = 0.0) -> Output:
    """4,000 images of 2x2 values, whose posteriors have means of this spread and this noise, a number a channel."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(4000, len(std), 2, 2, generator=generator)
    mean = offset + torch.tensor(std_of_means).view(1, -1, 1, 1) * draws
    logvar = 2 * torch.tensor(std).log().view(1, -1, 1, 1).expand_as(mean)
    return Output(torch.zeros(1), DiagonalGaussian(torch.cat([mean, logvar], dim=1)), {})


def test_a_channel_is_dead_by_what_its_means_explain_of_its_own_variance():
    """Whatever its scale: 0.01 of 1 is little, 0.01 beside noise of 0.01 is half."""
    metric = Latents()
    metric.update({}, latents([3.0, 0.05, 0.01, 0.2], [1.0, 1.0, 0.01, 1.0], offset=7.0))
    found = metric.compute()
    assert found["dead_channels"].item() == 1 / 4
    variance = 3.0**2 + 1 + 0.05**2 + 1 + 2 * 0.01**2 + 0.2**2 + 1
    assert found["latent_std"].item() == pytest.approx((variance / 4) ** 0.5, rel=0.02)


def test_latents_that_do_not_differ_are_dead():
    for std in (1.0, 1e-12):
        metric = Latents()
        metric.update({}, latents([0.0, 0.0], [std, std], offset=0.5))
        assert metric.compute()["dead_channels"].item() == 1


def test_what_latents_carry_does_not_depend_on_batches():
    output = latents([1.0, 0.0], [0.5, 1.0])
    whole, cut = Latents(), Latents()
    whole.update({}, output)
    moments = torch.cat([output.posterior.mean, output.posterior.logvar], dim=1)
    for rows in moments.split([1, 999, 3000]):
        cut.update({}, Output(torch.zeros(1), DiagonalGaussian(rows), {}))
    assert cut.compute()["latent_std"].item() == pytest.approx(whole.compute()["latent_std"].item(), rel=1e-12)
    assert cut.compute()["dead_channels"].item() == whole.compute()["dead_channels"].item() == 1 / 2


def test_the_use_of_a_codebook_is_that_of_all_pictures():
    """Three codes in two batches, 4, 2 and 2 times, of eight: the perplexity of (1/2, 1/4, 1/4) is 2^1.5."""
    quantizer = VectorQuantizer(size=8, channels=2)
    torch.nn.init.normal_(quantizer.codebook.weight, generator=torch.Generator().manual_seed(0))
    metric = CodebookUsage()
    for codes in ([0, 0, 1, 2], [0, 0, 2, 1]):
        latents = quantizer.codebook.weight[codes].detach().t().reshape(1, 2, 2, 2)
        metric.update({}, Output(torch.zeros(1), quantizer(latents), dict))
    found = metric.compute()
    assert found["perplexity"].item() == pytest.approx(2**1.5)
    assert found["codes_used"].item() == 3 / 8
    metric.reset()
    metric.update({}, Output(torch.zeros(1), quantizer(latents), dict))
    assert metric.compute()["codes_used"].item() == 3 / 8


def test_codes_without_a_codebook_are_refused(images):
    with pytest.raises(ConfigError, match=r"CodebookUsage.*model\.params\.quantizer"):
        measure(CodebookUsage(), images, (7,))


def test_the_standard_set():
    assert list(standard(codebook=False)) == ["psnr", "ssim", "losses", "latents"]
    assert list(standard(codebook=True)) == ["psnr", "ssim", "losses", "codes"]
