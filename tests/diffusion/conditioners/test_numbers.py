"""Numbers as conditions: SDXL's embedding, its null, its dropout."""

import math

import pytest
import torch
from diffusers.models.embeddings import Timesteps

from ldm.config.load import build
from ldm.diffusion.conditioners.classes import ClassVector
from ldm.diffusion.conditioners.joint import Joint
from ldm.diffusion.conditioners.numbers import Numbers
from ldm.diffusion.conditioners.projected import Projected
from ldm.errors import ConfigError
from ldm.randomness import Draws

COUNTS = {"original_size": 2, "crop_top_left": 2, "target_size": 2}
N = 10_000


def batch(n=3):
    sizes = {"original_size": [512.0, 768.0], "crop_top_left": [0.0, 128.0], "target_size": [512.0, 512.0]}
    return {key: torch.tensor([pair] * n) for key, pair in sizes.items()} | {"score": torch.rand(n)}


def test_equals_the_added_embedding_of_sdxl_in_diffusers():
    """UNet2DConditionModel.get_aug_embed: add_time_proj(time_ids.flatten()).reshape(N, -1)."""
    rows = batch()
    add_time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    time_ids = torch.cat([rows[key] for key in COUNTS], dim=1)
    expected = add_time_proj(time_ids.flatten()).reshape(3, -1)
    torch.testing.assert_close(Numbers(COUNTS)(rows).vector, expected)
    assert expected.shape == (3, 6 * 256)


def test_in_closed_form():
    found = Numbers({"score": 1}, channels=4)({"score": torch.tensor([5.5])}).vector
    waves = [5.5, 5.5 / 100]  # of periods 2 pi and 100 times that
    torch.testing.assert_close(found, torch.tensor([[*map(math.cos, waves), *map(math.sin, waves)]]))


def test_a_sample_asks_with_whole_numbers_or_lists():
    wanted = Numbers(COUNTS)(batch(1)).vector
    asked = {key: batch(1)[key].long() for key in COUNTS}
    assert torch.equal(Numbers(COUNTS)(asked).vector, wanted)
    assert torch.equal(Numbers(COUNTS)({key: one.tolist() for key, one in asked.items()}).vector, wanted)


def test_null_is_zeros_which_no_number_is():
    conditioner = Numbers(COUNTS, channels=8)
    null = conditioner.null(4).vector
    assert null.shape == conditioner(batch(4)).vector.shape
    assert not null.any()
    numbers = torch.cat([torch.zeros(1), torch.rand(N) * 10_000])
    assert Numbers({"score": 1}, channels=8)({"score": numbers}).vector.norm(dim=1).min() > 1
    assert not conditioner.state_dict()
    assert conditioner.keys == tuple(COUNTS)


def test_each_number_is_dropped_at_its_own_rate_with_the_null_in_its_place():
    parts = {"sizes": Numbers(COUNTS, 4), "score": Numbers({"score": 1}, 4), "class": ClassVector(3, 4)}
    conditioner = Joint(parts, {"sizes": 0.2, "score": 0.05}).train()
    rows = batch(N) | {"class_label": torch.zeros(N, dtype=torch.long), "draws": Draws(0, range(N), N)}
    sizes, score, _ = conditioner(rows).vector.split([24, 4, 4], dim=1)
    assert sizes.eq(0).all(1).float().mean().item() == pytest.approx(0.2, abs=0.015)
    assert score.eq(0).all(1).float().mean().item() == pytest.approx(0.05, abs=0.008)
    assert (sizes.eq(0).all(1) | sizes.eq(parts["sizes"](rows).vector).all(1)).all()


def test_it_is_built_from_a_configuration_and_brought_to_a_width():
    numbers = {"target": "ldm.diffusion.conditioners.numbers.Numbers", "params": {"counts": COUNTS, "channels": 8}}
    target = "ldm.diffusion.conditioners.projected.Projected"
    made = build({"target": target, "params": {"conditioner": numbers, "vector": [48, 16, 16]}})
    assert isinstance(made, Projected)
    assert made(batch()).vector.shape == made.null(3).vector.shape == (3, 16)


def test_what_does_not_fit_is_named():
    with pytest.raises(ConfigError, match="counts: expected one key or more"):
        Numbers({})
    with pytest.raises(ConfigError, match=r"no original_size: name it in data\.params\.numbers"):
        Numbers(COUNTS)({"score": torch.zeros(2)})
    with pytest.raises(ConfigError, match=r"original_size: expected 2 for each row, found \[3\]"):
        Numbers(COUNTS)(batch() | {"original_size": torch.zeros(3, 3)})
