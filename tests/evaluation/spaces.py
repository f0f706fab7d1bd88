"""Feature spaces for tests: no weights to find, and not a bit that depends on the batch."""

import torch
from torch import Tensor

from ldm.evaluation.features.base import Features


class Projection(Features):
    """A fixed random projection of the pictures, summed in float64, picture by picture."""

    def __init__(self, name: str = "projection/none", width: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.name = name
        self.weights = f"{width:064x}"
        self.parts = {
            "features": slice(width),
            "logits": slice(width, width + classes),
            "spatial": slice(width + classes, 2 * width + classes),
        }
        self.width = 2 * width + classes
        self.seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        flat = images.double().flatten(1) / 255  # (N, CHW)
        generator = torch.Generator().manual_seed(self.width)
        matrix = torch.randn(flat.shape[1], self.width, dtype=torch.float64, generator=generator)
        return torch.stack([(row[:, None] * matrix).sum(0) for row in flat]).float()
