"""rFD, the Fréchet distance of reconstructions to their originals, as a validation metric of stage 1.

    model:
      params:
        metrics:
          rfd: {target: ldm.evaluation.reconstruction.ReconstructionDistance, params: {features: alexnet}}

It is the rFID where the features are Inception's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ldm.autoencoder.metrics import Output
from ldm.evaluation.distances.frechet import frechet_distance
from ldm.evaluation.features.base import MAIN, size
from ldm.evaluation.features.choose import choose
from ldm.evaluation.moments import Moments
from ldm.images import to_uint8


class ReconstructionDistance(Metric):
    """The Fréchet distance between the validation pictures and their reconstructions, of all ranks.

    Only distances over equally many pictures, in the same features, may be compared.

    Args:
        features: a name of ldm/evaluation/features/choose.py.
        weights: file of the features' weights; None: where they usually lie.

    Raises:
        CheckpointError: the weights are missing.
    """

    def __init__(self, features: str = "alexnet", weights: Path | str | None = None) -> None:
        super().__init__()
        self.features = choose(features, weights=None if weights is None else Path(weights))
        self._part = self.features.parts[MAIN]
        self._size = size(self._part)
        self._moments = {"real": Moments(self._size), "reconstructed": Moments(self._size)}

    def update(self, batch: Mapping[str, Any], output: Output) -> None:
        for name, images in (("real", batch["image"]), ("reconstructed", output.reconstruction)):
            self._moments[name].add(self.features(to_uint8(images.float()))[:, self._part])

    def compute(self) -> Tensor:
        """() float64."""
        real, reconstructed = (moments.over_ranks() for moments in self._moments.values())
        return torch.tensor(frechet_distance(reconstructed, real), dtype=torch.float64)

    def reset(self) -> None:
        super().reset()
        self._moments = {name: Moments(self._size) for name in self._moments}
