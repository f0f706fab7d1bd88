"""When checkpoints are written and which are kept, under a real Trainer with a model of one number."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

from ldm import checkpoint
from ldm.errors import ConfigError
from ldm.safety import AtomicCheckpointIO
from ldm.saving import Checkpoints, set_aside_later


class One(LightningModule):
    """Its validation scores are given."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.scores = iter(scores)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.weight - 1).square().sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/score", next(self.scores))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, callback: Checkpoints, scores: tuple[float, ...] = (3.0, 1.0, 2.0), **arguments: Any) -> One:
    """6 steps, with a validation after each second one."""
    model = One(list(scores))
    trainer = Trainer(
        **{"max_steps": 6, "val_check_interval": 2} | arguments,
        accelerator="cpu",
        callbacks=[callback],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        default_root_dir=folder,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(range(100)), DataLoader(range(1)))
    return model


def saved(folder: Path) -> dict[str, int]:
    return {path.name: checkpoint.load(path)["global_step"] for path in (folder / "checkpoints").iterdir()}


def test_the_last_ones_are_kept_and_the_end_is_saved(tmp_path):
    fit(tmp_path, Checkpoints(every=2))
    assert saved(tmp_path) == {"step=00000004.ckpt": 4, "step=00000006.ckpt": 6}


def test_a_short_run_is_saved_at_its_end(tmp_path):
    fit(tmp_path, Checkpoints())
    assert saved(tmp_path) == {"step=00000006.ckpt": 6}


def test_steps_are_counted_and_not_batches(tmp_path):
    fit(tmp_path, Checkpoints(every=1, keep=3), accumulate_grad_batches=3, val_check_interval=6)
    assert saved(tmp_path) == {f"step={step:08d}.ckpt": step for step in (4, 5, 6)}


@pytest.mark.parametrize(("higher", "step"), [(False, 4), (True, 2)])
def test_the_best_is_kept(tmp_path, higher, step):
    fit(tmp_path, Checkpoints(keep=1, monitor="val/score", higher_is_better=higher))
    assert saved(tmp_path) == {"best.ckpt": step, "step=00000006.ckpt": 6}


def test_the_best_so_far_survives_a_resume(tmp_path):
    first = Checkpoints(monitor="val/score")
    fit(tmp_path, first)
    second = Checkpoints(monitor="val/score")
    second.load_state_dict(first.state_dict())
    fit(tmp_path, second, scores=(1.5, 2.0, 3.0))
    assert saved(tmp_path)["best.ckpt"] == 4
    other = Checkpoints(monitor="val/other")  # another metric starts anew
    other.load_state_dict(first.state_dict())
    assert other.state_dict()["best"] == float("inf")


def test_a_metric_that_does_not_exist(tmp_path):
    with pytest.raises(ConfigError, match="val/scores"):
        fit(tmp_path, Checkpoints(monitor="val/scores"))
    with pytest.raises(ConfigError, match="every=0"):
        Checkpoints(every=0)


def test_later_checkpoints_are_set_aside(tmp_path):
    fit(tmp_path, Checkpoints(every=2, keep=9))
    folder = tmp_path / "checkpoints"
    aside = set_aside_later(folder, 4)
    assert [path.name for path in aside] == ["step=00000006.ckpt.superseded"]
    newest = checkpoint.newest(folder)
    assert newest is not None
    assert newest.name == "step=00000004.ckpt"
