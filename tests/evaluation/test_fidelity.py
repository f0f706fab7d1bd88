"""Reconstructions picture by picture: the numbers do not depend on batches, and latents are described truly."""

import numpy as np
import pytest
import torch

from ldm.autoencoder.codec import Codec
from ldm.autoencoder.metrics import DEAD, Latents, Output
from ldm.autoencoder.posterior import DiagonalGaussian
from ldm.evaluation.fidelity import Fidelity
from ldm.evaluation.pictures.made import Reconstruction


@pytest.fixture
def codec(runs):
    return Codec.load(runs.autoencoder)


def made(seed=0, number=6):
    torch.manual_seed(seed)
    original = torch.rand(number, 3, 16, 16) * 2 - 1
    mean, std = torch.randn(number, 4, 4, 4), torch.rand(number, 4, 4, 4) + 0.1
    mean[:, 2], std[:, 2] = 0, 1  # a dead channel
    return Reconstruction(original, (original + 0.1 * torch.randn_like(original)).clamp(-1, 1), mean, std)


def values(fidelity, rows):
    return {one.metric: one for one in fidelity.values(rows)}


def test_numbers_are_means_over_pictures(codec):
    distance = torch.nn.Module()
    distance.forward = lambda a, b: (a - b).abs().mean((1, 2, 3))  # type: ignore[method-assign]
    fidelity, whole = Fidelity(codec, 16, {"L1": distance}), made()
    found = values(fidelity, fidelity.rows(whole).numpy())
    psnr = 10 * torch.log10(4 / (whole.decoded - whole.original).square().flatten(1).mean(1))
    assert found["PSNR"].value == pytest.approx(psnr.mean().item(), rel=1e-5)
    assert found["PSNR"].error == pytest.approx(psnr.std().item() / 6**0.5, rel=1e-4)
    assert found["L1"].value == pytest.approx((whole.decoded - whole.original).abs().mean().item(), rel=1e-5)
    assert found["SSIM"].better == "higher"


def test_batches_change_nothing(codec):
    fidelity, whole = Fidelity(codec, 16, {}), made()
    parts = [fidelity.rows(Reconstruction(*(one[rows] for one in whole))) for rows in (slice(2), slice(2, 6))]
    one, other = values(fidelity, fidelity.rows(whole).numpy()), values(fidelity, torch.cat(parts).numpy())
    assert {name: value.value for name, value in one.items()} == pytest.approx(
        {name: value.value for name, value in other.items()}, rel=1e-6
    )


def test_latents_and_dead_channels(codec):
    fidelity, whole = Fidelity(codec, 16, {}), made()
    found = values(fidelity, fidelity.rows(whole).numpy())
    samples = whole.mean[None] + whole.std[None] * torch.randn(2000, *whole.mean.shape)
    std = samples.transpose(0, 2).flatten(1).std(1)
    assert found["latent std"].settings["std"] == pytest.approx(std.tolist(), rel=0.02)
    assert found["dead latent channels"].value == 0.25
    shares = found["dead latent channels"].settings["share of the means in the variance, of each channel"]
    expected = whole.mean.transpose(0, 1).flatten(1).var(1, correction=0) / std**2
    assert shares == pytest.approx(expected.tolist(), rel=0.04, abs=1e-6)
    assert shares[2] < DEAD < min(shares[:2] + shares[3:])
    kl = found["KL, nats an element"]
    assert kl.settings["nats an element, of each channel"][2] == pytest.approx(0, abs=1e-6)
    expected = 0.5 * (whole.mean**2 + whole.std**2 - 1 - (whole.std**2).log())
    assert kl.value == pytest.approx(expected.mean().item(), rel=1e-5)


def test_a_channel_is_dead_here_where_it_is_in_training(codec):
    """One of the channels is between what 0.01 nats and a hundredth of the variance would say."""
    whole = made()
    whole.mean[:, 1] *= 0.12
    whole.std[:, 1] = 1
    metric = Latents()
    moments = torch.cat([whole.mean, 2 * whole.std.log()], dim=1)
    metric.update({}, Output(whole.decoded, DiagonalGaussian(moments), {}))
    found = values(Fidelity(codec, 16, {}), Fidelity(codec, 16, {}).rows(whole).numpy())
    assert found["dead latent channels"].value == metric.compute()["dead_channels"].item() == 0.25
    assert found["KL, nats an element"].settings["nats an element, of each channel"][1] < 0.01


def test_what_small_pictures_and_codebooks_lack(codec):
    assert "SSIM" not in Fidelity(codec, 5, {}).metrics
    codec.quantizer = torch.nn.Identity()
    fidelity = Fidelity(codec, 16, {})
    found = values(fidelity, fidelity.rows(made()).numpy())
    assert "latent std" in found
    assert "dead latent channels" not in found
    assert fidelity.column.key != Fidelity(codec, 5, {}).column.key
    assert np.isfinite(found["latent std"].value)


def test_an_exact_reconstruction_is_not_infinitely_good(codec):
    whole = made()
    fidelity, blank = Fidelity(codec, 16, {}), torch.ones(6, 3, 16, 16)
    rows = fidelity.rows(whole._replace(original=blank, decoded=blank))
    assert values(fidelity, rows.numpy())["PSNR"].value == 100


def test_a_distance_of_other_weights_is_another_one(codec):
    """What is kept of one is not taken for the other."""
    keys = {Fidelity(codec, 16, {"L": torch.nn.Linear(weight, 1)}).column.key for weight in (2, 3)}
    assert len(keys) == 2
