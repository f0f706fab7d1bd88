"""Pictures that are made as they are asked for: samples of a stage-2 run, reconstructions of a stage-1 run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.autoencoder.codec import Codec
from ldm.errors import ConfigError, NumericError
from ldm.evaluation.pictures.base import Description
from ldm.evaluation.pictures.items import Items
from ldm.evaluation.pictures.labels import Balanced, Labels
from ldm.evaluation.pictures.stored import DatasetPictures
from ldm.images import to_uint8
from ldm.ranges import Count, CountOrZero
from ldm.runtime.full_precision import full_precision
from ldm.sampling.conditions import Condition
from ldm.sampling.generate import generate
from ldm.sampling.guidance import Guidance
from ldm.sampling.pipeline import Pipeline
from ldm.sampling.samplers import Sampler
from ldm.sampling.timesteps import TimestepSchedule
from ldm.sizes import as_size
from ldm.weights.digest import weight_hash


@dataclass(frozen=True)
class Recipe:
    """How samples are made.

    Attributes:
        sampler, steps, schedule, guidance: as in ldm/sampling/generate.py.
        settings: the same in plain values, as samples.json and records have them.
        labels: which classes samples are made of.
        items: by which items samples are asked for instead; None: by `labels`, which a model of captions cannot be.
    """

    sampler: Sampler
    steps: int
    schedule: TimestepSchedule
    guidance: Guidance
    settings: Mapping[str, Any]
    labels: Labels = field(default_factory=Balanced)
    items: Items | None = None

    @property
    def asked(self) -> str:
        """The name of the rule by which samples are asked for."""
        return self.labels.name if self.items is None else self.items.name


def _computing(device: str) -> dict[str, Any]:
    """The type of device, and how convolutions and matrix products round float32 there, which other pixels come of.

    Samples are made as `sample.py` makes them: torch's own default on a GPU is TF32 in convolutions.
    """
    backends: Any = torch.backends
    library, products = (backends.cudnn, backends.cuda) if device == "cuda" else (backends.mkldnn, backends.mkldnn)
    return {"device": device, "float32": [library.conv.fp32_precision, products.matmul.fp32_precision]}


class Generated:
    """Samples of a stage-2 model, one a seed, from the first seed on; never kept, but made anew when asked for.

    Args:
        pipeline: the model.
        recipe: how they are made.
        number: how many there are; does not change what each of them is.
        first: the first seed.

    Raises:
        ConfigError: the model reads other conditions than the class, or there are not so many seeds.
    """

    def __init__(self, pipeline: Pipeline, recipe: Recipe, number: Count, first: CountOrZero = 0) -> None:
        others = [key for key in pipeline.conditioner.keys if key != "class_label"]
        if others and recipe.items is None:
            raise ConfigError(
                f"this model reads {', '.join(others)}, and only classes can be drawn: ask for its samples by items of "
                "its data (labels: items), or make them with sample.py --conditions FILE and evaluate their folder"
            )
        if first + number > 2**63:
            raise ConfigError(f"the first seed {first}: {number} samples would need seeds beyond 2^63 - 1; take less")
        self.pipeline = pipeline
        self.recipe = recipe
        self.seeds = first + np.arange(number)
        height, width = as_size(pipeline.manifest.plan.pixels["resolution"])
        self.shape = (pipeline.codec.in_channels, height, width)

    def __len__(self) -> int:
        return len(self.seeds)

    def images(self, indices: Sequence[int]) -> Tensor:
        seeds = self.seeds[np.asarray(indices, dtype=np.int64)]
        return self.of(seeds, self._conditions(seeds))

    def of(self, seeds: np.ndarray, conditions: Sequence[Condition] | None) -> Tensor:
        """The samples of these seeds and conditions: (n, C, H, W) uint8 on the CPU."""
        made = generate(
            self.pipeline,
            seeds.tolist(),
            conditions,
            sampler=self.recipe.sampler,
            steps=self.recipe.steps,
            schedule=self.recipe.schedule,
            guidance=self.recipe.guidance,
            batch_size=max(1, len(seeds)),
        )
        return torch.from_numpy(np.stack([sample.image for sample in made])).permute(0, 3, 1, 2).contiguous()

    def labels(self) -> np.ndarray | None:
        if self.recipe.items is not None:
            return self.recipe.items.labels(self.seeds)
        classes = self.pipeline.num_classes
        return None if classes is None else self.recipe.labels(self.seeds, classes)

    def _conditions(self, seeds: np.ndarray) -> list[Condition] | None:
        if self.recipe.items is not None:
            return self.recipe.items.conditions(seeds)
        classes = self.pipeline.num_classes
        if classes is None:
            return None
        return [{"class_label": label} for label in self.recipe.labels(seeds, classes).tolist()]

    def description(self) -> Description:
        """Reads all weights, which must be whole: of a model that is sharded over ranks there is none."""
        pipeline, guide = self.pipeline, self.recipe.guidance.guide
        manifest = pipeline.manifest
        described = {key: value for key, value in self.recipe.settings.items() if key not in ("checkpoint", "guide")}
        return {
            "kind": "samples",
            **described,
            "labels": self.recipe.asked if pipeline.conditioner.keys else None,
            "first_seed": int(self.seeds[0]),
            "network": [weight_hash(module.state_dict()) for module in (pipeline.denoiser, pipeline.objective)],
            "guide": None if guide is None else weight_hash(guide.denoiser.state_dict()),
            "autoencoder": manifest.plan.autoencoder["weights"],
            "latents": {"mean": [*manifest.mean], "std": [*manifest.std]},
            # A model of several sizes is measured at the one that most of its pictures have.
            **({} if manifest.sizes is None else {"size": [*self.shape[1:]], "trained_sizes": manifest.sizes}),
            **_computing(pipeline.device.type),
        }


class Reconstruction(NamedTuple):
    """Originals and reconstructions (n, C, H, W) float32 in [-1, 1]; mean and std of the posteriors, (n, c, h, w)."""

    original: Tensor
    decoded: Tensor
    mean: Tensor
    std: Tensor

    @property
    def images(self) -> Tensor:
        """The reconstructions, (n, C, H, W) uint8."""
        return to_uint8(self.decoded)


class Reconstructions:
    """Pictures of a data set, encoded to the mean of their posterior and decoded.

    Args:
        codec: the autoencoder.
        originals: what it is given.
        number: of them, the first ones; None: all.
        compute: what they are decoded in: float32, or bfloat16 by autocast. They are encoded in float32.
    """

    def __init__(
        self,
        codec: Codec,
        originals: DatasetPictures,
        number: Count | None = None,
        compute: torch.dtype = torch.float32,
    ) -> None:
        self.codec = codec
        self.compute = compute
        self._number = len(originals) if number is None else min(number, len(originals))
        self.originals = originals
        self.shape = originals.shape
        self._weights = codec.weight_hash()

    def __len__(self) -> int:
        return self._number

    def batch(self, indices: Sequence[int]) -> Reconstruction:
        """Encoded and decoded once, for all that is measured of it; NumericError if it is not finite."""
        pixels = self.originals.pixels(indices).to(self.codec.device)
        mean, std = self.codec.encode(pixels)
        kind = self.codec.device.type
        plain = self.compute == torch.float32
        with full_precision(kind) if plain else torch.autocast(kind, self.compute):
            decoded = self.codec.decode(mean)
        if not all(bool(torch.isfinite(values).all()) for values in (mean, std, decoded)):
            raise NumericError(
                f"{self.codec.path}: a reconstruction is not finite (of pictures {indices[0]} to {indices[-1]}): the "
                "weights are damaged or have diverged; use an earlier checkpoint"
            )
        return Reconstruction(pixels, decoded, mean, std)

    def images(self, indices: Sequence[int]) -> Tensor:
        return self.batch(indices).images.cpu()

    def labels(self) -> np.ndarray | None:
        labels = self.originals.labels()
        return None if labels is None else labels[: len(self)]

    def description(self) -> Description:
        return {
            "kind": "reconstructions",
            "of": self.originals.description(),
            "autoencoder": self._weights,
            "device": self.codec.device.type,
            **({} if self.compute == torch.float32 else {"compute": str(self.compute)}),
        }
