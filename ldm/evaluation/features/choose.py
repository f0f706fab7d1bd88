"""Feature spaces by the names that command lines and configurations call them."""

from collections.abc import Callable
from pathlib import Path

import torch

from ldm.config.tree import nearest
from ldm.errors import ConfigError
from ldm.evaluation.features.base import Features
from ldm.evaluation.features.classifier import ClassifierFeatures
from ldm.evaluation.features.clip import CLIP
from ldm.evaluation.features.dinov2 import DINOv2
from ldm.evaluation.features.inception import Inception
from ldm.evaluation.features.timm_model import TimmModel
from ldm.evaluation.features.torchvision_trunks import ALEXNET, VGG16, TorchvisionTrunk, Trunk
from ldm.weights import cache

Given = Path | None


def _trunk(trunk: Trunk, given: Given) -> Features:
    """From the file of LPIPS, or from torchvision's whole one, which holds the same convolutions."""
    files = f"lpips-{trunk.name}", trunk.name
    if given is None:
        return TorchvisionTrunk(trunk, cache.find_any(files))
    return TorchvisionTrunk(trunk, cache.find(files[given.suffix != ".safetensors"], given))


_SPACES: dict[str, Callable[[Given], Features]] = {
    "inception": lambda given: Inception(cache.find("inception-2015", given)),
    "inception-clean": lambda given: Inception.clean(cache.find("inception-2015", given)),
    "alexnet": lambda given: _trunk(ALEXNET, given),
    "vgg16": lambda given: _trunk(VGG16, given),
    "dinov2": lambda given: DINOv2(cache.find("dinov2-large", given)),
    "dinov2-base": lambda given: DINOv2(cache.find("dinov2-base", given)),
    "clip": lambda given: CLIP(cache.find("clip-vit-large-patch14", given)),
    "clip-base": lambda given: CLIP(cache.find("clip-vit-base-patch32", given)),
}
_FAMILIES: dict[str, Callable[[str, Given], Features]] = {
    "timm": TimmModel,
    "classifier": lambda file, given: ClassifierFeatures(given or Path(file)),
}

KNOWN = (*_SPACES, "timm:<model>", "classifier:<file>")
"""Every name, or its form."""


def choose(name: str, *, weights: Path | None = None, device: torch.device | str = "cpu") -> Features:
    """The feature space of a name, with its weights, on a device.

    Args:
        name: one of KNOWN.
        weights: a file, or a folder of the model's files; None: the caches are searched, and nothing is downloaded.
        device: where it computes.

    Raises:
        ConfigError: an unknown name, or a package is missing.
        CheckpointError: the weights are missing, or are not what they should be.
    """
    family, separator, which = name.partition(":")
    # Networks of other packages are made with random weights first: no other draw may change by that.
    with torch.random.fork_rng(devices=[]):
        if separator and which and family in _FAMILIES:
            return _FAMILIES[family](which, weights).to(device)
        if name in _SPACES:
            return _SPACES[name](weights).to(device)
    raise ConfigError(f"features '{name}' are unknown: {nearest(name, KNOWN)}")
