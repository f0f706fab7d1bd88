"""The patch discriminator of pix2pix (Isola et al. 2017, arXiv:1611.07004, appendix 6.1.2)."""

from collections.abc import Callable

from torch import Tensor, nn

from ldm.errors import ConfigError
from ldm.ranges import Count, CountOrZero


class PatchDiscriminator(nn.Module):
    """One logit for each overlapping patch: (N, in_channels, H, W) -> (N, 1, about H/2**layers, W/2**layers).

    With three layers, the default, a logit sees 70x70 pixels. Weights are initialized from N(0, 0.02).

    Args:
        in_channels: of the images.
        channels: after the first layer; doubled by each further layer, up to eight times that.
        layers: strided layers.
        norm: number of channels -> normalization layer. BatchNorm2d, as published, sees only the micro-batch of one
            rank; use a norm over single images (such as nn.InstanceNorm2d with affine=True) if the result must not
            depend on how the global batch is split.

    Raises:
        ConfigError: images too small for so many layers.
    """

    def __init__(
        self,
        in_channels: Count = 3,
        channels: Count = 64,
        layers: CountOrZero = 3,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.strided = layers
        stack: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, layers + 1):
            previous, width = width, channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            # No bias, since the norm that follows has a shift.
            stack.append(nn.Conv2d(previous, width, 4, stride=stride, padding=1, bias=False))
            stack += [norm(width), nn.LeakyReLU(0.2)]
        stack.append(nn.Conv2d(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*stack)
        self.apply(_initialize)

    def forward(self, images: Tensor) -> Tensor:
        side = min(images.shape[2:])
        if side < _smallest(self.strided):
            fit = max((layers for layers in range(self.strided) if side >= _smallest(layers)), default=None)
            fix = "no number of layers can" if fit is None else f"at most {fit} can"
            raise ConfigError(
                f"PatchDiscriminator: layers={self.strided} need pictures of {_smallest(self.strided)} pixels or more, "
                f"found {images.shape[2]}x{images.shape[3]}, where {fix}"
            )
        return self.layers(images)  # (N, 1, h, w)


def _smallest(layers: int) -> int:
    """The smallest side in pixels: each strided layer halves it, then two convolutions take one pixel each."""
    return 3 * 2**layers if layers else 4


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
