"""A small classifier, trained on real images, that scores generated ones by its logits and features.

Its training is independent of the generative models, so its accuracy on their samples tells whether a sample shows the
requested class, and its last features are a space for distances/frechet.py that was learned on the same data.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.evaluation.features import judge_file
from ldm.evaluation.features.base import LOGITS, MAIN, FrozenNetwork
from ldm.evaluation.features.loading import weights_of
from ldm.evaluation.features.resize import Clean
from ldm.randomness import keys, permutation
from ldm.ranges import Count, Resolution
from ldm.runtime.precision import computes_bf16
from ldm.sizes import as_size
from ldm.weights.digest import weight_hash

_TRUNK = "trunk.0.0.weight"

UNLABELED = -100
"""No class: cross entropy leaves it out."""

Network = TypeVar("Network", bound=nn.Module)


class Judgement(NamedTuple):
    """A Classifier's outputs for N images: `logits` (N, K) and `features` (N, D), both fp32 on the CPU."""

    logits: Tensor
    features: Tensor


def block(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """3 x 3 convolution, batch norm, ReLU."""
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


class Classifier(nn.Module):
    """A plain convolutional classifier of small images.

    Args:
        channels: of the images.
        num_classes: K.
        width: channels at half the resolution; the features have 4 * width.
    """

    def __init__(self, channels: Count, num_classes: Count, width: Count = 32) -> None:
        super().__init__()
        self.channels = channels
        self.num_classes = num_classes
        self.trunk = nn.Sequential(
            block(channels, width, stride=2),
            block(width, width),
            block(width, 2 * width, stride=2),
            block(2 * width, 2 * width),
            block(2 * width, 4 * width, stride=2),
            block(4 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(4 * width, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """The input of the last layer: images (N, C, H, W) in [-1, 1] -> (N, 4 * width)."""
        return self.trunk(images)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (N, K) of images (N, C, H, W) in [-1, 1]."""
        return self.head(self.features(images))


def unit_range(images: Tensor) -> Tensor:
    """uint8 pixels 0..255 as float in [-1, 1], the range a Classifier takes."""
    return images.float() / 127.5 - 1


def train_classifier(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    epochs: int = 4,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    width: int = 32,
    seed: int = 0,
) -> Classifier:
    """Train a Classifier from scratch on the CPU; a function of its arguments and of the precision.

    In bf16 autocast where the processor computes bf16 natively, otherwise in float32: emulation is many times slower.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64 in [0, num_classes).
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(keys(seed, "classifier", 0)[0]))
        model = Classifier(images.shape[1], num_classes, width)
    return fit(model, images, labels, epochs, batch_size, learning_rate, seed)


def fit(
    model: Network,
    images: Tensor,
    labels: Tensor,
    epochs: Count,
    batch_size: Count,
    learning_rate: float,
    seed: int,
) -> Network:
    """Train a network by cross entropy, and return it in eval mode; a function of its arguments and of the precision.

    Args:
        model: images in [-1, 1] -> logits (N, K, ...).
        images: (N, C, H, W) uint8.
        labels: (N, ...) integers in [0, K), or `UNLABELED`, which counts for nothing.
        epochs: passes over the images.
        batch_size, learning_rate: of AdamW, the rate of one cycle.
        seed: of the order.
    """
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=1e-2)
    # The last, smaller batch of an epoch is dropped: its batch statistics would be unreliable.
    batches = max(len(images) // batch_size, 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * batches)
    bf16 = computes_bf16("cpu").native
    model.train()
    for epoch in range(epochs):
        order = torch.from_numpy(permutation(seed, epoch, len(images)))
        for rows in order[: batches * batch_size].split(batch_size):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(unit_range(images[rows]))
            loss = F.cross_entropy(logits.float(), labels[rows].long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def judge(model: Classifier, images: Tensor, batch_size: int = 500) -> Judgement:
    """Logits and features, in fp32, of `images` (N, C, H, W) uint8; `model` in eval mode."""
    features = torch.cat([model.features(unit_range(batch)) for batch in images.split(batch_size)])
    return Judgement(model.head(features), features)


def save(model: Classifier, resolution: Resolution, path: Path) -> None:
    """Write the classifier, and the size of the images that it was trained on, as safetensors."""
    judge_file.write(path, judge_file.CLASSES, model, as_size(resolution))


def restored(tensors: Mapping[str, Tensor]) -> Classifier:
    """The Classifier of these tensors; RuntimeError or KeyError where they are of another network."""
    width, channels = tensors[_TRUNK].shape[:2]
    network = Classifier(channels, len(tensors["head.weight"]), width)
    network.load_state_dict(tensors)
    return network


class ClassifierFeatures(FrozenNetwork):
    """A saved Classifier as a feature space: its features (4 * width) and logits (K), of images of its own size.

    Raises:
        CheckpointError: the file is missing, or was not written by `save`.
    """

    def __init__(self, path: Path) -> None:
        held = judge_file.read(path, judge_file.CLASSES)
        with weights_of("a classifier that ldm saved", path):
            network = restored(held.tensors)
        features, classes = network.head.in_features, network.head.out_features
        parts = {MAIN: slice(0, features), LOGITS: slice(features, features + classes)}
        super().__init__(network, "classifier", weight_hash(held.tensors), parts, Clean(held.size), network.channels)

    def extract(self, pixels: Tensor) -> Tensor:
        network: Classifier = self.get_submodule("network")  # type: ignore[assignment]
        features = network.features(unit_range(pixels))
        return torch.cat([features, network.head(features)], dim=1)
