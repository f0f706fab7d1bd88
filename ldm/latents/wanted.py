"""What a configuration wants of each item beside its latent and what lies on its picture: features and numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ldm.data.dataset import ImageDataset, has_captions
from ldm.diffusion.conditioners.features import Feature
from ldm.errors import ConfigError
from ldm.latents.conditions import CAPTION, Captions, Conditions
from ldm.latents.dataset_parts import CAPTIONS_NAME, DatasetParts, no_captions
from ldm.latents.numbers import check, gathered
from ldm.latents.part_reader import PartReader


@dataclass(frozen=True)
class Wanted:
    """What a configuration wants of each item beside its latent.

    Args:
        features: by name.
        numbers: names of ldm/latents/numbers.py.
        targets: (2,) or (items, 2), height and width that the pictures of each data set are cropped to.
    """

    features: Mapping[str, Feature]
    numbers: Sequence[str]
    targets: Mapping[str, np.ndarray]

    def demand(self, dataset: ImageDataset) -> None:
        """ConfigError if a data set lacks any of it, as far as can be seen before hours of encoding."""
        check(dataset, self.numbers)
        for name, feature in self.features.items():
            if feature.reads == CAPTION and not has_captions(dataset):
                raise no_captions(name, dataset)

    def conditions(
        self, parts: Mapping[str, DatasetParts], captions: Mapping[str, Captions | None], device: torch.device
    ) -> dict[str, Conditions]:
        """Of each data set, by its name; the features are computed on `device` where they are not there.

        One after the other, so that one network at a time is in memory, and none afterwards.
        """
        found: dict[str, dict[str, PartReader]] = {name: {} for name in parts}
        for key, feature in self.features.items():
            try:
                for name, readers in found.items():
                    readers[key] = parts[name].feature(key, feature, captions.get(name), device)
            finally:
                feature.release()
        return {
            name: Conditions(captions.get(name), found[name], gathered(part.dataset, self.numbers, self.targets[name]))
            for name, part in parts.items()
        }


def named(features: Mapping[str, Feature]) -> dict[str, Feature]:
    """The features; ConfigError unless each has a name that can begin a column's and be a folder's."""
    for name, feature in features.items():
        if not name.isidentifier() or name == CAPTIONS_NAME:
            raise ConfigError(f"data.params.features.{name}: expected a name of letters, digits and _, such as text")
        if not isinstance(feature, Feature):
            raise ConfigError(
                f"data.params.features.{name}: expected a feature (ldm/diffusion/conditioners/features.py), found "
                f"{type(feature).__name__}"
            )
    return dict(features)
