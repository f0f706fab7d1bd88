"""The pictures of a configuration's data set: what a run was trained on, or would be."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ldm.config.load import build, load
from ldm.data.datamodule import ImageDataModule
from ldm.data.dataset import ImageDataset, Subset
from ldm.data.transforms import EvalTransform
from ldm.errors import ConfigError
from ldm.evaluation.pictures.stored import DatasetPictures
from ldm.latents.datamodule import LatentDataModule
from ldm.latents.dense import Dense
from ldm.randomness import permutation


class NoSuchPart(ConfigError):
    """The data has no part of that name."""


class Configured(NamedTuple):
    """Pictures of a data set, in an order that has nothing to do with their contents, and which part of it they are.

    `dense` is what the data module makes of what lies on them; None: it is one of stage 1.
    """

    pictures: DatasetPictures
    part: str
    dense: Dense | None = None


def of_file(file: Path, overrides: Sequence[str], trust: Sequence[str], part: str | None = None) -> Configured:
    """The data set of a configuration's file, at the size that it is trained at.

    Args:
        file: YAML.
        overrides: words key=value.
        trust: packages besides ldm's own that it may name.
        part: "train" or "validation"; None: validation where there is one, else train.

    Raises:
        NoSuchPart: it has no such part.
        ConfigError: it is no configuration.
        DataError: the data cannot be read.
    """
    config = load([file], overrides, trust)
    config.check()
    return of_data(config.resolved()["data"], trust, part, str(file))


def of_data(
    node: Mapping[str, Any],
    trust: Sequence[str],
    part: str | None,
    origin: str,
    pixels: Mapping[str, Any] | None = None,
) -> Configured:
    """The data set of a configuration's section `data`.

    Args:
        part: "train" or "validation"; None: validation where there is one, else train.
        origin: of the configuration, for messages.
        pixels: {"resolution", "channels", "interpolation"} of a run that was trained on it; None: as it is configured.
    """
    if pixels and "autoencoder" in (params := node.get("params") or {}):
        node = {**node, "params": {**params, "autoencoder": None}}  # of no use here, and it may have moved
    data = build(node, trust, key="data")
    if not isinstance(data, ImageDataModule | LatentDataModule):
        raise ConfigError(f"{origin}: data.target: expected one of ldm's data modules, found {type(data).__qualname__}")
    data.trust = trust
    parts = {"train": data.train_dataset, "validation": data.validation_dataset}
    part = part or ("train" if data.validation_dataset is None else "validation")
    dataset = parts[part]
    if dataset is None:
        raise NoSuchPart(f"{origin}: has no validation part; take --part train, or set data.params.num_validation")
    dataset.prepare()
    transform, channels = _of_run(pixels) if pixels else _of_data(data)
    dense = data.dense if isinstance(data, LatentDataModule) else None
    return Configured(DatasetPictures(scattered(dataset), transform, channels), part, dense)


def scattered(dataset: ImageDataset) -> Subset:
    """All items, in an order that has nothing to do with their contents, the same in every run."""
    return Subset(dataset, permutation(0, 0, len(dataset)).tolist())


def _of_run(pixels: Mapping[str, Any]) -> tuple[EvalTransform, int]:
    return EvalTransform(pixels["resolution"], pixels.get("interpolation", "bicubic")), int(pixels["channels"])


def _of_data(data: ImageDataModule | LatentDataModule) -> tuple[EvalTransform, int]:
    if isinstance(data, LatentDataModule):
        return data.transform, int(data.facts()["image_channels"])
    own = data.eval_transform
    return own if isinstance(own, EvalTransform) else EvalTransform(data.size), data.channels
