"""The end of an optimizer step is seen once: in an accumulation, in manual optimization and in a resumed run."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from torch import Tensor

from ldm.training.callbacks.previews import ImageLogger
from ldm.training.callbacks.step_callback import StepCallback
from tests.points import Automatic, PointData, a_trainer

MICRO_BATCHES = 3


class Notes(StepCallback):
    """The number of each step, and the first sample number of the micro-batch that it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        self.seen.append((trainer.global_step, int(batch["draws"].numbers[0])))


class ByHand(Automatic):
    """Manual optimization, with a step after every third micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        if (batch_idx + 1) % MICRO_BATCHES == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()
        return loss.detach()


def train(folder: Path, module: Automatic, steps: int, callback: pl.Callback, checkpoint: Path | None = None) -> Path:
    """Until `steps`, in three micro-batches a step; returns a checkpoint of the end."""
    own = {"accumulate_grad_batches": MICRO_BATCHES} if module.automatic_optimization else {}
    trainer = a_trainer(folder, steps, [callback], **own)
    trainer.fit(module, datamodule=PointData(4, seed=1), ckpt_path=checkpoint, weights_only=True)
    trainer.save_checkpoint(folder / "end.ckpt")
    return folder / "end.ckpt"


@pytest.mark.parametrize("make", [Automatic, ByHand])
def test_a_step_ends_with_its_last_micro_batch(tmp_path: Path, make: type[Automatic]) -> None:
    notes = Notes()
    train(tmp_path, make(), 4, notes)
    assert notes.seen == [(1, 8), (2, 20), (3, 32), (4, 44)]


@pytest.mark.parametrize("make", [Automatic, ByHand])
def test_a_resumed_run_does_not_see_the_step_before_again(tmp_path: Path, make: type[Automatic]) -> None:
    checkpoint = train(tmp_path, make(), 2, Notes())
    notes = Notes()
    train(tmp_path, make(), 4, notes, checkpoint)
    assert [step for step, _ in notes.seen] == [3, 4]


class Shows(Automatic):
    def images(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"input": batch["x"].new_zeros(1, 3, 8, 8)}


def test_a_resumed_run_does_not_draw_the_sheet_of_its_checkpoint_again(tmp_path: Path) -> None:
    """Its first micro-batch has the step number of the checkpoint."""
    checkpoint = train(tmp_path, Shows(), 2, ImageLogger(every_n_steps=2))
    (sheet,) = tmp_path.glob("images/train/*.png")
    sheet.unlink()
    train(tmp_path, Shows(), 4, ImageLogger(every_n_steps=2), checkpoint)
    assert [path.name for path in tmp_path.glob("images/train/*.png")] == ["input_00000004.png"]
