"""Tiny models that read dense conditions: their spatial slot is one tensor made of what they read."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ldm.checkpoints import store
from ldm.config.load import build
from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.module import LatentDiffusion
from ldm.optim.ema import EMA, FixedDecay
from ldm.sampling.pipeline import Pipeline
from tests.tiny_runs import ADAM, Runs, node, save_run


class Spread(nn.Module):
    """One spatial channel: the mean of all that it reads, of the latent's sides, or of a small picture's own."""

    def __init__(self, keys: Sequence[str], side: int = 4) -> None:
        super().__init__()
        self.side = side
        self.keys = tuple(keys)
        self.register_buffer("place", torch.zeros(()), persistent=False)

    def forward(self, batch: Mapping[str, Any]) -> Conditioning:
        rows = len(batch[self.keys[0]])
        total = torch.zeros(rows, 1, self.side, self.side)
        for key in self.keys:
            value = batch[key].float()
            image = value[:, None] if key == "map" else value
            if key == "low_resolution" and image.shape[-1] != self.side // 2:
                total = total.mean((2, 3), keepdim=True) + image.mean(1, keepdim=True)
            elif image.ndim == 4:
                total = total + F.adaptive_avg_pool2d(image.mean(1, keepdim=True), self.side)
            else:
                total = total + value.reshape(rows, -1).mean(1)[:, None, None, None]
        return Conditioning(spatial=total)

    def null(self, n: int) -> Conditioning:
        return Conditioning(spatial=torch.zeros(n, 1, 1, 1))


def save_dense(folder: Path, runs: Runs, keys: Sequence[str], data: Mapping[str, Any] | None = None) -> Path:
    """The diffusion model of `runs`, 16 x 16 pixels, one that reads these keys instead of classes.

    Args:
        data: parameters of the data module in its configuration, and `facts` of the checkpoint.
    """
    conditioner = {"target": "tests.dense_models.Spread", "params": {"keys": [*keys]}}
    return save_reading(folder, runs, conditioner, {"spatial_channels": 1}, data)


def save_reading(
    folder: Path,
    runs: Runs,
    conditioner: Mapping[str, Any],
    network: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
) -> Path:
    """The same with any conditioner.

    Args:
        conditioner: its node.
        network: parameters of the UNet that it fills.
    """
    torch.manual_seed(3)
    record = copy.deepcopy(store.record(store.verify(runs.diffusion).path))
    params = record["config"]["model"]["params"]
    params["conditioner"] = dict(conditioner)
    params["network"]["params"] |= {"vector_channels": None, **network}
    given = dict(data or {})
    record["data"] = given.pop("facts", {})
    record["config"]["data"] = node("latents.datamodule.LatentDataModule", **given)
    parts = [build(params[name], ["tests"]) for name in ("network", "conditioner", "objective")]
    module = LatentDiffusion(*parts, optimizer=ADAM, ema=partial(EMA, profile=FixedDecay()), label_dropout=0.1)
    for denoiser in (module.denoiser, module.ema.average):
        for weight in denoiser.parameters():
            if weight.ndim > 1 and not weight.any():
                nn.init.normal_(weight.data, std=0.05)
    return save_run(folder, module, record)


def load_dense(folder: Path) -> Pipeline:
    return Pipeline.load(folder, trust=["tests"])
