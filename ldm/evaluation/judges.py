"""Who looks for what samples were asked by: a classifier of what is in boxes, and a segmenter that draws the map.

Both are trained on real pictures (ldm/evaluation/labeled.py) and never see a sample.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from ldm.errors import ConfigError
from ldm.evaluation.features import classifier, segmenter
from ldm.evaluation.features.classifier import Classifier, unit_range
from ldm.evaluation.features.judge_file import BOXES, MAP, Kind, read, write
from ldm.evaluation.features.loading import weights_of
from ldm.evaluation.features.segmenter import Segmenter
from ldm.ranges import Count, Resolution
from ldm.runtime.full_precision import full_precision
from ldm.sizes import Size, as_size, spell
from ldm.weights.digest import weight_hash

SIDE = 32
"""Of the crops of boxes, pixels."""


class Judge(nn.Module, ABC):
    """A frozen network that tells classes.

    Args:
        network: trained; frozen here.
        size: height and width of the pictures that it was trained on.
        names: of the classes; None: they have none.
    """

    kind: ClassVar[Kind]

    def __init__(self, network: Classifier | Segmenter, size: Resolution, names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.network: Classifier | Segmenter = network.requires_grad_(False).eval()
        self.size = as_size(size)
        self.names = None if names is None else [*names]
        self.num_classes = network.num_classes
        self.weights = weight_hash(network.state_dict())

    def train(self, mode: bool = True) -> "Judge":
        """Always stays in eval mode."""
        return super().train(False)

    def save(self, path: Path) -> None:
        """Write all that `load` reads."""
        write(path, self.kind, self.network, self.size, self.names)

    def check(self, channels: Count, size: Size, num_classes: Count | None, names: Sequence[str] | None) -> None:
        """ConfigError unless it can judge pictures of these channels and this size, asked for by these classes.

        Args:
            num_classes, names: of what the model reads; None: not known.
        """
        flag = self.kind.flag
        if channels != self.network.channels:
            raise ConfigError(
                f"{flag}: it sees pictures of {self.network.channels} channels, and the samples have {channels}: "
                "train one on the data of this run"
            )
        number = len(names) if names is not None else num_classes
        if number not in (None, self.num_classes):
            raise ConfigError(
                f"{flag}: it knows {self.num_classes} classes, and the model {number}: train one on the data of this "
                "run"
            )
        for place, (own, other) in enumerate(zip(self.names or (), names or (), strict=False)):
            if own != other:
                raise ConfigError(
                    f"{flag}: its class {place} is {own!r}, and the model's is {other!r}: train one on the data of "
                    "this run"
                )

    def _classes(self, images: Tensor) -> Tensor:
        """The likeliest class of images (N, C, H, W) uint8: (N, ...) int64 on the CPU."""
        device = next(self.network.parameters()).device
        with full_precision(device.type), torch.no_grad():
            return self.network(unit_range(images.to(device))).argmax(1).cpu()

    @classmethod
    @abstractmethod
    def load(cls, path: Path) -> "Judge":
        """What `save` wrote; CheckpointError if it is of another kind, or none."""


class BoxClassifier(Judge):
    """Names what is in the boxes of pictures."""

    kind = BOXES

    def __call__(self, images: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """The class in each box: (sum of K,) int64 on the CPU, those of the first picture first.

        Args:
            images: (n, C, H, W) uint8 on the CPU.
            boxes: of each picture (K, 4 or more): left, top, right, bottom in [0, 1].
        """
        return self._classes(crops(images, boxes))

    @classmethod
    def load(cls, path: Path) -> "BoxClassifier":
        held = read(path, cls.kind)
        with weights_of(f"{cls.kind.what} that ldm saved", path):
            return cls(classifier.restored(held.tensors), held.size, held.classes)


class MapSegmenter(Judge):
    """Draws the map of pictures."""

    kind = MAP

    def __call__(self, images: Tensor) -> Tensor:
        """The class of each pixel, (n, H, W) int64 on the CPU, of pictures (n, C, H, W) uint8."""
        return self._classes(images)

    def check(self, channels: Count, size: Size, num_classes: Count | None, names: Sequence[str] | None) -> None:
        super().check(channels, size, num_classes, names)
        if size != self.size:  # in boxes things have many sizes; here each its own
            raise ConfigError(
                f"{self.kind.flag}: it was trained on pictures of {spell(self.size)} pixels, and the samples have "
                f"{spell(size)}: train one at their size"
            )

    @classmethod
    def load(cls, path: Path) -> "MapSegmenter":
        held = read(path, cls.kind)
        with weights_of(f"{cls.kind.what} that ldm saved", path):
            return cls(segmenter.restored(held.tensors), held.size, held.classes)


def crops(images: Tensor, boxes: Sequence[Tensor], side: Count = SIDE) -> Tensor:
    """What is in boxes, stretched to squares: (sum of K, C, side, side) uint8.

    Each pixel is the mean of bilinear samples, as many as the box has pixels for it.

    Args:
        images: (n, C, H, W) uint8.
        boxes: of each picture (K, 4 or more): left, top, right, bottom in [0, 1].
        side: of the crops.
    """
    height, width = images.shape[2:]
    scale = torch.tensor([width, height, width, height], dtype=torch.float32)
    corners = [one[:, :4].float() * scale for one in boxes]
    return roi_align(images.float(), corners, side, aligned=True).round().clamp(0, 255).to(torch.uint8)
