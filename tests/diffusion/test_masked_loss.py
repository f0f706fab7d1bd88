"""Where errors count: weights against closed forms, and the losses that they make."""

import pytest
import torch

from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.masked_loss import MaskedLoss
from ldm.diffusion.noise_schedules import SqrtLinear
from ldm.diffusion.objectives import DDPM, EDM, Flow
from ldm.diffusion.weightings import MinSNR
from ldm.errors import ConfigError
from ldm.randomness import Draws


def batch(n=2, hole=(slice(8, 16), slice(8, 24))):
    """Latents (n, 3, 8, 8) of pictures of 32 x 32 pixels."""
    mask = torch.zeros(n, 1, 32, 32)
    mask[:, :, *hole] = 1
    return {"latent": torch.randn(n, 3, 8, 8), "mask": mask, "draws": Draws(0, range(n), n)}


def pixel(y, x):
    """Weights of that pixel alone."""
    weights = torch.zeros(2, 1, 8, 8)
    weights[:, :, y, x] = 1
    return weights


def test_the_hole_counts_and_the_mean_weight_is_one():
    weights = MaskedLoss(0.1, margin=0)(batch())
    assert weights.shape == (2, 1, 8, 8)
    mean = (8 * 1 + 56 * 0.1) / 64  # 2 x 4 of 8 x 8 latent pixels
    expected = torch.full((8, 8), 0.1 / mean)
    expected[2:4, 2:6] = 1 / mean
    torch.testing.assert_close(weights, expected.expand(2, 1, 8, 8))
    torch.testing.assert_close(weights.mean((1, 2, 3)), torch.ones(2))


def test_a_margin_around_the_hole_counts_as_it_does():
    inside = MaskedLoss(0.1, margin=1)(batch())[0, 0] > 1
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[1:5, 1:7] = True
    assert torch.equal(inside, expected)


def test_a_hole_of_a_pixel_is_a_hole_of_the_latent():
    inside = MaskedLoss(0.1, margin=0)(batch(hole=(slice(13, 14), slice(31, 32))))[0, 0] > 1
    assert inside.nonzero().tolist() == [[3, 7]]


@pytest.mark.parametrize("hole", [(slice(0, 0), slice(0, 0)), (slice(0, 32), slice(0, 32))], ids=["none", "everywhere"])
def test_without_a_hole_or_without_the_rest_all_count_alike(hole):
    torch.testing.assert_close(MaskedLoss(0.05)(batch(hole=hole)), torch.ones(2, 1, 8, 8))


def test_rows_have_weights_of_their_own():
    rows = batch()
    rows["mask"][1] = 0
    weights = MaskedLoss(0.05)(rows)
    assert weights[0].max() > 1
    torch.testing.assert_close(weights[1], torch.ones(1, 8, 8))


@pytest.mark.parametrize("objective", [DDPM(SqrtLinear(), weighting=MinSNR()), EDM(), Flow()])
def test_a_loss_is_the_mean_of_weighted_errors(objective):
    rows, weights = batch(), MaskedLoss(0.05)(batch())

    def loss(by):
        return objective.loss(lambda x, level, conditioning: x * 0.5, rows["latent"], Conditioning(), rows["draws"], by)

    expected = sum(weights[:, 0, y, x] * loss(pixel(y, x)) for y in range(8) for x in range(8))
    torch.testing.assert_close(loss(weights), expected)
    assert not torch.allclose(loss(weights), loss(None), rtol=1e-3)
    assert torch.equal(loss(torch.ones(2, 1, 8, 8)), loss(None))


def test_the_direction_is_weighted_as_the_error_is():
    rows, weights = batch(), MaskedLoss(0.05)(batch())

    def loss(direction, by):
        objective = Flow(direction_weight=direction)
        return objective.loss(lambda x, *_: -x, rows["latent"], Conditioning(), rows["draws"], by)

    def angle(by):
        return loss(1.0, by) - loss(0.0, by)

    expected = sum(weights[:, 0, y, x] * angle(pixel(y, x)) for y in range(8) for x in range(8))
    torch.testing.assert_close(angle(weights), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(angle(weights), angle(None), rtol=1e-3)


def test_a_batch_without_a_mask_is_refused():
    rows = batch()
    del rows["mask"]
    with pytest.raises(ConfigError, match=r"mask: expected a tensor .* data.params.masked has it drawn"):
        MaskedLoss()(rows)


def test_a_mask_that_is_no_multiple_of_the_latent_is_refused():
    rows = batch()
    rows["mask"] = torch.zeros(2, 1, 30, 32)
    with pytest.raises(ConfigError, match=r"a mask of \[30, 32\] pixels, .* multiples of the latent's sides, \[8, 8\]"):
        MaskedLoss()(rows)
