"""Our side: the modules, data modules and training loop of a real run, with everything that a step of one does.

The batch comes from a loader (stage 2: from a latent cache on disk), the step is Lightning's, bad steps are looked for,
the average is updated. Only validation, pictures and saves are left out.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from ldm.autoencoder.discriminator import PatchDiscriminator
from ldm.autoencoder.losses import AutoencoderLoss
from ldm.autoencoder.lpips import LPIPS
from ldm.autoencoder.module import AutoencoderKL
from ldm.autoencoder.networks import Decoder, Encoder
from ldm.data.datamodule import ElasticDataModule, ImageDataModule
from ldm.data.sources.arrays import ArrayImages
from ldm.diffusion.conditioners.base import Unconditional
from ldm.diffusion.conditioners.classes import ClassVector
from ldm.diffusion.module import LatentDiffusion
from ldm.diffusion.networks.dit import DiT
from ldm.diffusion.networks.unet import UNet
from ldm.diffusion.noise_levels import LogitNormal
from ldm.diffusion.noise_schedules import Linear, SqrtLinear
from ldm.diffusion.objectives import DDPM, Flow, Objective
from ldm.latents.datamodule import LatentDataModule
from ldm.optim.ema import EMA, FixedDecay
from ldm.runtime import allocator
from ldm.training import strategies
from ldm.training.callbacks.skip_nonfinite import SkipNonFinite
from ldm.training.trainer import make_trainer
from scripts.bench.child import Built, Place, count
from scripts.bench.sides.launched import Rank, launched
from scripts.bench.sizes import AutoencoderSize, DiTSize, UNetSize

NORM_GROUPS = 32
"""Of every norm, as in the code of others, so that the networks are the same."""

_ITEMS = 256
_FOREVER = 1_000_000_000


def coders(size: AutoencoderSize) -> tuple[Encoder, Decoder]:
    widths: dict[str, Any] = {
        "base_channels": size.channels,
        "channel_mult": size.multipliers,
        "num_res_blocks": size.blocks,
        "latent_channels": size.latent,
        "norm_groups": NORM_GROUPS,
    }
    return Encoder(3, **widths), Decoder(3, **widths)


def autoencoder(size: AutoencoderSize, adversarial: bool, place: Place) -> Built:
    """L1 and KL; with LPIPS and a discriminator from the first step on if `adversarial`."""
    encoder, decoder = coders(size)
    loss = AutoencoderLoss(learn_logvar=False)
    if adversarial:
        perceptual, critic = LPIPS(pretrained=False), PatchDiscriminator()
        loss = AutoencoderLoss(perceptual, learn_logvar=False, discriminator=critic, disc_start=0)
    optimizer = partial(torch.optim.Adam, lr=4.5e-6 * size.images, betas=(0.5, 0.9), fused=True)
    module = AutoencoderKL(encoder, decoder, loss, optimizer)
    images = pictures(size.resolution, 3)
    data = ImageDataModule(images, size.images, size.resolution)
    return Built(count(encoder, decoder), partial(_train, module, data, place))


def make_unet(size: UNetSize, checkpointing: bool = False) -> UNet:
    last = len(size.multipliers) - 1
    sizes = size.latent, size.channels, size.multipliers, size.blocks
    return UNet(
        *sizes,
        attention_levels=[last],
        num_heads=size.heads,
        norm_groups=NORM_GROUPS,
        checkpointing=checkpointing,
    )


FUSED: Mapping[str, Any] = {"fused": True}


def unet(
    size: UNetSize,
    place: Place,
    adamw: Mapping[str, Any] = FUSED,
    checkpointing: bool = False,
    extra_averages: int = 0,
) -> Built:
    """DDPM on the cache.

    Args:
        adamw: how the optimizer goes through the weights.
        checkpointing: activations are computed again in the backward pass.
        extra_averages: beside the one that is always kept.
    """
    network = make_unet(size, checkpointing)
    optimizer = partial(torch.optim.AdamW, lr=5e-5, **adamw)
    average = partial(EMA, profile=FixedDecay(), extra=[FixedDecay()] * extra_averages)
    module = LatentDiffusion(network, Unconditional(), DDPM(SqrtLinear()), optimizer, average)
    return _diffusion(module, size.side, size.latent, size.images, None, count(network), place)


def ddpm() -> Objective:
    """DiT's, without its learned variance."""
    return DDPM(Linear())


