"""Any classifier or encoder of timm, by its name there."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config.tree import nearest
from ldm.errors import CheckpointError, ConfigError
from ldm.evaluation.features.base import LOGITS, MAIN, FrozenNetwork
from ldm.evaluation.features.loading import optional_packages, weights_of
from ldm.evaluation.features.resize import Clean
from ldm.weights import cache
from ldm.weights.digest import weight_hash
from ldm.weights.sources import Repository

_PORTED = {"tf_efficientnet_lite0": "efficientnet-lite0"}
"""timm's name -> a file of the catalog with the same tensors in the same order, under names of its own."""


class TimmModel(FrozenNetwork):
    """What the last layer gets (N, D) and, where the model has a classifier, its logits (N, K).

    Pictures are resized by `Clean` to the size that the model was evaluated at, and normalized as its configuration in
    timm says.

    Args:
        model: timm's name, such as "resnet50.a1_in1k".
        path: its weights, as a state_dict or safetensors; None: the caches are searched.

    Raises:
        ConfigError: timm is not installed, or does not know the model.
        CheckpointError: the weights are missing, or are another model's.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: str, path: Path | None = None) -> None:
        with optional_packages(f"timm:{model}"):
            import timm
        if not timm.is_model(model.split(".")[0]):
            raise ConfigError(f"timm has no model '{model}': {nearest(model, timm.list_models())}")
        try:
            network: Any = timm.create_model(model, pretrained=False)
        except RuntimeError as error:
            raise ConfigError(f"timm:{model}: {error}") from error
        file = _find(model, network.pretrained_cfg, path)
        _fill(network, file, model)
        data = timm.data.resolve_data_config(network.pretrained_cfg)
        width, classes = network.head_hidden_size, network.num_classes
        parts = {MAIN: slice(0, width)} | ({LOGITS: slice(width, width + classes)} if classes else {})
        super().__init__(
            network, f"timm:{model}", weight_hash(network.state_dict()), parts, Clean(data["input_size"][1:])
        )
        self.register_buffer("mean", torch.tensor(data["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(data["std"]).view(3, 1, 1))

    def extract(self, pixels: Tensor) -> Tensor:
        network: Any = self.network
        maps = network.forward_features((pixels / 255 - self.mean) / self.std)
        features: Tensor = network.forward_head(maps, pre_logits=True)
        if LOGITS not in self.parts:
            return features
        return torch.cat([features, network.get_classifier()(features)], dim=1)


def _find(model: str, config: Any, given: Path | None) -> Path:
    if given is None and model in _PORTED:
        return cache.find(_PORTED[model])
    source = Repository(config.get("hf_hub_id") or f"timm/{model}")
    for path in [given] if given is not None else source.places("model.safetensors"):
        if path.is_file():
            return path
    where = given if given is not None else "Hugging Face's cache"
    raise CheckpointError(
        f"{where}: no weights of timm's {model}. Nothing is downloaded while something runs: get them from {source} "
        f"(hf download {source.name} model.safetensors), or name a file."
    )


def _fill(network: nn.Module, path: Path, model: str) -> None:
    with weights_of(f"timm's {model}", path):
        tensors, names = cache.read(path), [*network.state_dict()]
        if model in _PORTED and len(tensors) == len(names) and set(tensors) != set(names):
            tensors = dict(zip(names, tensors.values(), strict=True))
        network.load_state_dict(tensors)
