"""CompVis' latent-diffusion from its folder: its modules in the loop of its Lightning, which is that of 2022.

Its stage 1 needs taming-transformers for LPIPS and the discriminator. Weights of VGG16 are random, as on our side.
"""

import importlib
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from scripts.bench.child import Built, Place, count, repeat
from scripts.bench.learner import Learner, batches
from scripts.bench.sides.imports import import_first, package, stand_in
from scripts.bench.sides.plain import l1_and_kl
from scripts.bench.sizes import AutoencoderSize, UNetSize


def autoencoder(folder: Path, size: AutoencoderSize, place: Place) -> Built:
    """L1 and KL: its networks and posterior."""
    _import(folder, None)
    model = _first_stage(size, {"target": "torch.nn.Identity"}).to(place.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=4.5e-6 * size.images, betas=(0.5, 0.9))
    images = torch.rand(size.images, 3, size.resolution, size.resolution, device=place.device) * 2 - 1

    def step() -> None:
        reconstruction, posterior = model(images)
        l1_and_kl(images, reconstruction, posterior.kl()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Built(count(model), repeat(step, place))


def adversarial_autoencoder(folder: Path, taming: Path, size: AutoencoderSize, place: Place) -> Built:
    """Its training_step for each of the two optimizers; what the other one trains is frozen, as Lightning did it."""
    _import(folder, taming)
    loss = {"disc_start": 0, "kl_weight": 1e-6, "disc_weight": 0.5}
    model = _first_stage(size, {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": loss})
    model.to(place.device)
    model.learning_rate = 4.5e-6 * size.images
    optimizers, _ = model.configure_optimizers()
    trained = [[weight for group in one.param_groups for weight in group["params"]] for one in optimizers]
    batch = {"image": torch.rand(size.images, size.resolution, size.resolution, 3, device=place.device) * 2 - 1}

    def step() -> None:
        for index, optimizer in enumerate(optimizers):
            for number, weights in enumerate(trained):
                for weight in weights:
                    weight.requires_grad_(number == index)
            model.training_step(batch, 0, index).backward()
            optimizer.step()
            optimizer.zero_grad()

    return Built(sum(weight.numel() for weight in trained[0]), repeat(step, place))


def unet(folder: Path, size: UNetSize, encodes: bool, place: Place) -> Built:
    """Its LatentDiffusion with its average; `encodes`: from pictures, as it trains, otherwise from latents."""
    _import(folder, None)
    network = {
        "model_channels": size.channels,
        "attention_resolutions": [2 ** (len(size.multipliers) - 1)],
        "num_res_blocks": size.blocks,
        "channel_mult": size.multipliers,
        "num_heads": size.heads,
    }
    parts = {
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": _first_stage_parameters(size.autoencoder, {"target": "torch.nn.Identity"}),
        },
        "cond_stage_config": "__is_unconditional__",
    }
    model = _latent_diffusion(size.side, size.latent, network, parts).to(place.device)
    model.learning_rate = 5e-5
    optimizer = model.configure_optimizers()
    resolution = size.autoencoder.resolution
    batch = {"image": torch.rand(size.images, resolution, resolution, 3, device=place.device) * 2 - 1}
    latents = torch.randn(size.images, size.latent, size.side, size.side, device=place.device)

    def step() -> None:
        loss, _ = model.shared_step(batch) if encodes else model(latents, None)
        _update(model, optimizer, loss)

    return Built(count(model.model), repeat(step, place))


def learner(folder: Path, latents: Path, steps: int, place: Place) -> Learner:
    """Its class-conditional LatentDiffusion on the latents of our cache.

    As in its configs/latent-diffusion/cin-ldm-vq-f8.yaml: a class embedding that is attended to, schedule, batch,
    learning rate and average. The network is as wide and deep as that of configs/fashion_mnist/diffusion.yaml.

    Args:
        latents: {"mean", "std": (N,c,h,w) float32, standardized; "labels": (N,) int64}, from torch.save.
        steps: of its DDIM.
    """
    _import(folder, None)
    for name in ("clip", "kornia"):  # imported, and used by encoders of text and pictures
        stand_in(name)
    ddim = importlib.import_module("ldm.models.diffusion.ddim")
    known = {name: value.to(place.device) for name, value in torch.load(latents).items()}
    number, channels, side, _ = known["mean"].shape
    classes, width, size = int(known["labels"].max()) + 1, 64, 64
    network = {
        "model_channels": width,
        "attention_resolutions": [1, 2],
        "num_res_blocks": 2,
        "channel_mult": [1, 1],
        "num_head_channels": 32,
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": width,
    }
    embedder = {"embed_dim": width, "n_classes": classes, "key": "class_label"}
    parts = {
        "first_stage_config": {"target": "torch.nn.Identity"},
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": embedder},
        "cond_stage_key": "class_label",
        "cond_stage_trainable": True,
        "conditioning_key": "crossattn",
    }
    model = _latent_diffusion(side, channels, network, parts).to(place.device)
    model.learning_rate = 1e-6 * size
    optimizer = model.configure_optimizers()
    rows = batches(number, size)

    def step() -> None:
        chosen = rows()
        clean = known["mean"][chosen] + known["std"][chosen] * torch.randn_like(known["std"][chosen])
        loss, _ = model(clean, {"class_label": known["labels"][chosen]})
        _update(model, optimizer, loss)

    def sample(labels: Tensor) -> Tensor:
        sampler = ddim.DDIMSampler(model)
        sampler.register_buffer = partial(setattr, sampler)  # its own moves everything to a GPU
        model.eval()
        with model.ema_scope():
            wanted = model.get_learned_conditioning({"class_label": labels})
            made: Tensor = sampler.sample(
                steps, len(labels), (channels, side, side), conditioning=wanted, eta=0.0, verbose=False
            )[0]
        model.train()
        return made

    return Learner(count(model.model), size, step, sample)


def _latent_diffusion(side: int, channels: int, network: dict[str, Any], parts: dict[str, Any]) -> Any:
    """On latents of this shape, with the noise schedule of all its configurations.

    Args:
        network: what its UNet is made with, but for the latents' shape.
        parts: configurations of first stage and conditions.
    """
    module = importlib.import_module("ldm.models.diffusion.ddpm")
    network = {"image_size": side, "in_channels": channels, "out_channels": channels, **network}
    return module.LatentDiffusion(
        **parts,
        unet_config={"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": network},
        timesteps=1000,
        linear_start=0.0015,
        linear_end=0.0195,
        image_size=side,
        channels=channels,
    )


def _update(model: Any, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """What its Lightning does with a loss, and the average that its callback updates."""
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.model_ema(model.model)


def _import(folder: Path, taming: Path | None) -> None:
    package("ldm", folder)
    stand_in("pytorch_lightning.utilities.distributed", rank_zero_only=lambda function: function)
    warnings.filterwarnings("ignore", "You are trying to `self.log")
    if taming is None:
        stand_in("taming.modules.vqvae.quantize", VectorQuantizer2=nn.Identity)  # imported, and used by VQ alone
        return
    import_first(taming)
    make = torchvision.models.vgg16
    torchvision.models.vgg16 = lambda pretrained: make()
    lpips = importlib.import_module("taming.modules.losses.lpips").LPIPS
    lpips.load_from_pretrained = lambda self: None  # would fetch the weights of its heads


def _first_stage(size: AutoencoderSize, loss: dict[str, Any]) -> Any:
    module = importlib.import_module("ldm.models.autoencoder")
    return module.AutoencoderKL(**_first_stage_parameters(size, loss))


def _first_stage_parameters(size: AutoencoderSize, loss: dict[str, Any]) -> dict[str, Any]:
    networks = {
        "double_z": True,
        "z_channels": size.latent,
        "resolution": size.resolution,
        "in_channels": 3,
        "out_ch": 3,
        "ch": size.channels,
        "ch_mult": size.multipliers,
        "num_res_blocks": size.blocks,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    return {"ddconfig": networks, "lossconfig": loss, "embed_dim": size.latent}
