"""Sheets of pictures: who stands above whom."""

import numpy as np
import torch

from ldm.evaluation.distances.neighbors import Pair
from ldm.evaluation.followed import Followed
from ldm.evaluation.sheets import COLUMNS, ROWS, asked_sheet, pairs_sheet, save_sheet, seeds_sheet
from ldm.sampling.dense import Dense


class Plain:
    """Picture i is of the gray i + shift.

    Args:
        shift: of the gray.
        channels: 1 or 3.
    """

    def __init__(self, shift: int, channels: int = 3) -> None:
        self.shift, self.shape = shift, (channels, 64, 64)

    def __len__(self) -> int:
        return 30

    def images(self, indices):
        return torch.stack([torch.full(self.shape, index + self.shift, dtype=torch.uint8) for index in indices])


def shown(sheet: np.ndarray) -> np.ndarray:
    """The gray of each place."""
    return sheet[34::66, 34::66, 0]


def test_pairs_stand_one_above_another():
    sheet = pairs_sheet([Pair(3, 7, 0.1), Pair(2, 5, 0.2)], Plain(0), Plain(100))
    assert shown(sheet).tolist() == [[3, 2], [107, 105]]


def test_gray_pictures_beside_ones_in_color():
    assert pairs_sheet([Pair(3, 7, 0.1)], Plain(0, 1), Plain(100)).shape[2] == 3


def test_the_first_pictures_row_by_row(tmp_path):
    sheet = seeds_sheet(Plain(0), 24)
    assert shown(sheet).tolist() == [[*range(COLUMNS)], [*range(COLUMNS, 24)]]
    assert shown(seeds_sheet(Plain(0), 99)).shape == (3, COLUMNS)
    save_sheet(sheet, tmp_path / "deep" / "sheet.png")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["sheet.png"]


def test_conditions_samples_baseline_and_truth_in_a_row():
    images, truths, baseline = Plain(0).images(range(20)), Plain(100).images(range(20)), Plain(50).images(range(20))
    conditions = [{"low_resolution": torch.full((3, 16, 16), -1.0)}] * 20
    made = Followed(images, truths, conditions, conditions)
    rows = [[0, row, 50 + row, 100 + row] for row in range(ROWS)]
    assert shown(asked_sheet(made, baseline, Dense())).tolist() == rows
    without = [[condition, sample, truth] for condition, sample, _, truth in rows]
    assert shown(asked_sheet(made, None, Dense())).tolist() == without
    titled = [{**condition, "caption": "a cat"} for condition in conditions]
    assert len(asked_sheet(made._replace(conditions=titled), None, Dense())) > ROWS * 66 + 2
