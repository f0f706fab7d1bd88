"""The masked picture: slots, null, and a network that continues what is around the hole."""

import pytest
import torch
import torch.nn.functional as F

from ldm.diffusion.conditioners.base import dropped, require_conditioner
from ldm.diffusion.conditioners.classes import ClassVector
from ldm.diffusion.conditioners.inpainting import MaskedPicture
from ldm.diffusion.conditioners.joint import Joint
from ldm.errors import ConfigError
from tests.diffusion.conditioners.reading import errors, unet


def batch(n=2, device="cpu"):
    mask = torch.zeros(n, 1, 16, 24)
    mask[:, :, 4:12, :8] = 1
    return {"masked_latent": torch.randn(n, 4, 4, 6).to(device), "mask": mask.to(device)}


def test_latent_and_mask_lie_side_by_side():
    conditioner, rows = MaskedPicture(4), batch()
    require_conditioner(conditioner)
    found = conditioner(rows).spatial
    assert torch.equal(found[:, :4], rows["masked_latent"])
    hole = torch.zeros(4, 6)
    hole[1:3, :2] = 1
    assert torch.equal(found[:, 4], hole.expand(2, 4, 6))
    assert torch.equal(found[:, 4:], F.interpolate(rows["mask"], size=(4, 6)))
    assert torch.equal(MaskedPicture(4, outside=-1)(rows).spatial[:, 4], 2 * found[:, 4] - 1)
    assert not conditioner.state_dict()


@pytest.mark.parametrize("outside", [0.0, -1.0])
def test_null_is_a_hole_everywhere_of_any_size(outside):
    conditioner, rows = MaskedPicture(4, outside), batch()
    null = conditioner.null(2)
    assert null.spatial.flatten().tolist() == [0, 0, 0, 0, 1] * 2
    mixed = conditioner(rows).where(torch.tensor([True, False]), null).spatial
    assert torch.equal(mixed[0], conditioner(rows).spatial[0])
    assert (mixed[1, 4] == 1).all()
    assert torch.equal(mixed[:1, :4], rows["masked_latent"][:1])
    assert conditioner(rows).cat(null).spatial.shape == (4, 5, 4, 6)


def test_a_text_or_class_is_dropped_alone():
    conditioner = Joint({"class": ClassVector(3, 8), "picture": MaskedPicture(4)}, kept=["picture"])
    rows = batch() | {"class_label": torch.tensor([0, 1])}
    without = dropped(conditioner, rows, 2)
    assert torch.equal(without.spatial, conditioner(rows).spatial)
    assert torch.equal(without.vector, conditioner.null(2).vector)


def test_without_values_and_in_half_precision():
    with torch.device("meta"):
        conditioner = MaskedPicture(4)
    assert conditioner(batch(device="meta")).spatial.shape == (2, 5, 4, 6)
    assert MaskedPicture(4).half()(batch()).spatial.dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": None}, r"condition mask: expected a tensor \(1, any, any\) .* found none; data.params.masked"),
        ({"masked_latent": torch.zeros(2, 3, 4, 6)}, r"masked_latent: expected a tensor \(4, any, any\).*\(3, 4, 6\)"),
        ({"mask": torch.zeros(2, 1, 18, 24)}, r"mask: \[18, 24\] pixels, expected whole multiples .*\[4, 6\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        MaskedPicture(4)(batch() | change)


def halves(random):
    """Latents of one color each, of which a random half is hidden."""
    latent = torch.randn(32, 3, 1, 1, generator=random).expand(32, 3, 8, 8)
    mask = torch.zeros(32, 1, 16, 16)
    for row, side in zip(mask, torch.randint(0, 2, (32,), generator=random).tolist(), strict=True):
        row[..., 8 * side : 8 * side + 8] = 1
    return {"latent": latent, "mask": mask, "masked_latent": latent * (1 - mask[..., ::2, ::2])}


@pytest.mark.slow
def test_a_denoiser_fills_the_hole_with_what_is_around_it():
    torch.manual_seed(0)
    conditioner, hole = MaskedPicture(3), lambda batch: batch["mask"][..., ::2, ::2]
    told, shuffled = errors(unet(3, spatial_channels=4), conditioner, halves, 150, hole)
    assert told < 0.1
    assert shuffled > 1
