"""A small segmenter, trained on real images and their maps of classes, that reads the map off a generated one."""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.evaluation.features.classifier import block, fit
from ldm.randomness import keys
from ldm.ranges import Count

_LEVELS = 3
"""Resolutions: 1/2, 1/4 and 1/8 of the image's."""


class Segmenter(nn.Module):
    """A plain U-Net (Ronneberger et al. 2015, arXiv:1505.04597) of three levels, the finest at half the resolution.

    Args:
        channels: of the images.
        num_classes: K.
        width: channels at half the resolution; twice as many at each level below.
    """

    def __init__(self, channels: Count, num_classes: Count, width: Count = 32) -> None:
        super().__init__()
        self.channels = channels
        self.num_classes = num_classes
        widths = [width * 2**level for level in range(_LEVELS)]
        pairs = [*pairwise(widths)]
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), block(4 * channels, width), block(width, width))
        self.down = nn.ModuleList(
            nn.Sequential(block(fine, coarse, 2), block(coarse, coarse)) for fine, coarse in pairs
        )
        self.up = nn.ModuleList(block(low + high, low) for low, high in reversed(pairs))
        self.head = nn.Sequential(nn.Conv2d(width, 4 * num_classes, 1), nn.PixelShuffle(2))

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (N, K, H, W) of images (N, C, H, W) in [-1, 1], of any size."""
        height, width = images.shape[2:]
        x = self.stem(F.pad(images, (0, -width % 2**_LEVELS, 0, -height % 2**_LEVELS), "replicate"))
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(x)
        for up, skip in zip(self.up, reversed(skips), strict=True):
            x = up(torch.cat([skip, F.interpolate(x, scale_factor=2.0)], dim=1))
        return self.head(x)[..., :height, :width]


def train_segmenter(
    images: Tensor,
    maps: Tensor,
    num_classes: int,
    *,
    epochs: int = 4,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    width: int = 32,
    seed: int = 0,
) -> Segmenter:
    """Train a Segmenter from scratch on the CPU; a function of its arguments and of the precision.

    Args:
        images: (N, C, H, W) uint8.
        maps: (N, H, W) integers in [0, num_classes), or `UNLABELED`; each with some labeled pixel.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(keys(seed, "segmenter", 0)[0]))
        model = Segmenter(images.shape[1], num_classes, width)
    return fit(model, images, maps, epochs, batch_size, learning_rate, seed)


def restored(tensors: Mapping[str, Tensor]) -> Segmenter:
    """The Segmenter of these tensors; RuntimeError or KeyError where they are of another network."""
    width, channels = tensors["stem.1.0.weight"].shape[:2]
    network = Segmenter(channels // 4, len(tensors["head.0.weight"]) // 4, width)
    network.load_state_dict(tensors)
    return network