def flow() -> Objective:
    """SiT's."""
    return Flow()


def lightning_flow() -> Objective:
    """LightningDiT's."""
    return Flow(levels=LogitNormal(), direction_weight=1.0)


def dit(size: DiTSize, modern: bool, objective: Callable[[], Objective], compiled: bool, place: Place) -> Built:
    """DiT on the cache, a tenth of the labels dropped.

    Args:
        modern: with LightningDiT's norms, feed-forward networks and positions.
        compiled: its blocks, by torch.compile.
    """
    switches = dict.fromkeys(("rms_norm", "swiglu", "rope"), modern)
    network = DiT(size.latent, size.patch, size.width, size.depth, size.heads, **switches, absolute_positions=True)
    classes = ClassVector(size.classes, size.width, std=0.02)
    optimizer = partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.0, fused=True)
    module = LatentDiffusion(
        network, classes, objective(), optimizer, _average, label_dropout=0.1, compile_blocks=compiled
    )
    return _diffusion(module, size.side, size.latent, size.images, size.classes, count(network, classes), place)


def pictures(side: int, channels: int, classes: int | None = None) -> ArrayImages:
    """Random ones, of random classes."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (_ITEMS, side, side, channels), dtype=np.uint8)
    if classes is None:
        return ArrayImages("random pictures", pixels)
    return ArrayImages("random pictures", pixels, random.integers(0, classes, _ITEMS), [*map(str, range(classes))])


def ranked(size: UNetSize, strategy: str | None, rank: Rank, place: Place) -> Built:
    """The step of `unet` on one of several ranks, each with `size.images` of the batch.

    Args:
        strategy: name of a class in ldm/training/strategies.py; None: it is alone.
    """
    launched(rank)
    network = make_unet(size)
    optimizer = partial(torch.optim.AdamW, lr=5e-5, fused=True)
    module = LatentDiffusion(network, Unconditional(), DDPM(SqrtLinear()), optimizer, _average)
    chosen = strategy and {"target": f"{strategies.__name__}.{strategy}"}

    def train(turns: Iterator[None]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source, images = pictures(size.side, size.latent), size.images * rank.world
            data = LatentDataModule(source, None, images, resolution=size.side, channels=size.latent, cache=folder)
            _train(module, data, place, turns, chosen)

    return Built(count(network), train, [module])


def _average(model: nn.Module) -> EMA:
    return EMA(model, FixedDecay())


def _diffusion(
    module: LatentDiffusion, side: int, channels: int, images: int, classes: int | None, parameters: int, place: Place
) -> Built:
    """Trains on a latent cache, whose latents are random pixels of as many channels."""

    def train(turns: Iterator[None]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source = pictures(side, channels, classes)
            data = LatentDataModule(source, None, images, resolution=side, channels=channels, cache=folder)
            _train(module, data, place, turns)

    return Built(parameters, train)


def _train(
    module: pl.LightningModule, data: ElasticDataModule, place: Place, turns: Iterator[None], strategy: Any = None
) -> None:
    """Lightning's loop, stopped after each step until the next turn."""
    allocator.keep_freed_memory()  # as every program does
    trainer = {
        "accelerator": place.device.split(":")[0],
        "devices": 1,
        "precision": "bf16-mixed" if place.bf16 else "32-true",
        "max_steps": _FOREVER,
        "val_check_interval": _FOREVER,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [SkipNonFinite(Path(folder)), _Turns(turns)]
        tree = {"lightning": {"trainer": trainer, "strategy": strategy}}
        make_trainer(tree, data, module, callbacks).fit(module, datamodule=data)


class _Turns(pl.Callback):
    """Waits for a turn before the first step and after each one: a step includes the loading of its batch."""

    def __init__(self, turns: Iterator[None]) -> None:
        self._turns = turns

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._wait(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._wait(trainer)

    def _wait(self, trainer: pl.Trainer) -> None:
        try:
            next(self._turns)
        except StopIteration:
            trainer.should_stop = True
