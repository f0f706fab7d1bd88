"""A small classifier, trained on real images, that scores generated ones by its logits and features.

Its training is independent of the generative models, so its accuracy on their samples tells whether a sample shows the
requested class, and its last features are a space for distances/frechet.py that was learned on the same data.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.randomness import keys, permutation
from ldm.ranges import Count
from ldm.runtime.precision import computes_bf16


class Judgement(NamedTuple):
    """A Classifier's outputs for N images: `logits` (N, K) and `features` (N, D), both fp32 on the CPU."""

    logits: Tensor
    features: Tensor


def _block(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
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
        self.trunk = nn.Sequential(
            _block(channels, width, stride=2),
            _block(width, width, stride=1),
            _block(width, 2 * width, stride=2),
            _block(2 * width, 2 * width, stride=1),
            _block(2 * width, 4 * width, stride=2),
            _block(4 * width, 4 * width, stride=1),
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
            loss = F.cross_entropy(logits.float(), labels[rows])
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
