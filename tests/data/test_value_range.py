"""16-bit pictures that use a part of their range are noticed, dark pictures among others are not."""

import numpy as np
import pytest
from PIL import Image

from ldm.data import value_range
from ldm.data.decoding import MAX_PIXELS
from ldm.data.held_out import hold_out
from ldm.data.sources.folder import ImageFolder
from tests.data.sources.test_folder import wide_colors


def pictures(folder, highest: list[int], suffix: str = "png") -> list[str]:
    """16-bit grey pictures with values from 3 to each of `highest`."""
    paths = [folder / f"{number}.{suffix}" for number in range(len(highest))]
    for path, high in zip(paths, highest, strict=True):
        Image.fromarray(np.linspace(3, high, 64).astype(np.uint16).reshape(8, 8)).save(path)
    return [str(path) for path in paths]


@pytest.mark.parametrize(
    ("highest", "white"), [([4000, 4012, 77], 4095), ([1023], 1023), ([16383] * 40, 16383), ([200], 255)]
)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_part_of_the_range_is_named(tmp_path, highest, white, suffix):
    told = value_range.warning(pictures(tmp_path, highest, suffix), MAX_PIXELS)
    number = min(len(highest), 16)
    assert f"the {number} examined have values from 3 to {max(highest)}, where white is 65535" in told
    assert f"If white is {white}, set `value_range: [0, {white}]`" in told


@pytest.mark.parametrize("highest", [[65535], [500, 900, 30000, 700], [16384]])
def test_dark_pictures_are_no_fault(tmp_path, highest):
    assert value_range.warning(pictures(tmp_path, highest), MAX_PIXELS) == ""


@pytest.mark.parametrize("hot", [1, 3])
def test_a_few_hot_pixels_hide_nothing(tmp_path, hot):
    random = np.random.default_rng(0)
    for number in range(8):
        values = random.integers(0, 4096, (64, 64)).astype(np.uint16)
        if number == 5:
            values.flat[random.choice(4096, hot, replace=False)] = 65535
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    told = value_range.warning([str(tmp_path / f"{number}.png") for number in range(8)], MAX_PIXELS)
    assert "If white is 4095, set `value_range: [0, 4095]`" in told


def test_a_small_bright_thing_is_no_hot_pixel(tmp_path):
    values = np.full((64, 64), 300, dtype=np.uint16)
    values[10:14, 20:24] = 60000
    Image.fromarray(values).save(tmp_path / "star.png")
    assert value_range.warning([str(tmp_path / "star.png")], MAX_PIXELS) == ""


def test_only_pictures_of_sixteen_bits_count(tmp_path):
    Image.new("L", (4, 4), 5).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"broken")
    assert value_range.warning([str(tmp_path / f"{name}.png") for name in "abcd"], MAX_PIXELS) == ""
    dark = pictures(tmp_path, [4000])
    assert value_range.warning(dark, max_pixels=10) == "", "more than max_pixels, which is said when they are read"


def test_colours_of_sixteen_bits_count(tmp_path):
    assert "values from 3840 to 4095" in value_range.warning([str(wide_colors(tmp_path / "a.png", 4000))], MAX_PIXELS)
    assert value_range.warning([str(wide_colors(tmp_path / "a.png", 40000))], MAX_PIXELS) == ""


def test_a_data_set_warns_once_unless_it_has_a_range(tmp_path, caplog):
    pictures(tmp_path, [4000] * 6)
    for part in hold_out(ImageFolder(tmp_path), 2):
        part.prepare()
    assert len(caplog.messages) == 1
    assert "value_range: [0, 4095]" in caplog.text
    caplog.clear()
    ImageFolder(tmp_path, value_range=[0, 65535]).prepare()
    assert not caplog.messages
