"""LPIPS, the learned perceptual distance (Zhang et al. 2018, arXiv:1801.03924), version 0.1 with VGG16 or AlexNet.

The distance compares two images' features at five depths of an image classifier, each feature vector scaled to
unit length, squared differences weighted by channel. The channel weights ship with torchmetrics; the classifiers are
torchvision's, whose weights must already be on disk: they are never downloaded here. `ldm weights --fetch` brings them.
"""

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.models.vgg import cfgs, make_layers

from ldm.channels_last import LAYOUT, fastest_layout
from ldm.convolutions import convolved
from ldm.errors import CheckpointError, ConfigError
from ldm.weights import cache


@dataclass(frozen=True)
class Trunk:
    """A classifier's convolutional part, and what LPIPS compares of it.

    Attributes:
        name: torchvision's.
        layers: makes its `features`.
        stages: where each of the five compared features begins and ends in them.
        widths: channels of each.
        smallest: pixels on a side that are needed.
        heads: torchmetrics' file of channel weights.
        files: with its weights, in the order of preference (names of ldm/weights/catalog.py).
    """

    name: str
    layers: Callable[[], nn.Sequential]
    stages: tuple[tuple[int, int], ...]
    widths: tuple[int, ...]
    smallest: int
    heads: str
    files: tuple[str, ...]


def _alexnet() -> nn.Sequential:
    """torchvision's alexnet().features up to the last activation, without making its 55 million other weights."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True)),
    )


VGG16 = Trunk(
    name="vgg16",
    layers=lambda: make_layers(cfgs["D"], batch_norm=False),
    stages=((0, 4), (4, 9), (9, 16), (16, 23), (23, 30)),  # relu1_2 ... relu5_3
    widths=(64, 128, 256, 512, 512),
    smallest=16,  # four halvings lie between the first features and the last
    heads="vgg.pth",
    files=("vgg16", "lpips-vgg16"),
)
ALEXNET = Trunk(
    name="alexnet",
    layers=_alexnet,
    stages=((0, 2), (2, 5), (5, 8), (8, 10), (10, 12)),  # relu1 ... relu5
    widths=(64, 192, 384, 256, 256),
    smallest=31,  # strides 4, 2 and 2, whose windows of 11, 3 and 3 need one position each
    heads="alex.pth",
    files=("alexnet", "lpips-alexnet"),
)


class LPIPS(nn.Module):
    """Distance of image pairs: two (N, C, H, W) in [-1, 1] -> (N,) float32, zero for equal images; with VGG16.

    C is 3, or 1 (repeated to three). Frozen: no gradient reaches its weights, `.train()` has no effect, and its weights
    are not in state_dict(), because every run reads the same ones.

    Args:
        trunk: file with the weights of torchvision's classifier; ldm's cache and torch hub's are searched if not given.
        pretrained: False: a random trunk, always the same, for tests of shapes without the file.

    Raises:
        CheckpointError: the weights are missing, or are another network's; names the file and how to get it.
        ConfigError: (at the first images) they have fewer than 16 pixels on a side (AlexNet: 31), or neither 1 nor 3
            channels.
    """

    TRUNK: ClassVar[Trunk] = VGG16
    shift: Tensor
    scale: Tensor

    def __init__(self, trunk: str | None = None, pretrained: bool = True) -> None:
        super().__init__()
        self._cast: dict[torch.dtype, nn.ModuleList] = {}
        # ImageNet's mean and standard deviation, for images in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        trunk_layers = _random(self.TRUNK)
        self.stages = nn.ModuleList(trunk_layers[start:end] for start, end in self.TRUNK.stages)
        self.heads = nn.ParameterList(torch.ones(width) for width in self.TRUNK.widths)
        # A config that is only inspected (sizes, FLOPs) is built on the meta device, so there is nothing to load.
        if not self.heads[0].is_meta:
            self._load_heads()
            if pretrained:
                self._load_trunk(_find(self.TRUNK, trunk))
        self.requires_grad_(False)
        self.train()
        self.register_state_dict_post_hook(_leave_out)
        self.register_load_state_dict_pre_hook(_keep_own)

    def train(self, mode: bool = True) -> "LPIPS":
        """Always stays in eval mode."""
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        channels, height, width = a.shape[1:]
        if channels not in (1, 3):
            raise ConfigError(
                f"LPIPS compares pictures of 1 or 3 channels (gray or color), found {channels}: leave it out (null in "
                f"its place)"
            )
        if min(height, width) < self.TRUNK.smallest:
            raise ConfigError(
                f"LPIPS compares pictures at ever smaller sizes, so with {self.TRUNK.name} it needs "
                f"{self.TRUNK.smallest} pixels or more on each side, found {height} x {width}: take larger pictures, "
                f"or leave it out (null in its place)"
            )
        total = torch.zeros(a.shape[0], device=a.device)  # (N,)
        for head, x, y in zip(self.heads, self.features(a), self.features(b), strict=True):
            total = total + _Distance.apply(x, y, head)  # (N,)
        return total

    def features(self, images: Tensor) -> list[Tensor]:
        """The five feature maps, ever smaller: (N, width, h, w) each."""
        h = fastest_layout((images.expand(-1, 3, -1, -1) - self.shift) / self.scale)  # (N, 3, H, W)
        maps = []
        for stage in self._stages_for(images):
            for layer in stage.children():
                h = convolved(h, layer)  # (N, width of this or the stage before, h, w)
            maps.append(h)  # (N, width, h, w)
        return maps

    def _stages_for(self, images: Tensor) -> nn.ModuleList:
        """The stages; under autocast on CPUs in its type, which would cast weights that are not trained at every call.

        Made once and kept, laid out as pictures in bf16 are: a twentieth of a step of the f8 autoencoder on 64 px.
        """
        if images.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return self.stages
        dtype = torch.get_autocast_dtype("cpu")
        if dtype not in self._cast:
            # Not in inference mode, even where the first caller is: training could not use it later.
            with torch.inference_mode(False), torch.no_grad():
                self._cast[dtype] = copy.deepcopy(self.stages).to(dtype, memory_format=LAYOUT)  # type: ignore[call-overload]
        return self._cast[dtype]

    def _load_heads(self) -> None:
        weights = cache.read(_package_folder() / "functional" / "image" / "lpips_models" / self.TRUNK.heads)
        for index, head in enumerate(self.heads):
            head.data.copy_(weights[f"lin{index}.model.1.weight"].flatten())

    def _load_trunk(self, path: Path) -> None:
        weights = cache.read(path)
        for stage in self.stages:
            # The stages are slices, whose layers keep their numbers in torchvision's `features`.
            for name, parameter in stage.named_parameters():
                found = weights.get(f"features.{name}")
                if found is None or found.shape != parameter.shape:
                    actual = "is missing" if found is None else f"has {tuple(found.shape)}"
                    raise CheckpointError(
                        f"{path}: not the weights of torchvision's {self.TRUNK.name}: 'features.{name}' should have "
                        f"shape {tuple(parameter.shape)} and {actual}. `ldm weights` says where to get the right file."
                    )
                parameter.data.copy_(found)


class AlexNetLPIPS(LPIPS):
    """The same with AlexNet, at a small part of VGG16's cost: what papers report, where they name no network."""

    TRUNK: ClassVar[Trunk] = ALEXNET


