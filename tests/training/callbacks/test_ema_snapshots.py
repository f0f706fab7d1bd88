"""Snapshots of averages: written in training, and put together to the average that was not kept."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ldm.checkpoints import store
from ldm.diffusion.conditioners.base import Unconditional
from ldm.diffusion.module import LatentDiffusion
from ldm.diffusion.noise_schedules import SqrtLinear
from ldm.diffusion.objectives import DDPM
from ldm.errors import CheckpointError, ConfigError, ResourceError
from ldm.optim.ema import EMA, HalfLife, PowerFunction
from ldm.randomness import Draws
from ldm.training.callbacks.ema_snapshots import EMASnapshots, reconstruct, snapshots

STEPS, BATCH = 120, 4


class Latents(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(range(STEPS * BATCH * 2), batch_size=BATCH, collate_fn=list)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        draws = Draws(0, batch, BATCH, device)
        return {"latent": draws.normal("data", (2, 4, 4)), "draws": draws}


class Everything(pl.Callback):
    """The average of one more width, kept all along."""

    def __init__(self, width):
        self.profile, self.average = PowerFunction(width), {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        keep = self.profile((trainer.global_step - 1) * BATCH, BATCH)
        for name, value in pl_module.denoiser.state_dict().items():
            self.average[name] = keep * self.average.get(name, 0) + (1 - keep) * value.double()


class Network(torch.nn.Module):
    """Small: what is averaged matters here, not what it does."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(*(torch.nn.Conv2d(2, 2, 3, padding=1) for _ in range(4)))

    def forward(self, x, noise_level, conditioning):
        return self.layers(x)


def make(ema):
    torch.manual_seed(0)
    network = Network()
    adam = partial(torch.optim.AdamW, lr=1e-2)
    return LatentDiffusion(network, Unconditional(), DDPM(SqrtLinear()), optimizer=adam, ema=ema)


def fit(module, folder, callbacks):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=callbacks,
    )
    trainer.fit(module, Latents())


def test_a_width_that_was_not_kept(tmp_path: Path) -> None:
    module = make(partial(EMA, profile=PowerFunction(0.05), extra=[PowerFunction(0.1)]))
    kept = Everything(0.075)
    fit(module, tmp_path, [kept, EMASnapshots(every=6)])
    files = snapshots(tmp_path)
    assert [store.load(file)["images_seen"] for file in files] == [n * 6 * BATCH for n in range(1, 21)]
    made = reconstruct(files, 0.075)
    last = module.denoiser.state_dict()
    assert made.keys() == last.keys()
    far = {name: (last[name] - kept.average[name]).norm() for name in last}
    near = {name: (made[name] - kept.average[name]).norm() for name in last}
    assert sum(near.values()) < 0.03 * sum(far.values())  # half precision and 20 snapshots
    # What was kept is found as it is.
    own = reconstruct(files, 0.1)
    for name, value in module.ema.extra[0].state_dict().items():
        torch.testing.assert_close(own[name], value, rtol=2e-3, atol=1e-3)


def test_a_full_disk_costs_a_snapshot_and_not_the_run(tmp_path: Path, monkeypatch, caplog) -> None:
    saved = store.save

    def full(path: Path, state: dict) -> None:
        if path.name == "step=00000060.ckpt":
            raise ResourceError(f"{path}: No space left on device")
        saved(path, state)

    monkeypatch.setattr(store, "save", full)
    fit(make(partial(EMA, profile=PowerFunction(0.05))), tmp_path, [EMASnapshots(every=30)])
    assert [file.name for file in snapshots(tmp_path)] == [f"step={step:08d}.ckpt" for step in (30, 90, 120)]
    assert "step=00000060.ckpt: cannot be written" in caplog.text
    assert "training goes on without it" in caplog.text


def test_other_profiles_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="PowerFunction as every profile, found HalfLife"):
        fit(make(partial(EMA, profile=HalfLife(100))), tmp_path, [EMASnapshots(every=5)])
    with pytest.raises(ConfigError, match="every"):
        EMASnapshots(every=0)
    with pytest.raises(CheckpointError, match="no snapshots"):
        snapshots(tmp_path)


def test_counters_are_taken_from_the_latest(tmp_path: Path) -> None:
    for step, value in ((1, 2.0), (2, 4.0)):
        averages = [{"weight": torch.full((2,), value).half(), "count": torch.tensor(step)}]
        state = {"averages": averages, "exponents": [6.94], "images_seen": step * 10}
        store.save(tmp_path / "averages" / f"step={step:08d}.ckpt", state)
    made = reconstruct(snapshots(tmp_path), 0.1)
    assert made["count"] == 2
    assert np.allclose(made["weight"], 4.0, rtol=0.05)
