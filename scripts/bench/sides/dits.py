"""DiT, SiT and LightningDiT from their folders: network and loss in the loop of their train.py.

Without the learned variance that DiT and SiT have by default, so that the networks are the same as ours.
"""

import importlib
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.bench.child import Built, Place, count, repeat
from scripts.bench.sides.imports import import_first, stand_in
from scripts.bench.sides.plain import update_average
from scripts.bench.sizes import DiTSize


def dit(folder: Path, size: DiTSize, place: Place) -> Built:
    import_first(folder)
    diffusion = importlib.import_module("diffusion").create_diffusion(timestep_respacing="", learn_sigma=False)
    model = importlib.import_module("models").DiT(**_shape(size), learn_sigma=False)

    def loss(latents: Tensor, classes: Tensor) -> Tensor:
        t = torch.randint(0, diffusion.num_timesteps, (len(latents),), device=latents.device)
        terms: dict[str, Tensor] = diffusion.training_losses(model, latents, t, {"y": classes})
        return terms["loss"].mean()

    return _trained(model, loss, size, place)


def sit(folder: Path, size: DiTSize, place: Place) -> Built:
    transport = _transport(folder)
    model = importlib.import_module("models").SiT(**_shape(size), learn_sigma=False)

    def loss(latents: Tensor, classes: Tensor) -> Tensor:
        terms: dict[str, Tensor] = transport.training_losses(model, latents, {"y": classes})
        return terms["loss"].mean()

    return _trained(model, loss, size, place)


def lightningdit(folder: Path, size: DiTSize, place: Place) -> Built:
    """Compiled, as it comes."""
    stand_in("fairscale.nn.model_parallel.initialize")
    unused = ("ColumnParallelLinear", "ParallelEmbedding", "RowParallelLinear")
    stand_in("fairscale.nn.model_parallel.layers", **dict.fromkeys(unused))
    transport = _transport(folder, use_cosine_loss=True, use_lognorm=True)
    network = importlib.import_module("models.lightningdit").LightningDiT
    model = network(**_shape(size), use_swiglu=True, use_rope=True, use_rmsnorm=True)

    def loss(latents: Tensor, classes: Tensor) -> Tensor:
        terms: dict[str, Tensor] = transport.training_losses(model, latents, {"y": classes})
        return terms["cos_loss"].mean() + terms["loss"].mean()

    return _trained(model, loss, size, place)


def _transport(folder: Path, **options: bool) -> Any:
    import_first(folder)
    stand_in("torchdiffeq", odeint=None)  # samples
    return importlib.import_module("transport").create_transport(**options)


def _shape(size: DiTSize) -> dict[str, Any]:
    return {
        "input_size": size.side,
        "patch_size": size.patch,
        "in_channels": size.latent,
        "hidden_size": size.width,
        "depth": size.depth,
        "num_heads": size.heads,
        "num_classes": size.classes,
    }


def _trained(model: Any, loss: Callable[[Tensor, Tensor], Tensor], size: DiTSize, place: Place) -> Built:
    model.to(place.device)
    average = deepcopy(model).requires_grad_(False).eval()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    latents = torch.randn(size.images, size.latent, size.side, size.side, device=place.device)
    classes = torch.randint(0, size.classes, (size.images,), device=place.device)

    def step() -> None:
        value = loss(latents, classes)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        update_average(average, model)
        value.item()

    return Built(count(model), repeat(step, place))
