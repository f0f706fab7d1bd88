"""Configurations of runs small enough to be killed by the hundred: both stages, 20 pictures, steps of milliseconds."""

import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Tree = dict[str, Any]

BATCH = 6
ITEMS = 16
"""Pictures to train on; four more are held out."""
GROUP = 8
"""After so many steps a batch begins with an epoch."""


def node(target: str, partial: bool = False, **params: Any) -> Tree:
    """A node of the configuration."""
    return {"target": target, "params": params} | ({"partial": True} if partial else {})


def pictures(folder: Path, number: int = ITEMS + 4, seed: int = 7) -> Path:
    """Coarse noise of 16 x 16 pixels in two classes."""
    draw = np.random.default_rng(seed)
    for index in range(number):
        path = folder / ("cats", "dogs")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(4, axis=0).repeat(4, axis=1)
        Image.fromarray(pixels).save(path)
    return folder


def lightning(steps: int, every: int, keep: int, validate: int, **callbacks: Tree | None) -> Tree:
    """The section `lightning`: metrics of each step, no pictures, no progress bar."""
    trainer = {"max_steps": steps, "val_check_interval": validate, "log_every_n_steps": 1, "accelerator": "cpu"}
    saves = node("ldm.training.callbacks.checkpoints.Checkpoints", every=every, keep=keep)
    return {
        "trainer": trainer | {"devices": 1, "precision": "32-true", "enable_progress_bar": False},
        "logger": None,
        "callbacks": {"checkpoints": saves, "images": None, **callbacks},
    }


def stage1(lab: Path, steps: int = 4, every: int = 1000, keep: int = 2, validate: int = 1000, **data: Any) -> Tree:
    """An autoencoder of 16 px, f = 2, with a discriminator from step 4."""
    networks: Tree = {"base_channels": 8, "channel_mult": [1, 1], "num_res_blocks": 1, "latent_channels": 2}
    discriminator = node("ldm.autoencoder.discriminator.PatchDiscriminator", in_channels=3, channels=8, layers=1)
    return {
        "name": "tiny_autoencoder",
        "seed": 23,
        "model": node(
            "ldm.autoencoder.module.AutoencoderKL",
            encoder=node("ldm.autoencoder.networks.Encoder", in_channels="${data:channels}", **networks),
            decoder=node("ldm.autoencoder.networks.Decoder", out_channels="${data:channels}", **networks),
            loss=node("ldm.autoencoder.losses.AutoencoderLoss", discriminator=discriminator, disc_start=4),
            optimizer=node("torch.optim.Adam", partial=True, lr=1e-3),
        ),
        "data": node(
            "ldm.data.datamodule.ImageDataModule",
            **_common(lab) | {"resolution": 16} | data,
        ),
        "lightning": lightning(steps, every, keep, validate),
    }


def stage2(lab: Path, steps: int = 24, every: int = 1000, keep: int = 2, validate: int = 1000, **data: Any) -> Tree:
    """A class-conditional UNet on 2 x 8 x 8 latents, with dropout, dropped labels, a schedule and an average."""
    network = node(
        "ldm.diffusion.networks.unet.UNet",
        in_channels="${data:channels}",
        model_channels=8,
        channel_mult=[1],
        num_res_blocks=1,
        attention_levels=[0],
        num_heads=1,
        vector_channels=8,
        dropout=0.1,
    )
    return {
        "name": "tiny_diffusion",
        "seed": 23,
        "model": node(
            "ldm.diffusion.module.LatentDiffusion",
            network=network,
            conditioner=node(
                "ldm.diffusion.conditioners.classes.ClassVector", num_classes="${data:num_classes}", channels=8
            ),
            objective=node("ldm.diffusion.objectives.DDPM", schedule=node("ldm.diffusion.noise_schedules.SqrtLinear")),
            optimizer=node("torch.optim.AdamW", partial=True, lr=1e-3),
            schedule=node("ldm.optim.lr_schedules.Cosine", steps="${lightning.trainer.max_steps}", warm_up=5),
            ema=node("ldm.optim.ema.EMA", partial=True, profile=node("ldm.optim.ema.FixedDecay")),
            label_dropout=0.1,
        ),
        "data": node(
            "ldm.latents.datamodule.LatentDataModule",
            **_common(lab) | {"autoencoder": str(lab / "autoencoder"), "cache": str(lab / "cache")} | data,
        ),
        "lightning": lightning(steps, every, keep, validate),
    }


def _common(lab: Path) -> Tree:
    train = node("ldm.data.sources.folder.ImageFolder", root=str(lab / "pictures"))
    return {"train": train, "batch_size": BATCH, "seed": "${seed}", "num_validation": 4}


def elastic(tree: Tree) -> Tree:
    """The same configuration (stage 2) as far as its numbers depend on samples alone, to the rounding of sums.

    Dropout is drawn by the rank, not by the sample. And Adam divides by a gradient's size, and so makes a whole step of
    what rounding leaves of a vanishing one.
    """
    tree["model"]["params"]["network"]["params"]["dropout"] = 0.0
    tree["model"]["params"]["optimizer"] = node("torch.optim.SGD", partial=True, lr=0.05)
    tree["model"]["params"]["schedule"]["params"]["steps"] = 24  # however short a leg is
    return tree


def two_ranks(tree: Tree, timeout: float = 300.0) -> Tree:
    """The same configuration on two devices; `timeout` in seconds is that of the process group."""
    tree["lightning"]["trainer"]["devices"] = 2
    tree["lightning"]["strategy"] = node("ldm.training.strategies.DDP", timeout=timeout)
    return tree


def mid_epoch(draw: random.Random, steps: int, number: int) -> list[int]:
    """So many different steps below `steps` after which an epoch is under way, as many as there are at most."""
    inside = [step for step in range(1, steps) if step * BATCH % ITEMS]
    return draw.sample(inside, min(number, len(inside)))
