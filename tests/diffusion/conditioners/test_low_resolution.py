"""The small picture: its size, its noise against the closed form, and a network that reads it."""

import math

import pytest
import torch
import torch.nn.functional as F

from ldm.diffusion.conditioners.base import defaults, require_conditioner
from ldm.diffusion.conditioners.joint import Joint
from ldm.diffusion.conditioners.low_resolution import LEVEL, LowResolution, augmented
from ldm.errors import ConfigError
from ldm.layers import timestep_embedding
from ldm.randomness import Draws
from tests.diffusion.conditioners.reading import errors, unet


def batch(n=2, sides=(4, 6), latent=(4, 6), device="cpu"):
    return {
        "low_resolution": torch.randn(n, 3, *sides).to(device),
        "latent": torch.empty(n, 4, *latent, device="meta"),
        "draws": Draws(0, range(n), n, device),
    }


@pytest.mark.parametrize(("sides", "fold"), [((4, 6), 1), ((2, 3), 1), ((8, 12), 2), ((4, 6), 2)])
def test_has_the_latent_s_size(sides, fold):
    conditioner, rows = LowResolution(fold=fold).eval(), batch(sides=sides)
    require_conditioner(conditioner)
    found = conditioner(rows).spatial
    folded = F.pixel_unshuffle(rows["low_resolution"], fold)
    torch.testing.assert_close(found, F.interpolate(folded, size=(4, 6), mode="bicubic", align_corners=False))
    if folded.shape[2:] == (4, 6):
        assert torch.equal(found, folded)
    assert conditioner.null(2).spatial.shape == (2, found.shape[1], 1, 1)


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_the_variance_is_that_of_picture_and_noise(level):
    picture, noise = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(0))[:, None]
    found = augmented(0.5 * picture, noise, torch.tensor([level]))
    expected = (math.cos(math.pi / 2 * level) * 0.5) ** 2 + math.sin(math.pi / 2 * level) ** 2
    assert float(found.var()) == pytest.approx(expected, rel=0.01)
    covariance = float((found * picture).mean())
    assert covariance == pytest.approx(0.5 * math.cos(math.pi / 2 * level), abs=0.01)
    if level == 0:
        assert torch.equal(found, 0.5 * picture)


def test_the_level_is_drawn_in_training_and_told():
    conditioner, n = LowResolution(most=0.5).train(), 4000
    rows = batch(n, (1, 1), (1, 1))
    found = conditioner(rows)
    level = 0.5 * rows["draws"].uniform(LEVEL)
    assert 0 <= level.min() < 0.01
    assert 0.49 < level.max() < 0.5
    assert torch.equal(found.vector, timestep_embedding(1000 * level, 128))
    noise = rows["draws"].normal(f"{LEVEL}/noise", (3, 1, 1))
    torch.testing.assert_close(found.spatial, augmented(rows["low_resolution"], noise, level))
    # A row depends on its sample number alone.
    part = {key: rows[key][7:9] for key in rows}
    assert torch.equal(conditioner(part).spatial, found.spatial[7:9])


def test_a_sample_s_level_is_chosen_or_the_default():
    rows = batch()
    clean, noisy = LowResolution().eval(), LowResolution(level=0.25).eval()
    assert torch.equal(clean(rows).spatial, rows["low_resolution"])
    assert torch.equal(clean(rows).vector, timestep_embedding(torch.zeros(2), 128))
    assert defaults(clean) == {LEVEL: 0.0}
    assert defaults(Joint({"small": noisy})) == {LEVEL: 0.25}
    chosen = clean(rows | {LEVEL: torch.tensor([0.25, 0.25])})
    for slot, value in vars(noisy(rows)).items():
        assert value is None or torch.equal(value, getattr(chosen, slot))
    assert not torch.equal(chosen.spatial, rows["low_resolution"])
    assert torch.equal(clean(rows | {LEVEL: torch.zeros(2)}).spatial, rows["low_resolution"])


def test_without_noise_there_is_no_vector():
    conditioner, rows = LowResolution(most=0.0).train(), batch()
    found = conditioner(rows)
    assert torch.equal(found.spatial, rows["low_resolution"])
    assert found.vector is conditioner.null(2).vector is None
    assert defaults(conditioner) == {}


def test_null_is_zeros_that_no_level_has():
    null = LowResolution(vector_channels=8).null(2)
    assert (null.vector.shape, null.spatial.shape) == ((2, 8), (2, 3, 1, 1))
    assert not null.vector.any()
    assert not null.spatial.any()


def test_without_values_and_in_half_precision():
    with torch.device("meta"):
        conditioner = LowResolution().train()
    found = conditioner(batch(device="meta"))
    assert (found.vector.shape, found.spatial.shape) == ((2, 128), (2, 3, 4, 6))
    half = LowResolution().half().train()(batch())
    assert half.vector.dtype == half.spatial.dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low_resolution": None}, r"low_resolution: expected a tensor \(3, any, any\) .* found none; data.params"),
        ({"low_resolution": torch.zeros(2, 1, 4, 6)}, r"found \(1, 4, 6\)"),
        ({"low_resolution": torch.zeros(2, 3, 8, 12)}, "8 x 12 pixels, expected multiples of fold=1 up to 4 x 6"),
        ({LEVEL: torch.tensor([0.1, 0.7])}, "condition augmentation: expected 0 to 0.5, the levels of training, found"),
        ({LEVEL: torch.zeros(2, 2)}, r"condition augmentation: expected a number for each row, found \[2\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        LowResolution()(batch() | change)


def test_a_level_that_training_does_not_have_is_refused():
    with pytest.raises(ConfigError, match=r"level: expected 0 to most=0.2, as in training, found 0.3"):
        LowResolution(most=0.2, level=0.3)


def enlarged(random):
    low = torch.randn(32, 3, 4, 4, generator=random)
    return {"low_resolution": low, "latent": F.interpolate(low, scale_factor=2.0)}


@pytest.mark.slow
def test_a_denoiser_reads_it():
    torch.manual_seed(0)
    told, shuffled = errors(unet(3, spatial_channels=3, vector_channels=128), LowResolution(most=0.2), enlarged, 200)
    assert told < 0.1
    assert shuffled > 1
