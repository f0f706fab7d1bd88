import numpy as np

from ldm.images import grid


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
