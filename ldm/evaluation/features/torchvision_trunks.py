"""AlexNet and VGG16 as torchvision trained them on ImageNet: real features whose weights a package carries.

Only the convolutions are used, for LPIPS' files hold no others: a picture's features are the last convolution's
activations, averaged over all places. A distance in AlexNet's is the default where nothing can be downloaded.

They tell what is worse: 600 OpenMoji of 64 px are at an AlexNet distance of 3.3 from 600 others; blurred by 0.5, 1 and
2 px at 5.1, 18 and 45; with noise of 8, 24 and 64 at 6.3, 23 and 96; 30 of them, repeated, at 23. Without upsampling
noise of 8 hardly shows (46 against 43); at 224 px it shows a little more, at less than a quarter of the speed.
VGG16, at a twentieth of the speed, orders them alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models

from ldm.evaluation.features.base import MAIN, FrozenNetwork
from ldm.evaluation.features.loading import fill
from ldm.evaluation.features.resize import Clean
from ldm.ranges import Count
from ldm.weights.digest import weight_hash

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of pixels in [0, 1]."""


@dataclass(frozen=True)
class Trunk:
    """The convolutional part of a network of torchvision.

    Attributes:
        name: torchvision's.
        layer: the paper's name of the last convolution.
        make: the whole network.
        width: channels of the last convolution.
    """

    name: str
    layer: str
    make: Callable[[], nn.Module]
    width: int


ALEXNET = Trunk("alexnet", "conv5", models.alexnet, 256)
VGG16 = Trunk("vgg16", "conv5_3", models.vgg16, 512)


class TorchvisionTrunk(FrozenNetwork):
    """The last convolution's activations (after ReLU) averaged over all places: (N, width).

    The weights' hash is that of the convolutions, so it is the same from torchvision's file and from LPIPS'.

    Args:
        trunk: ALEXNET or VGG16.
        path: a file with its weights under torchvision's names, `features.*`.
        size: side of the pictures that the network gets.

    Raises:
        CheckpointError: the file holds other weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, trunk: Trunk, path: Path, size: Count = 128) -> None:
        with torch.device("meta"):
            layers = trunk.make().get_submodule("features")
        assert isinstance(layers, nn.Sequential)
        network = layers[:-1]  # without the last pooling, which would leave out some places
        fill(network, path, f"torchvision's {trunk.name}", prefix="features.")
        weights = weight_hash({f"features.{name}": one for name, one in network.state_dict().items()})
        super().__init__(network, f"{trunk.name}-{trunk.layer}", weights, {MAIN: slice(0, trunk.width)}, Clean(size))
        self.register_buffer("mean", 255 * torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1))

    def extract(self, pixels: Tensor) -> Tensor:
        maps: Tensor = self.network((pixels - self.mean) / self.std)  # (N, width, h, w)
        return maps.mean((2, 3))
