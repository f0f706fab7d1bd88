import numpy as np
import pytest

from ldm.images import grid, picture, visible


def test_grid_places_pictures_row_by_row_on_white():
    images = [np.full((64, 65, 1), value, np.uint8) for value in (10, 20, 30)]
    sheet = grid(images, columns=2, gap=1)
    assert sheet.shape == (1 + 2 * 65, 1 + 2 * 66, 1)
    white = np.ones(sheet.shape, dtype=bool)
    for value, top, left in ((10, 1, 1), (20, 1, 67), (30, 66, 1)):
        place = slice(top, top + 64), slice(left, left + 65)
        assert (sheet[place] == value).all()
        white[place] = False
    assert (sheet[white] == 255).all()


def test_grid_enlarges_small_pictures_by_whole_pixels():
    image = np.arange(27 * 30 * 3, dtype=np.uint8).reshape(27, 30, 3)
    sheet = grid([image], columns=1)
    assert sheet.shape == (2 * 27 + 4, 2 * 30 + 4, 3)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert np.array_equal(sheet[2 + row : 56 : 2, 2 + column : 62 : 2], image)


def test_channels_are_shown_as_gray_as_color_or_side_by_side():
    image = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    assert np.array_equal(visible(image[..., :1]), image[..., :1])
    assert np.array_equal(visible(image[..., :3]), image[..., :3])
    for channels in (2, 4, 5):
        shown = visible(image[..., :channels])
        assert shown.shape == (2, channels * 4 - 1, 1)
        for channel in range(channels):
            assert np.array_equal(shown[:, 4 * channel : 4 * channel + 3, 0], image[..., channel])
        assert (shown[:, 3::4] == 255).all()


def test_grid_enlarges_before_it_places_channels_side_by_side():
    image = np.random.default_rng(0).integers(0, 255, (16, 24, 4), dtype=np.uint8)
    sheet = grid([image, image], columns=1)
    assert sheet.shape == (2 * (32 + 2) + 2, 4 * 48 + 3 + 4, 1)
    assert np.array_equal(sheet[2:34:2, 2 + 49 : 2 + 49 + 48 : 2, 0], image[..., 1])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "L"), (3, "RGB"), (4, "RGBA"), (5, "L")])
def test_a_picture_of_any_number_of_channels(channels, mode):
    made = picture(np.zeros((8, 6, channels), np.uint8))
    assert made.mode == mode
    assert made.size == (6 if channels in (1, 3, 4) else channels * 7 - 1, 8)


def test_titles_stand_above_their_rows():
    images = [np.full((64, 64, 3), value, np.uint8) for value in (10, 20, 30, 40)]
    plain, titled = grid(images, 2), grid(images, 2, titles=["red heart"])
    assert titled.shape == (len(plain) + 18 + 2, plain.shape[1], 3)
    assert (titled[:18] < 128).any()
    assert np.array_equal(titled[18 : 18 + 68], plain[:68])
    assert np.array_equal(titled[18 + 68 :], plain[66:])


@pytest.mark.parametrize(
    "text", ["many words " * 500, "unbroken" * 50, "قلب أحمر", "❤️ 赤", "\ud800", " ", "two\nlines"]
)
def test_any_text_can_be_a_title(text):
    sheet = grid([np.zeros((64, 64, 3), np.uint8)], 1, titles=[text])
    assert sheet.shape[1:] == (68, 3)
    assert len(sheet) <= 68 + 4 * 16 + 2
