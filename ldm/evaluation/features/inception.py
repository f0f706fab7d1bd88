"""Inception as of December 2015, in whose features the FID is defined (Heusel et al. 2017, arXiv:1706.08500).

TensorFlow's network, converted by torch-fidelity, whose modules and weights these are.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.evaluation.features.base import LOGITS, MAIN, SPATIAL, FrozenNetwork
from ldm.evaluation.features.loading import optional_packages, weights_of
from ldm.evaluation.features.resize import Clean, Resize, TensorFlow1
from ldm.weights import cache
from ldm.weights.digest import weight_hash

_SIDE = 299
_PARTS = {MAIN: slice(0, 2048), LOGITS: slice(2048, 3056), SPATIAL: slice(3056, 5079)}


class Inception(FrozenNetwork):
    """Pooled features (2048), logits (1008) and spatial features (7 * 17 * 17) of the FID's Inception.

    Equal to torch-fidelity's "2048" and "logits_unbiased": the logits are without the last layer's bias, as the
    Inception Score's always were. The spatial ones are the first seven channels of `mixed_6/conv`, row by row with the
    channels last, as in the evaluator of guided-diffusion (Dhariwal and Nichol 2021), so that its reference files fit.

    Args:
        path: torch-fidelity's file (`inception-2015` in ldm/weights/catalog.py).
        resize: `TensorFlow1(299)`: the published tables'; `Clean(299)`: clean-fid's.

    Raises:
        ConfigError: torch-fidelity is not installed.
        CheckpointError: the file holds other weights.
    """

    def __init__(self, path: Path, resize: Resize | None = None) -> None:
        with optional_packages("inception"):
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        cache.read(path)  # torch-fidelity would run code in the file, so it is read once by who would not
        with weights_of("torch-fidelity's Inception", path):
            network = FeatureExtractorInceptionV3("inception", ["2048"], str(path))
        super().__init__(
            network, "inception-2015", weight_hash(network.state_dict()), _PARTS, resize or TensorFlow1(_SIDE)
        )

    @classmethod
    def clean(cls, path: Path) -> "Inception":
        """With the resize rule of clean-fid."""
        return cls(path, Clean(_SIDE))

    def extract(self, pixels: Tensor) -> Tensor:
        h = (pixels - 128) / 128  # (N, 3, 299, 299)
        layers: dict[str, Any] = dict(self.network.named_children())
        head = layers.pop("fc")
        for name, layer in layers.items():  # in the order of the network
            if name == "Mixed_6d":  # mixed_6 of TensorFlow's names
                spatial = layer.branch1x1(h)[:, :7]  # (N, 7, 17, 17)
            h = layer(h)
        features = h.flatten(1)  # (N, 2048)
        logits = features.mm(head.weight.T)  # (N, 1008)
        return torch.cat([features, logits, spatial.permute(0, 2, 3, 1).flatten(1)], dim=1)
