"""Pictures with shapes, edges and texture, for networks to see and for resize rules to change."""

import numpy as np
import pytest
import torch


def draw(number: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """(number, 3, height, width) uint8: colored discs over a gradient, with noise."""
    random = np.random.default_rng(seed)
    down, across = np.mgrid[:height, :width]
    images = np.empty((number, 3, height, width))
    for image in images:
        image[:] = across / width * random.uniform(0, 200, (3, 1, 1)) + random.uniform(0, 50, (3, 1, 1))
        for _ in range(4):
            y, x, radius = random.uniform(0, height), random.uniform(0, width), random.uniform(2, height / 3)
            image[:, (down - y) ** 2 + (across - x) ** 2 < radius**2] = random.uniform(0, 255, (3, 1))
        image += random.normal(0, 8, image.shape)
    return torch.from_numpy(images.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def pictures() -> torch.Tensor:
    """Four of 40 x 48 pixels."""
    return draw(4, 40, 48)
