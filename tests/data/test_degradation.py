import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from ldm.config.targets import build
from ldm.data.degradation import BicubicDegradation, Degradation, LightDegradation
from ldm.data.degradation_steps import GaussianNoise, IsotropicBlur, Jpeg, Resize, Step
from ldm.data.drawn import Drawn, draw_rows, generator, meta_column
from ldm.errors import ConfigError


def pictures(channels=3, height=32, width=48, number=1):
    """Smooth pictures, (N,C,H,W) uint8."""
    rough = torch.rand(number, channels, 4, 4, generator=torch.Generator().manual_seed(1)) * 255
    return torch.nn.functional.interpolate(rough, (height, width), mode="bicubic").clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("make", [Degradation, LightDegradation, BicubicDegradation])
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_the_size_is_divided_by_the_factor(make, factor):
    degradation, rows = make(factor), {"image": pictures(number=12)}
    assert isinstance(degradation, Drawn)
    assert degradation.reads == ["image"]
    made = draw_rows("low", degradation, rows, 0, range(12))
    assert made.shape == meta_column("low", degradation, rows).shape == (12, 3, 32 // factor, 48 // factor)


def test_bicubic_is_pillows_and_torchvisions():
    picture = pictures()[0]
    made = BicubicDegradation(4).draw({"image": picture}, generator(0, "low", 0))
    pillow = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((12, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(made.permute(1, 2, 0).numpy(), np.asarray(pillow))
    theirs = resize(picture, [8, 12], InterpolationMode.BICUBIC, antialias=True)
    assert (made.int() - theirs.int()).abs().max() <= 1
    assert torch.equal(made, BicubicDegradation(4).draw({"image": picture}, generator(0, "low", 1)))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_any_number_of_channels_without_jpeg(channels):
    steps = [IsotropicBlur((0, 2)), GaussianNoise((1, 5))]
    made = draw_rows("low", Degradation(4, steps), {"image": pictures(channels)}, 0, [5])
    assert made.shape == (1, channels, 8, 12)


def test_jpeg_is_for_gray_and_color():
    assert draw_rows("low", Degradation(4), {"image": pictures(1)}, 0, [5]).shape == (1, 1, 8, 12)
    for degradation in (Degradation(4), LightDegradation(4), Degradation(4, [], last=[Jpeg((50, 50))])):
        with pytest.raises(ConfigError, match="Jpeg: expected pictures of 1 or 3 channels, found 4"):
            meta_column("low", degradation, {"image": pictures(4)})


@pytest.mark.parametrize("make", [Degradation, LightDegradation])
def test_a_row_depends_on_its_number_and_its_picture_alone(make):
    rows = pictures(number=1).expand(8, -1, -1, -1)
    one = draw_rows("low", make(), {"image": rows}, 4, range(8))
    other = draw_rows("low", make(), {"image": rows[:3]}, 4, [6, 1, 20])
    assert torch.equal(other[:2], one[[6, 1]])
    assert len({row.numpy().tobytes() for row in one}) == 8
    assert not torch.equal(one, draw_rows("low", make(), {"image": rows}, 5, range(8)))


def test_the_picture_itself_stays_as_it_is():
    rows = pictures()
    before = rows.clone()
    draw_rows("low", Degradation(1, [GaussianNoise((9, 9))]), {"image": rows}, 0, [0])
    assert torch.equal(rows, before)


class Noted(Step):
    """Notes that it was its turn, and the size of the picture."""

    def __init__(self, name, turns):
        self.name, self.turns = name, turns

    def __call__(self, pixels, full, random):
        assert full == (32, 48)
        self.turns.append((self.name, pixels.shape[1]))
        return pixels


class Halved(Noted):
    """Also halves the picture."""

    def __call__(self, pixels, full, random):
        return super().__call__(pixels, full, random)[:, ::2, ::2]


def test_steps_come_in_any_order_resizes_in_theirs_and_last_ones_last():
    turns: list[tuple[str, int]] = []
    steps, last = [Noted("a", turns), Noted("b", turns)], [Noted("y", turns), Noted("z", turns)]
    degradation = Degradation(4, steps, [Halved("1", turns), Halved("2", turns)], last)
    orders, sizes = {}, set()
    for number in range(600):
        turns.clear()
        degradation.draw({"image": pictures()[0]}, generator(0, "low", number))
        order = "".join(name for name, size in turns)
        assert order.index("1") < order.index("2")
        assert order.endswith("yz")
        orders[order] = orders.get(order, 0) + 1
        sizes |= {one for one in turns if one[0] == "a"}
    # a and b lie anywhere among five places, three of which are the resizes' and the downscale's.
    assert sizes == {("a", 32), ("a", 16), ("a", 8)}
    assert len(orders) == 12
    assert abs(orders["a1b2yz"] - 30) < 5 * math.sqrt(30), "one of 20, with the downscale behind"


def test_a_last_step_that_changes_the_size_does_not_change_the_columns():
    degradation = Degradation(4, [], last=[Resize((8, 8))])
    assert draw_rows("low", degradation, {"image": pictures()}, 0, [0]).shape == (1, 3, 8, 12)


def test_the_lighter_one_is_nearer_to_the_picture():
    rows = {"image": pictures(number=1, height=128, width=128).expand(16, -1, -1, -1)}
    plain = BicubicDegradation().draw({"image": rows["image"][0]}, generator(0, "low", 0)).float()
    light, full = (
        (draw_rows("low", made, rows, 0, range(16)).float() - plain).pow(2).mean().item()
        for made in (LightDegradation(), Degradation())
    )
    assert 0 < light < full / 4


def test_descriptions_are_plain_and_tell_settings_apart():
    made = [Degradation(), Degradation(2), LightDegradation(), BicubicDegradation(), Degradation(kernels=["box"])]
    said = [one.describe() for one in made]
    assert len({json.dumps(one) for one in said}) == len(made)
    resized = said[2]["resizes"][0]
    assert resized["step"] == {
        "target": "ldm.data.degradation_steps.Resize",
        "factor": [1, 8],
        "kernels": ["bilinear", "bicubic", "box"],
    }
    assert resized["probability"] == 0.8


def test_what_a_description_says_can_be_built():
    said = Degradation().describe()

    def node(value):
        if isinstance(value, list):
            return [node(one) for one in value]
        if not isinstance(value, dict):
            return value
        return {"target": value["target"], "params": {key: node(value[key]) for key in value if key != "target"}}

    again = build(node(said), key="data.params.drawn.low")
    assert again.describe() == said
    picture = {"image": pictures()[0]}
    one, other = (made.draw(picture, generator(0, "low", 3)) for made in (Degradation(), again))
    assert torch.equal(one, other)


def test_pictures_that_cannot_be_degraded_are_refused():
    with pytest.raises(ConfigError, match=r"Degradation\.factor: expected sides that 5 divides, found .* 32 x 48"):
        meta_column("low", Degradation(5), {"image": pictures()})
    with pytest.raises(ConfigError, match="the nearest that fit are width 45 or 50"):
        meta_column("low", Degradation(5), {"image": pictures(height=30)})
    for wrong in (pictures().float(), pictures()[0]):
        with pytest.raises(ConfigError, match=r"'image': expected pictures \(N,C,H,W\) of uint8 to degrade, found \("):
            meta_column("low", Degradation(), {"image": wrong})


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="found resizes or last without steps"):
        Degradation(4, last=[Jpeg((30, 95))])
    with pytest.raises(ConfigError, match=r"kernels: expected some of nearest, .*, found cubic"):
        Degradation(4, kernels=["cubic"])
