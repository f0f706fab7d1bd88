import numpy as np
import pytest
import torch

from ldm.data.drawn import Drawn, draw_rows, generator, meta_column
from ldm.errors import ConfigError
from ldm.randomness import keys


class Noisy:
    """Adds one random value to the whole picture."""

    reads = ("image",)

    def __init__(self, made=None, says=None):
        self.made, self.says = made, says

    def describe(self):
        return {}

    def columns(self, rows):
        return {"noisy": torch.empty_like(rows["image"])} if self.says is None else self.says

    def draw(self, row, random):
        return row["image"] + int(random.integers(100)) if self.made is None else self.made


IMAGES = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).to(torch.uint8)


def test_the_class_above_is_drawn():
    assert isinstance(Noisy(), Drawn)


def test_a_row_depends_on_seed_name_and_number_alone():
    both = draw_rows("noisy", Noisy(), {"image": IMAGES}, 7, [3, 9])
    turned = draw_rows("noisy", Noisy(), {"image": IMAGES.flip(0)}, 7, np.array([9, 3]))
    assert torch.equal(both, turned.flip(0))
    first = IMAGES[0] + int(np.random.Generator(np.random.Philox(key=int(keys(7, "drawn/noisy", 3)[0]))).integers(100))
    assert torch.equal(both[0], first)


def test_generators_of_other_addresses_differ():
    ones = [generator(*address) for address in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]]
    assert len({one.integers(2**63) for one in ones}) == 4


def test_other_columns_are_not_handed_on_and_missing_ones_are_named():
    assert draw_rows("noisy", Noisy(), {"image": IMAGES, "map": IMAGES}, 0, [0, 1]).shape == IMAGES.shape
    with pytest.raises(ConfigError, match=r"drawn\.noisy: Noisy reads 'image', found only map: have data\.params\.al"):
        meta_column("noisy", Noisy(), {"map": IMAGES})


def test_what_is_made_has_to_be_as_said():
    with pytest.raises(ConfigError, match=r"drew \(1, 2\) uint8 for sample 8, expected \(3, 4, 5\) uint8"):
        draw_rows("noisy", Noisy(made=torch.zeros(1, 2, dtype=torch.uint8)), {"image": IMAGES}, 0, [8, 9])
    with pytest.raises(ConfigError, match=r"drew \(3, 4, 5\) float32"):
        draw_rows("noisy", Noisy(made=IMAGES[0].float()), {"image": IMAGES}, 0, [8, 9])


def test_what_is_said_has_to_be_one_column_of_uint8():
    with pytest.raises(ConfigError, match=r"expected one column from Noisy\.columns\(\), found none"):
        meta_column("noisy", Noisy(says={}), {"image": IMAGES})
    with pytest.raises(ConfigError, match=r"expected a meta tensor of uint8 .* found \(2,\) float32 on meta"):
        meta_column("noisy", Noisy(says={"noisy": torch.empty(2, device="meta")}), {"image": IMAGES})
