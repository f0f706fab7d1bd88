"""A small segmenter, trained on real images and their maps of classes, that reads the map off a generated one."""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.evaluation.features.classifier import block, fit
from ldm.randomness import keys
from ldm.ranges import Count

_PATCH = 4  # pixels a side that the finest level sees, and draws, as one: small networks learn sooner what they show
_LEVELS = 3


class Segmenter(nn.Module):
    """A plain U-Net (Ronneberger et al. 2015, arXiv:1505.04597) of three levels, the finest of patches of 4 x 4 pixels.

    Args:
        channels: of the images.
        num_classes: K.
        width: channels of the finest level; twice as many at each level below.
    """

    def __init__(self, channels: Count, num_classes: Count, width: Count = 32) -> None:
        super().__init__()
        self.channels = channels
        self.num_classes = num_classes
        widths = [width * 2**level for level in range(_LEVELS)]
        pairs = [*pairwise(widths)]
        self.stem = nn.Sequential(nn.PixelUnshuffle(_PATCH), block(_PATCH**2 * channels, width), block(width, width))
        self.down = nn.ModuleList(
            nn.Sequential(block(fine, coarse, 2), block(coarse, coarse)) for fine, coarse in pairs
        )
        self.up = nn.ModuleList(block(fine + coarse, fine) for fine, coarse in reversed(pairs))
        # What a thing is and where it ends within a patch are joined by a layer of their own.
        drawn = nn.Conv2d(4 * width, _PATCH**2 * num_classes, 1)
        self.head = nn.Sequential(nn.Conv2d(width, 4 * width, 1), nn.ReLU(), drawn, nn.PixelShuffle(_PATCH))

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (N, K, H, W) of images (N, C, H, W) in [-1, 1], of any size."""
        height, width = images.shape[2:]
        whole = _PATCH * 2 ** (_LEVELS - 1)
        x = self.stem(F.pad(images, (0, -width % whole, 0, -height % whole), "replicate"))
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
    batch_size: int = 16,
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
    network = Segmenter(channels // _PATCH**2, len(tensors["head.2.weight"]) // _PATCH**2, width)
    network.load_state_dict(tensors)
    return network
