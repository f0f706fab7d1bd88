"""What the tables are measured at: sizes that a laptop can repeat, and the smallest that run at all."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AutoencoderSize:
    """An f8 autoencoder of the published shape, at half its width."""

    resolution: int
    images: int = 4
    channels: int = 64
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    latent: int = 4


@dataclass(frozen=True)
class UNetSize:
    """A UNet on f8 latents with attention at its last level; `autoencoder` is what encodes in the loop."""

    side: int
    autoencoder: AutoencoderSize
    images: int = 8
    channels: int = 64
    multipliers: tuple[int, ...] = (1, 2, 4)
    blocks: int = 2
    heads: int = 4
    latent: int = 4


@dataclass(frozen=True)
class DiTSize:
    """DiT-S/2 on f8 latents of 256 pixels."""

    side: int = 32
    images: int = 8
    width: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 2
    latent: int = 4
    classes: int = 1000


@dataclass(frozen=True)
class Sizes:
    """Of all tables; `product` is the side of the matrices whose product shows what the machine can do."""

    autoencoders: tuple[AutoencoderSize, ...]
    unet: UNetSize
    dit: DiTSize
    sampled: UNetSize
    steps: int
    product: int


FULL = Sizes(
    autoencoders=(AutoencoderSize(64), AutoencoderSize(128)),
    unet=UNetSize(32, AutoencoderSize(256, images=8)),
    dit=DiTSize(),
    sampled=UNetSize(16, AutoencoderSize(128, images=8)),
    steps=30,
    product=2048,
)

_TINY = AutoencoderSize(32, images=2, channels=32, multipliers=(1, 1, 1, 1), blocks=1)
_TINY_UNET = UNetSize(4, _TINY, images=2, channels=32, multipliers=(1, 1), blocks=1)
TINY = Sizes(
    autoencoders=(_TINY,),
    unet=_TINY_UNET,
    dit=DiTSize(side=8, images=2, width=64, depth=2, heads=4, classes=10),
    sampled=_TINY_UNET,
    steps=2,
    product=256,
)