def _random(trunk: Trunk) -> nn.Sequential:
    """Its layers with the same random weights each time; does not change torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        features = trunk.layers()
        for layer in features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(cast(Tensor, layer.bias))
        return features


class _Distance(torch.autograd.Function):
    """The weighted squared difference of feature vectors of unit length, its mean over the pixels.

    Of (N,C,h,w) twice and weights (C,): (N,), in float32 or more precise. With n the length of y at a pixel, u = y / n,
    v the same of x, and d = u - v, the gradient by y of the sum of w d^2 / (h w) is

        (a - u (a . u)) / n   where a = 2 w d / (h w)

    which takes a third of the passes over the maps that autograd needs. The 1e-10 that is added to each length, for
    features that are all zero, is left out of the length's own derivative.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        x_length, y_length = (_lengths(features) for features in (x, y))  # (N, 1, h, w)
        u = y / y_length  # (N, C, h, w)
        d = u - x / x_length  # (N, C, h, w)
        ctx.save_for_backward(u, d, x_length, y_length, weights)
        ctx.dtypes = x.dtype, y.dtype
        return ((d * d).mean((2, 3)) * weights).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        u, d, x_length, y_length, weights = ctx.saved_tensors
        factors = gradient[:, None] * weights * (2 / d[0, 0].numel())  # (N, C)
        a = d * factors[:, :, None, None]  # (N, C, h, w)
        by_x = by_y = None
        if ctx.needs_input_grad[0]:
            by_x = _across(-a, u - d, x_length).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            by_y = _across(a, u, y_length).to(ctx.dtypes[1])
        return by_x, by_y, None


def _lengths(features: Tensor) -> Tensor:
    """Of each position's feature vector, never zero: (N, C, h, w) -> (N, 1, h, w), float32 or more precise."""
    precise = torch.promote_types(features.dtype, torch.float32)
    return torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=precise) + 1e-10


def _across(a: Tensor, unit: Tensor, length: Tensor) -> Tensor:
    """The gradient by a vector of this length of what has the gradient `a` by its `unit` vector; changes `a`."""
    along = (a * unit).sum(1, keepdim=True)  # (N, 1, h, w)
    return a.addcmul_(unit, along, value=-1).div_(length)  # (N, C, h, w)


def _package_folder() -> Path:
    # Found, not imported: of the package no more than its files is needed here.
    spec = importlib.util.find_spec("torchmetrics")
    if spec is None or spec.origin is None:
        raise CheckpointError(
            "The package 'torchmetrics', whose files hold the channel weights, is missing: pip install torchmetrics"
        )
    return Path(spec.origin).parent


def _find(trunk: Trunk, given: str | None) -> Path:
    """The file that holds its weights. One that was given may be anyone's: only its shapes are compared."""
    if given is not None:
        if (path := Path(given)).is_file():
            return path
        raise CheckpointError(
            f"{path}: no such file. Expected the weights of torchvision's {trunk.name}, as the parameter `trunk` says; "
            f"without that parameter they are looked for where `ldm weights` says."
        )
    try:
        return cache.find_any(trunk.files)
    except CheckpointError as error:
        hint = "Or set the parameter `trunk`, or train without a perceptual loss (perceptual: null)."
        raise CheckpointError(f"LPIPS needs weights of {trunk.name}: {error}\n{hint}") from error


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]


def _keep_own(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        state[prefix + name] = value.detach()
