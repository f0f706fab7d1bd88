"""LPIPS, the learned perceptual distance (Zhang et al. 2018, arXiv:1801.03924), version 0.1 with VGG16.

The distance compares two images' features at five depths of an image classifier, each feature vector scaled to
unit length, squared differences weighted by channel. The channel weights ship with torchmetrics; the
classifier is torchvision's VGG16, 528 MB, which must already be on disk: it is never downloaded.
"""

import importlib.util
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from ldm.errors import CheckpointError, ConfigError

TRUNK_FILE = "vgg16-397923af.pth"
TRUNK_ADDRESS = f"https://download.pytorch.org/models/{TRUNK_FILE}"

# Where each of the five compared features ends in torchvision's vgg16().features: relu1_2 ... relu5_3.
_STAGES = ((0, 4), (4, 9), (9, 16), (16, 23), (23, 30))
_WIDTHS = (64, 128, 256, 512, 512)
_SMALLEST = 16  # pixels on a side: four halvings lie between the first features and the last


class LPIPS(nn.Module):
    """Distance of image pairs: two (N, C, H, W) in [-1, 1] -> (N,) float32, zero for equal images.

    C is 3, or 1 (repeated to three). Frozen: no gradient reaches its weights, `.train()` has no effect, and its weights
    are not in state_dict(), because every run reads the same ones.

    Args:
        trunk: file with the weights of torchvision's vgg16; torch hub's cache is searched if not given.
        pretrained: False: a random trunk, always the same, for benchmarks and tests without the file.

    Raises:
        CheckpointError: the weights are missing, or are not VGG16's; names the file and where to put it.
        ConfigError: (at the first images) they have fewer than 16 pixels on a side, or neither 1 nor 3 channels.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, trunk: str | None = None, pretrained: bool = True) -> None:
        super().__init__()
        # ImageNet's mean and standard deviation, for images in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        trunk_layers = _random_trunk()
        self.stages = nn.ModuleList(trunk_layers[start:end] for start, end in _STAGES)
        self.heads = nn.ParameterList(torch.ones(width) for width in _WIDTHS)
        # A config that is only inspected (sizes, FLOPs) is built on the meta device, so there is nothing to load.
        if not self.heads[0].is_meta:
            self._load_heads()
            if pretrained:
                self._load_trunk(_find_trunk(trunk))
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
        if min(height, width) < _SMALLEST:
            raise ConfigError(
                f"LPIPS halves its pictures four times, so it needs {_SMALLEST} pixels or more on each side, found "
                f"{height} x {width}: take larger pictures, or leave it out (null in its place)"
            )
        total = torch.zeros(a.shape[0], device=a.device)  # (N,)
        for head, x, y in zip(self.heads, self.features(a), self.features(b), strict=True):
            difference = (_unit(x) - _unit(y)).square()  # (N, width, h, w)
            total = total + (difference.mean((2, 3)) * head).sum(1)  # (N,)
        return total

    def features(self, images: Tensor) -> list[Tensor]:
        """The five feature maps: (N, width, H/2**i, W/2**i) for i = 0 ... 4."""
        h = (images.expand(-1, 3, -1, -1) - self.shift) / self.scale  # (N, 3, H, W)
        maps = []
        for stage in self.stages:
            h = stage(h)  # (N, width, H/2**i, W/2**i)
            maps.append(h)
        return maps

    def _load_heads(self) -> None:
        path = _package_folder() / "functional" / "image" / "lpips_models" / "vgg.pth"
        weights = _read(path)
        for index, head in enumerate(self.heads):
            head.data.copy_(weights[f"lin{index}.model.1.weight"].flatten())

    def _load_trunk(self, path: Path) -> None:
        weights = _read(path)
        for stage in self.stages:
            # The stages are slices, whose layers keep their numbers in vgg16().features.
            for name, parameter in stage.named_parameters():
                found = weights.get(f"features.{name}")
                if found is None or found.shape != parameter.shape:
                    actual = "is missing" if found is None else f"has {tuple(found.shape)}"
                    raise CheckpointError(
                        f"{path}: not the weights of torchvision's vgg16: 'features.{name}' should have shape "
                        f"{tuple(parameter.shape)} and {actual}. Put the file from {TRUNK_ADDRESS} there."
                    )
                parameter.data.copy_(found)


def _random_trunk() -> nn.Sequential:
    """VGG16's features with the same random weights each time; does not change torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        features = make_layers(cfgs["D"], batch_norm=False)
        for layer in features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(cast(Tensor, layer.bias))
        return features


def _unit(features: Tensor) -> Tensor:
    """Scale each position's feature vector to unit length, in float32: (N, C, h, w)."""
    features = features.float()
    # vector_norm has gradient zero at zero, where the square root of a sum of squares would give NaN.
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def _package_folder() -> Path:
    # Found, not imported: of the package no more than its files is needed here.
    spec = importlib.util.find_spec("torchmetrics")
    if spec is None or spec.origin is None:
        raise CheckpointError(
            "The package 'torchmetrics', whose files hold the channel weights, is missing: pip install torchmetrics"
        )
    return Path(spec.origin).parent


def _find_trunk(given: str | None) -> Path:
    cached = Path(torch.hub.get_dir()) / "checkpoints" / TRUNK_FILE
    path = cached if given is None else Path(given)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file. LPIPS compares images by the features of torchvision's vgg16, which is not "
            f"downloaded automatically: fetch {TRUNK_ADDRESS} and put it there, or set its path in the parameter "
            f"`trunk` of ldm.autoencoder.lpips.LPIPS, or train without a perceptual loss (perceptual: null)."
        )
    return path


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen unrelated classes for a broken file
        raise CheckpointError(f"{path}: cannot be read as PyTorch weights ({error}). Fetch the file again.") from error


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]


def _keep_own(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        state[prefix + name] = value.detach()
