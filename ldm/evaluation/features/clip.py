"""CLIP's image embeddings (Radford et al. 2021), for FD-CLIP (Kynkäänniemi et al. 2023, arXiv:2203.06026)."""

from pathlib import Path

import torch
from torch import Tensor

from ldm.evaluation.features import transformer
from ldm.evaluation.features.base import MAIN, FrozenNetwork
from ldm.evaluation.features.loading import optional_packages
from ldm.evaluation.features.resize import Pillow
from ldm.weights.digest import weight_hash

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class CLIP(FrozenNetwork):
    """The projected embedding of a picture, of any length: (N, 512) for ViT-B/32, (N, 768) for ViT-L/14.

    As clean-fid's FD-CLIP: Pillow's bicubic to the network's size. Where that crops a picture that is not square, this
    stretches it. CMMD (Jayasumana et al. 2024) takes the same embeddings at unit length.

    Args:
        path: `model.safetensors` of a CLIP (`clip-vit-large-patch14` in ldm/weights/catalog.py), beside its
            config.json.

    Raises:
        ConfigError: transformers is not installed.
        CheckpointError: the folder holds another model.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, path: Path) -> None:
        with optional_packages("clip"):
            from transformers import CLIPVisionModelWithProjection
        network = transformer.load(CLIPVisionModelWithProjection, path, "CLIP")
        config = network.config
        name, parts = f"clip-{transformer.vit(config)}", {MAIN: slice(0, config.projection_dim)}
        super().__init__(network, name, weight_hash(network.state_dict()), parts, Pillow(config.image_size))
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1))

    def extract(self, pixels: Tensor) -> Tensor:
        embeddings: Tensor = self.network((pixels / 255 - self.mean) / self.std).image_embeds
        return embeddings
