"""Two stages of a tiny pipeline as their checkpoints on disk, with random weights: what sampling starts from."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch

from ldm.autoencoder.codec import Codec
from ldm.autoencoder.losses import AutoencoderLoss
from ldm.autoencoder.module import AutoencoderKL
from ldm.checkpoints import store
from ldm.config.load import build
from ldm.config.randomness import STANDARD
from ldm.diffusion.module import LatentDiffusion
from ldm.interop.lora import LoRA
from ldm.latents.manifest import CacheSpec, Manifest
from ldm.optim.ema import EMA, FixedDecay

CLASSES = ["cat", "dog", "Ankle boot"]
ADAM = partial(torch.optim.AdamW, lr=1e-3)


class Runs(NamedTuple):
    """Run folders and what lies in them."""

    autoencoder: Path
    diffusion: Path
    module: LatentDiffusion


def node(target: str, **params: Any) -> dict[str, Any]:
    return {"target": f"ldm.{target}", "params": params}


def save_run(folder: Path, module: torch.nn.Module, record: dict[str, Any]) -> Path:
    state = {"state_dict": module.state_dict(), "ldm": {"format": 1, "step": 7, **record}}
    store.save(folder / "checkpoints" / "step=7.ckpt", state)
    return folder


def save_autoencoder(folder: Path, channels: int = 3, seed: int = 0) -> Path:
    """A kl-f4 of random weights."""
    torch.manual_seed(seed)
    sizes = {"base_channels": 8, "channel_mult": [1, 1, 1], "num_res_blocks": 1, "latent_channels": 4}
    params = {
        "encoder": node("autoencoder.networks.Encoder", in_channels=channels, **sizes),
        "decoder": node("autoencoder.networks.Decoder", out_channels=channels, **sizes),
    }
    module = AutoencoderKL(build(params["encoder"]), build(params["decoder"]), AutoencoderLoss(), ADAM)
    return save_run(folder, module, {"kind": "autoencoder", "config": {"model": {"params": params}}, "latents": None})


def save_diffusion(
    folder: Path, autoencoder: Path, classes: list[str] | None, seed: int = 1, vocabulary: Path | None = None
) -> LatentDiffusion:
    """A UNet of random weights, whose average is another network than its last step.

    Args:
        vocabulary: of a BERT, whose words it reads captions in; None: it reads none.
    """
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1}
    sizes |= {"attention_levels": [1], "num_heads": 2}
    conditioner = node("diffusion.conditioners.base.Unconditional")
    if classes:
        conditioner = node("diffusion.conditioners.classes.ClassVector", num_classes=len(classes), channels=16)
    if vocabulary is not None:
        words: dict[str, Any] = {"channels": 16, "depth": 1, "vocab_size": 100, "tokenizer": str(vocabulary)}
        conditioner = node("diffusion.conditioners.text_transformer.TextTransformer", **words)
        sizes["context_dim"] = 16
    vector = 16 if classes else None
    params = {
        "network": node("diffusion.networks.unet.UNet", in_channels=4, vector_channels=vector, dropout=0.5, **sizes),
        "conditioner": conditioner,
        # v keeps an untrained network's samples in range, where eps would send them to the clamp.
        "objective": node(
            "diffusion.objectives.DDPM",
            schedule=node("diffusion.noise_schedules.SqrtLinear"),
            prediction=node("diffusion.predictions.V"),
        ),
        "label_dropout": 0.1,
    }
    parts = [build(params[name]) for name in ("network", "conditioner", "objective")]
    module = LatentDiffusion(*parts, optimizer=ADAM, ema=partial(EMA, profile=FixedDecay()), label_dropout=0.1)
    # The branches that start at zero would make every class look alike.
    for denoiser in (module.denoiser, module.ema.average):
        for weight in denoiser.parameters():
            if weight.ndim > 1 and not weight.any():
                torch.nn.init.normal_(weight.data, std=0.05)
    codec = Codec.load(autoencoder)
    plan = CacheSpec(
        shape=(4, 4, 4),
        num_items=10,
        source="",
        pixels={"resolution": 16, "channels": codec.in_channels},
        autoencoder=codec.describe() | {"path": str(autoencoder)},
        num_classes=len(classes) if classes else None,
        class_names=classes,
    )
    manifest = Manifest(plan, mean=[0.5] * 4, std=[2.0] * 4, broken=[], shards=[])
    config = {"randomness": STANDARD, "model": {"params": params}}
    record = {"kind": "diffusion", "config": config, "latents": manifest.to_dict()}
    save_run(folder, module, record)
    return module


def save_adapted(folder: Path, runs: Runs) -> Path:
    """The diffusion model of `runs` with a new adapter."""
    record = copy.deepcopy(store.record(store.verify(runs.diffusion).path))
    record["config"]["model"]["params"]["adapter"] = node("interop.lora.LoRA", rank=2)
    module = copy.deepcopy(runs.module)
    for denoiser in (module.denoiser, module.ema.average):
        LoRA(rank=2)(cast(torch.nn.ModuleDict, denoiser))
    return save_run(folder, module, record)


@pytest.fixture(scope="session")
def make_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Runs]:
    """make_runs(channels=3, classes=[...]) -> Runs in a folder of their own."""

    def make(channels: int = 3, classes: list[str] | None = CLASSES) -> Runs:
        root = tmp_path_factory.mktemp("logs")
        autoencoder = save_autoencoder(root / "2026-01-01T00-00-00_tiny_autoencoder", channels)
        folder = root / "2026-01-01T00-00-01_tiny_diffusion"
        return Runs(autoencoder, folder, save_diffusion(folder, autoencoder, classes))

    return make


@pytest.fixture(scope="session")
def runs(make_runs: Callable[..., Runs]) -> Runs:
    """A class-conditional pipeline of RGB images, 16 px."""
    return make_runs()


@pytest.fixture
def other_autoencoder(tmp_path: Path) -> Path:
    """One that fits the pipeline of `runs`, but has other weights."""
    return save_autoencoder(tmp_path / "other_autoencoder", seed=5)


@pytest.fixture
def tuned_autoencoder(runs: Runs, tmp_path: Path) -> Path:
    """That of `runs` with another decoder."""
    state = store.load(store.verify(runs.autoencoder))
    weights = state["state_dict"]
    state["state_dict"] = {key: value * (1.1 if key.startswith("decoder.") else 1) for key, value in weights.items()}
    store.save(tmp_path / "tuned_autoencoder" / "checkpoints" / "step=7.ckpt", state)
    return tmp_path / "tuned_autoencoder"
