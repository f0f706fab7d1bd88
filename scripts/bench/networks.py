"""The real networks without their values: weights, FLOPs, and what a forward pass keeps, counted on fake tensors."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from ldm import convolutions, layers
from ldm.autoencoder import networks as autoencoder_networks
from ldm.autoencoder.networks import Decoder, Encoder
from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.conditioners.classes import ClassVector
from ldm.diffusion.networks.dit import DiT
from ldm.diffusion.networks.unet import UNet
from ldm.runtime.fsdp import InBlocks
from scripts.bench.child import count
from scripts.bench.cost import Network

CLASSES = 1000

# On GPUs convolutions stay what they are.
_CONVOLVED = patch.object(convolutions, "runs_on_onednn", lambda x: False)


class Known(NamedTuple):
    """A network of the table.

    Attributes:
        trained: makes what is trained, without values.
        parts: of its modules, those that FSDP2 gathers; none: it is not for them.
        run: a forward pass of it over so many images.
        averages: of its weights.
    """

    trained: Callable[[], nn.ModuleList]
    parts: Callable[[nn.ModuleList], Sequence[nn.Module]]
    run: Callable[[nn.ModuleList, int], Tensor]
    averages: int = 1


def _dit(width: int, depth: int, heads: int) -> Known:
    def make() -> nn.ModuleList:
        return nn.ModuleList([DiT(4, 2, width, depth, heads), ClassVector(CLASSES, width)])

    def run(modules: nn.ModuleList, images: int) -> Tensor:
        vector = torch.empty(images, width)
        found: Tensor = modules[0](torch.empty(images, 4, 32, 32), torch.empty(images), Conditioning(vector=vector))
        return found

    return Known(make, _parts, run)


def _stable_diffusion() -> Known:
    def make() -> nn.ModuleList:
        return nn.ModuleList([UNet(4, 320, (1, 2, 4, 4), 2, attention_levels=[0, 1, 2], num_heads=8, context_dim=768)])

    def run(modules: nn.ModuleList, images: int) -> Tensor:
        tokens = torch.empty(images, 77, 768)
        found: Tensor = modules[0](torch.empty(images, 4, 64, 64), torch.empty(images), Conditioning(tokens=tokens))
        return found

    return Known(make, _parts, run)


def _autoencoder() -> Known:
    widths: dict[str, Any] = {"base_channels": 128, "channel_mult": (1, 2, 4, 4), "num_res_blocks": 2}
    widths |= {"latent_channels": 4}

    def run(modules: nn.ModuleList, images: int) -> Tensor:
        modules[0](torch.empty(images, 3, 256, 256))
        found: Tensor = modules[1](torch.empty(images, 4, 32, 32))
        return found

    return Known(lambda: nn.ModuleList([Encoder(3, **widths), Decoder(3, **widths)]), lambda modules: (), run, 0)


def _parts(modules: nn.ModuleList) -> Sequence[nn.Module]:
    network = modules[0]
    assert isinstance(network, InBlocks)
    return network.blocks()


NETWORKS = {
    "DiT-B/2, 256 px": _dit(768, 12, 12),
    "DiT-XL/2, 256 px": _dit(1152, 28, 16),
    "UNet of Stable Diffusion 1, 512 px": _stable_diffusion(),
}
"""Of stage 2, as their papers have them."""
AUTOENCODER = ("f8 autoencoder, 256 px", _autoencoder())


def counted_network(name: str, known: Known, bf16: bool) -> Network:
    """What a network needs, counted; under autocast if `bf16`.

    What the forward pass keeps is counted with the kernels of the CPU, but in NCHW and with the fused kernel of
    attention, as on GPUs: storages that the backward pass needs, but for those of the weights themselves. Losses are
    left out.
    """
    with torch.device("meta"):
        modules = known.trained()
    each = [count(part) for part in known.parts(modules)]
    rest = count(modules) - sum(each)
    one, two = (_kept(known, images, bf16) for images in (1, 2))
    return Network(
        name,
        count(modules),
        largest=max([*each, rest]) if each else 0,
        parts=len(each) + 1,
        flops=two.flops - one.flops,
        activations=two.kept - one.kept,
        copies=2 * one.kept - two.kept,
        averages=known.averages,
    )


class _Kept(NamedTuple):
    kept: int
    flops: int


def _kept(known: Known, images: int, bf16: bool) -> _Kept:
    """Bytes that a forward pass keeps, and FLOPs of that and of the backward pass."""
    sizes: dict[StorageWeakRef, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[StorageWeakRef(storage)] = storage.nbytes()
        return tensor

    fused = patch.multiple(layers, FEW_QUERIES=0, FEW_QUERIES_IN_BF16=0)
    nchw = patch.object(autoencoder_networks, "fastest_layout", lambda x: x)
    with fused, nchw, _CONVOLVED, FakeTensorMode(), FlopCounterMode(display=False) as flops:
        modules = known.trained()
        own = {StorageWeakRef(one.untyped_storage()) for one in (*modules.parameters(), *modules.buffers())}
        kept = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with kept, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = known.run(modules, images)
        output.float().sum().backward()
    return _Kept(sum(size for storage, size in sizes.items() if storage not in own), flops.get_total_flops())


def encoding_flops() -> float:
    """FLOPs of the f8 encoder for an image of 256 px as a cache with mirror images has it: in both orientations."""
    _, known = AUTOENCODER
    with _CONVOLVED, FakeTensorMode(), FlopCounterMode(display=False) as flops, torch.no_grad():
        known.trained()[0](torch.empty(1, 3, 256, 256))
    return 2 * flops.get_total_flops()


def shapes(module: nn.Module) -> list[tuple[int, ...]]:
    """Of its trained parameters."""
    return [tuple(weight.shape) for weight in module.parameters() if weight.requires_grad]
