"""A folder of pictures of many shapes, for buckets."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SHAPES = [(32, 16)] * 9 + [(16, 32)] * 7 + [(24, 24)] * 8 + [(40, 18)] * 2 + [(12, 12)] * 2
"""Heights and widths; the last ones are smaller than any bucket of 16 pixels."""

SIZES = {"sizes": [16, [8, 16], [16, 8]]}
"""The parameters of `Buckets` that tests use: squares, and both shapes of half of it."""


@pytest.fixture(scope="session")
def many_sizes(tmp_path_factory) -> Path:
    """28 random pictures in two classes, upright ones more often in the first."""
    root = tmp_path_factory.mktemp("many_sizes")
    random = np.random.default_rng(11)
    for index, (height, width) in enumerate(SHAPES):
        folder = root / ("cats", "dogs")[(index % 3 == 0) ^ (height < width)]
        folder.mkdir(exist_ok=True)
        coarse = random.integers(0, 256, (-(-height // 4), -(-width // 4), 3), dtype=np.uint8)
        pixels = coarse.repeat(4, axis=0).repeat(4, axis=1)[:height, :width]
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
    return root
