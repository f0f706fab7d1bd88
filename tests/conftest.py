"""What tests of several folders share: a tiny image folder, and a tiny configuration of each stage.

Trained-looking run folders for sampling are in tiny_runs.py.
"""

import os
import shutil
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")

import copy
import gc
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

# A shell without job control starts what runs in the background, as nohup does, with these ignored; tests send them.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# Autograd counts devices at the first backward pass of a process. After tensors without values (FakeTensorMode, an
# export, a compilation) it counts eight, and the threads that it starts for them forbid backward passes in forks.
torch.ones(1, requires_grad=True).sum().backward()

pytest_plugins = ["tests.tiny_runs", "tests.many_sizes", "tests.forked", "tests.once"]

Tree = dict[str, Any]

TRAINER = {
    "max_steps": 12,
    "val_check_interval": 4,
    "log_every_n_steps": 2,
    "accelerator": "cpu",
    "devices": 1,
    "precision": "32-true",
}


def node(target: str, partial: bool = False, **params: Any) -> Tree:
    return {"target": target, "params": params} | ({"partial": True} if partial else {})


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """20 random pictures of 16 x 16 pixels in two classes."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(7)
    for index in range(20):
        folder = root / ("cats", "dogs")[index % 2]
        folder.mkdir(exist_ok=True)
        # Coarse noise, so that a convolution has something to find.
        pixels = random.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(4, axis=0).repeat(4, axis=1)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.fixture
def own_images(image_folder, tmp_path) -> Path:
    """The same for a test that writes into the folder."""
    return shutil.copytree(image_folder, tmp_path / "own_images")


@pytest.fixture
def autoencoder_tree(image_folder) -> Tree:
    """Stage 1 with a discriminator from step 4: 16 px, f = 2, 12 steps of 6 images."""
    networks = {"base_channels": 16, "channel_mult": [1, 1], "num_res_blocks": 1, "latent_channels": 2}
    loss = node(
        "ldm.autoencoder.losses.AutoencoderLoss",
        discriminator=node("ldm.autoencoder.discriminator.PatchDiscriminator", in_channels=3, channels=8, layers=1),
        disc_start=4,
    )
    return {
        "name": "tiny_autoencoder",
        "seed": 23,
        "model": node(
            "ldm.autoencoder.module.AutoencoderKL",
            encoder=node("ldm.autoencoder.networks.Encoder", in_channels="${data:channels}", **networks),
            decoder=node("ldm.autoencoder.networks.Decoder", out_channels="${data:channels}", **networks),
            loss=loss,
            optimizer=node("torch.optim.Adam", partial=True, lr=1e-3),
            schedule=node("ldm.optim.lr_schedules.Cosine", steps="${lightning.trainer.max_steps}", warm_up=2),
        ),
        "data": node(
            "ldm.data.datamodule.ImageDataModule",
            train=node("ldm.data.sources.folder.ImageFolder", root=str(image_folder)),
            batch_size=6,
            resolution=16,
            seed="${seed}",
            num_validation=4,
        ),
        "lightning": {"trainer": copy.deepcopy(TRAINER), "logger": None},
    }


@pytest.fixture
def diffusion_tree(image_folder) -> Tree:
    """Stage 2 on the newest run of the above: class-conditional, with dropout and an average, without samples."""
    network = node(
        "ldm.diffusion.networks.unet.UNet",
        in_channels="${data:channels}",
        model_channels=16,
        channel_mult=[1, 1],
        num_res_blocks=1,
        attention_levels=[1],
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
            ema=node("ldm.optim.ema.EMA", partial=True, profile=node("ldm.optim.ema.FixedDecay")),
            label_dropout=0.1,
        ),
        "data": node(
            "ldm.latents.datamodule.LatentDataModule",
            train=node("ldm.data.sources.folder.ImageFolder", root=str(image_folder)),
            autoencoder="${newest:logs/*_tiny_autoencoder}",
            batch_size=6,
            seed="${seed}",
            num_validation=4,
        ),
        "lightning": {"trainer": copy.deepcopy(TRAINER), "logger": None, "callbacks": {"images": None}},
    }


modules = 0  # that were imported before the test that runs


def pytest_runtest_setup():
    """Look for garbage in no more than what came since the last imports: in all of them it took a sixth of the time."""
    global modules
    if len(sys.modules) > modules:
        modules = len(sys.modules)
        gc.freeze()


def pytest_sessionfinish():
    """What is left at the end is garbage as ever, which some libraries complain of if nobody looks for it."""
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """What was printed of a file name that is not UTF-8 can be handed on to the process that reports it."""
    report = yield
    report.sections = [(title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections]
    return report
