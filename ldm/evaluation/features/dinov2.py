"""DINOv2, in whose features FDD is defined (Stein et al. 2023, arXiv:2306.04675; the code dgm-eval of its authors)."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.evaluation.features import transformer
from ldm.evaluation.features.base import MAIN, FrozenNetwork
from ldm.evaluation.features.loading import optional_packages
from ldm.evaluation.features.resize import Pillow
from ldm.evaluation.features.torchvision_trunks import IMAGENET_MEAN, IMAGENET_STD
from ldm.weights.digest import weight_hash

_SIDE = 224


class DINOv2(FrozenNetwork):
    """The class token after the last normalization: (N, 1024) for ViT-L/14, which FDD takes.

    As dgm-eval: Pillow's bicubic to 224 x 224, ImageNet's mean and deviation, the network of DINOv2's own repository.
    That one brings its position embeddings from 37 x 37 to 16 x 16 by a scale of (16 + 0.1) / 37, where transformers
    interpolates by 16 / 37: they are computed here as there.

    Args:
        path: `model.safetensors` of a DINOv2 (`dinov2-large` in ldm/weights/catalog.py), beside its config.json.

    Raises:
        ConfigError: transformers is not installed.
        CheckpointError: the folder holds another model.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, path: Path) -> None:
        with optional_packages("dinov2"):
            from transformers import Dinov2Model
        network = transformer.load(Dinov2Model, path, "DINOv2")
        weights, config = weight_hash(network.state_dict()), network.config
        network.embeddings.position_embeddings = nn.Parameter(
            _resized(network.embeddings.position_embeddings.detach(), _SIDE // config.patch_size)
        )
        name = f"dinov2-{transformer.vit(config)}-cls"
        super().__init__(network, name, weights, {MAIN: slice(0, config.hidden_size)}, Pillow(_SIDE))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))

    def extract(self, pixels: Tensor) -> Tensor:
        tokens: Tensor = self.network((pixels / 255 - self.mean) / self.std).last_hidden_state  # (N, 257, width)
        return tokens[:, 0]


def _resized(positions: Tensor, side: int) -> Tensor:
    """Position embeddings (1, 1 + m * m, width) of the class token and m * m patches -> of `side` * `side` patches."""
    own = math.isqrt(positions.shape[1] - 1)
    if own == side:
        return positions
    square = positions[:, 1:].unflatten(1, (own, own)).permute(0, 3, 1, 2)
    scale = (side + 0.1) / own
    resized = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1], resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
