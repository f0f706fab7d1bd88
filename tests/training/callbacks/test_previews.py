"""Pictures land where they should and show what they should; speed and progress are told truly."""

import io
import math
import re
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import WandbLogger
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from ldm.data.asked_for import conditions as conditions_of
from ldm.errors import ConfigError, DataError
from ldm.images import grid, to_arrays
from ldm.latents.manifest import Manifest
from ldm.randomness import STANDARD, Draws
from ldm.runtime import distributed
from ldm.sampling.generate import generate
from ldm.sampling.guidance import Guidance
from ldm.sampling.pipeline import Pipeline
from ldm.sampling.samplers import heun
from ldm.sampling.timesteps import compvis, karras
from ldm.training.callbacks.previews import ImageLogger, SampleLogger
from ldm.training.callbacks.progress import Progress, Throughput
from ldm.training.loggers import MetricsFile
from ldm.training.metrics_table import read_metrics

SIDE = 6


class Data(pl.LightningDataModule):
    """Endless batches of five images; each is all of one value, its sample number over 100."""

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        self.pause = pause

    def batches(self, rows: list[int]) -> dict[str, Any]:
        time.sleep(self.pause)
        return {
            "image": torch.tensor(rows).float().div(100).view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE),
            "caption": [f"number {row}" for row in rows],
            "sample_number": np.array(rows),
        }

    def train_dataloader(self) -> DataLoader:
        return DataLoader(range(1000), batch_size=5, collate_fn=self.batches)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(range(10), batch_size=5, collate_fn=self.batches)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return batch | {"draws": Draws(0, batch.pop("sample_number"), 5)}


class Shows(pl.LightningModule):
    """Shows the input and its negative, and remembers in which mode it was asked."""

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.pause = pause
        self.asked: list[tuple[bool, int, int]] = []

    def images(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        assert len(batch["draws"]) == len(batch["caption"]) == len(batch["image"])
        self.asked.append((self.training, len(batch["image"]), int(batch["draws"].numbers[0])))
        assert not torch.is_grad_enabled()
        return {"input": batch["image"], "negative": -batch["image"]}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        time.sleep(self.pause)
        return self.layer(torch.ones(1, 1)).sum() * 0 + 2.5

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val/loss", 0.125)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, module: pl.LightningModule, callbacks: Iterable[pl.Callback], **kwargs: Any) -> pl.Trainer:
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": any(isinstance(callback, Progress) for callback in callbacks),
        "limit_val_batches": 0,
        "log_every_n_steps": 4,
    }
    data = kwargs.pop("data", None) or Data()
    trainer = pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **(options | kwargs))
    trainer.fit(module, data)
    return trainer


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_sheets_of_training_and_validation_images(tmp_path: Path) -> None:
    module = Shows()
    validating = {"limit_val_batches": 1.0, "check_val_every_n_epoch": None, "val_check_interval": 3}
    fit(tmp_path, module, [ImageLogger(every_n_steps=4, num_images=2)], max_steps=8, **validating)
    names = [f"train/input-negative_{step:08d}.png" for step in (4, 8)]
    names += [f"val/input-negative_{step:08d}.png" for step in (3, 6)]
    found = sorted(str(path.relative_to(tmp_path / "images")) for path in (tmp_path / "images").rglob("*.png"))
    assert found == names
    # Not in training mode, two images each: the newest batch's in training, always the first ones' in validation.
    # The first of all is Lightning's trial before the first step, of which no sheet is made.
    assert module.asked == [(False, 2, 0), (False, 2, 0), (False, 2, 15), (False, 2, 0), (False, 2, 35)]
    assert module.training
    sheet = picture(tmp_path / "images" / names[0])
    shown = 64 // SIDE * SIDE  # small pictures are enlarged
    assert sheet.shape == (2 * shown + 6, 2 * shown + 6, 3)
    middle, second = 2 + shown // 2, 4 + shown + shown // 2
    values = [15, 16, -15, -16]  # the fourth batch
    places = [(middle, middle), (middle, second), (second, middle), (second, second)]
    for value, place in zip(values, places, strict=True):
        assert (sheet[place] == round((value / 100 + 1) * 127.5)).all()


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "images").write_text("a file where the folder should be")
    trainer = fit(tmp_path, Shows(), [ImageLogger(every_n_steps=2)], max_steps=4)
    assert trainer.global_step == 4
    assert "training goes on" in caplog.text


def test_a_step_of_several_micro_batches_is_shown_once(tmp_path: Path) -> None:
    module = Shows()
    fit(tmp_path, module, [ImageLogger(every_n_steps=2)], max_steps=5, accumulate_grad_batches=3)
    assert [first for _, _, first in module.asked] == [25, 55]


def test_levels_are_clamped_and_rounded() -> None:
    images = torch.tensor([-2.0, -1.0, 0.0, 1.0, 1.5]).view(5, 1, 1, 1)
    assert [image.item() for image in to_arrays(images)] == [0, 0, 128, 255, 255]


def a_sampling_trainer(folder: Path, manifest: Manifest) -> Any:
    return SimpleNamespace(
        default_root_dir=folder,
        datamodule=SimpleNamespace(manifest=manifest, randomness=STANDARD),
        global_step=6,
        is_global_zero=True,
        loggers=[],
        precision_plugin=pl.plugins.Precision(),
    )


@pytest.mark.parametrize(("classes", "scale"), [(None, 1.0), ([2, 0], 2.0)])
def test_samples_are_those_of_the_averaged_weights(
    tmp_path: Path, runs: Any, classes: list[int] | None, scale: float
) -> None:
    module = runs.module
    saved = Pipeline.load(runs.diffusion)
    callback = SampleLogger(every_n_steps=3, classes=classes, seeds=[7, 8, 9], steps=2, guidance_scale=scale)
    module.train()
    callback.on_step_end(a_sampling_trainer(tmp_path, saved.manifest), module, None)
    sheet = picture(tmp_path / "images" / "val" / "samples_00000006.png")
    conditions = None if classes is None else [{"class_label": label} for label in (2, 2, 2, 0, 0, 0)]
    samples = generate(saved, [7, 8, 9] * len(classes or [0]), conditions, steps=2, guidance=Guidance(scale))
    titles = [] if classes is None else [saved.manifest.plan.class_names[label] for label in classes]
    wanted = grid([sample.image for sample in samples], columns=3, titles=titles)
    assert sheet.shape == wanted.shape
    assert np.abs(sheet.astype(int) - wanted).max() <= 1
    assert isinstance(saved.manifest, Manifest)


def test_samples_are_made_by_the_sampler_and_the_schedule_that_were_named(tmp_path: Path, runs: Any) -> None:
    saved = Pipeline.load(runs.diffusion)
    chosen = {"sampler": partial(heun, s_churn=4.0), "schedule": partial(karras, rho=5.0)}
    callback = SampleLogger(every_n_steps=3, conditions=[{"class_label": 2}], seeds=[7, 8], steps=3, **chosen)
    callback.on_step_end(a_sampling_trainer(tmp_path, saved.manifest), runs.module, None)
    sheet = picture(tmp_path / "images" / "val" / "samples_00000006.png")
    samples = generate(saved, [7, 8], [{"class_label": 2}] * 2, steps=3, **chosen)
    wanted = grid([sample.image for sample in samples], columns=2, titles=[saved.manifest.plan.class_names[2]])
    assert np.abs(sheet.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"conditions": [{"caption": "a cat"}]}, "expected the keys that the model reads, class_label; found caption"),
        ({"steps": 300, "schedule": compvis}, "a proper divisor of 1000"),
        ({"classes": [0, 3]}, "class 3: expected 0 to 2"),
        ({"guidance_scale": 2.0}, "callbacks.images .*: guidance scale: found 2, but no conditions are requested"),
        ({"steps": 2000}, "2000"),
    ],
)
def test_samples_that_cannot_be_are_refused_before_the_first_step(
    tmp_path: Path, runs: Any, wrong: dict[str, Any], message: str
) -> None:
    trainer = a_sampling_trainer(tmp_path, Pipeline.load(runs.diffusion).manifest)
    SampleLogger(classes=[0, 2], guidance_scale=2.0).on_fit_start(trainer, runs.module)
    with pytest.raises(ConfigError, match=message):
        SampleLogger(**wrong).on_fit_start(trainer, runs.module)


def test_a_sheet_without_a_picture_is_refused() -> None:
    with pytest.raises(ConfigError, match="seeds: expected one or more; without previews, write images: null"):
        SampleLogger(seeds=[])


def test_classes_and_conditions_say_the_same() -> None:
    with pytest.raises(ConfigError, match="leave one of them out"):
        SampleLogger(classes=[0], conditions=[{"class_label": 1}])
    with pytest.raises(ConfigError, match="found classes and prompts, which say the same"):
        SampleLogger(classes=[0], prompts=["a cat"])


class Items:
    """Three items, the second of which cannot be read."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, item: int) -> dict[str, Any]:
        if item == 1:
            raise DataError("unreadable")
        return {"image": None, "class_label": item, "caption": ["a cat", "a kitten"]}

    def path(self, item: int) -> str:
        return f"memory/{item}"


@pytest.mark.parametrize("held_out", [True, False])
def test_rows_of_items_that_are_not_trained_on(tmp_path: Path, runs: Any, held_out: bool) -> None:
    trainer = a_sampling_trainer(tmp_path, Pipeline.load(runs.diffusion).manifest)
    trainer.datamodule.train_dataset = trainer.datamodule.validation_dataset = Items()
    if not held_out:
        trainer.datamodule.validation_dataset = None
    callback = SampleLogger(classes=[1], held_out=3, seeds=[7, 8], steps=2)
    for _ in range(2):
        callback.on_fit_start(trainer, runs.module)
        labels = [condition["class_label"] for condition in callback._conditions]
        assert labels[:2] == [1, 1]
        assert sorted(labels[2:]) == [0, 0, 2, 2]
    assert len(callback._seeds) == 6
    assert conditions_of(Items(), ["caption"], 3) == [{"caption": "a cat"}] * 2
    assert conditions_of(Items(), ["layout"], 3) == conditions_of(Items(), [], 3) == []


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_a_guidance_scale_that_is_no_number_is_refused_at_once(scale: float) -> None:
    with pytest.raises(ConfigError, match="guidance scale: expected a finite number"):
        SampleLogger(classes=[0], guidance_scale=scale)


def test_all_ranks_make_as_many_samples(tmp_path: Path, runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the weights are sharded a rank with one less would leave the others waiting."""
    saved = Pipeline.load(runs.diffusion)
    shares: dict[int, list[np.ndarray]] = {}

    def gather(share: list[np.ndarray]) -> list[list[np.ndarray]]:
        shares[distributed.rank()] = share
        return [shares[rank] for rank in sorted(shares)]

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather", gather)
    trainer = a_sampling_trainer(tmp_path, saved.manifest)
    for rank in (1, 0):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        trainer.is_global_zero = rank == 0
        SampleLogger(seeds=[7, 8, 9], steps=2).show(trainer, runs.module)
    assert len(shares[0]) == len(shares[1]) == 2
    sheet = picture(tmp_path / "images" / "val" / "samples_00000006.png")
    wanted = grid([sample.image for sample in generate(saved, [7, 8, 9], steps=2)], columns=3)
    assert np.abs(sheet.astype(int) - wanted).max() <= 1


def test_samples_need_a_diffusion_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a LatentDiffusion, found a Shows"):
        fit(tmp_path, Shows(), [SampleLogger(every_n_steps=1)], max_steps=1)


def test_throughput_counts_images_and_waiting(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    module, data = Shows(pause=0.01), Data(pause=0.03)
    fit(tmp_path, module, [Throughput(every_n_steps=4)], max_steps=12, data=data, logger=MetricsFile(file))
    rows = [row for row in read_metrics(file) if "images_per_second" in row]
    assert [row["step"] for row in rows] == ["3", "7", "11"]
    # Between five images in 40 ms and, on a busy machine, a good deal fewer.
    assert 20 < float(rows[1]["images_per_second"]) <= 5 / 0.04
    assert 0.3 < float(rows[1]["data_wait"]) < 0.95


def test_saves_do_not_pass_for_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 100.0, 101.0, 103.0, 104.0])
    monkeypatch.setattr("ldm.training.callbacks.progress.time.monotonic", lambda: next(clock))
    logged: dict[str, float] = {}
    module: Any = SimpleNamespace(log_dict=lambda values, **_: logged.update(values))
    batch = {"draws": Draws(0, range(6), 6)}
    callback = Throughput(every_n_steps=3)
    for step in (1, 2, 3):
        trainer: Any = SimpleNamespace(global_step=step - 1, world_size=2)
        callback.on_train_batch_start(trainer, module, batch, 0)
        trainer.global_step = step
        callback.on_train_batch_end(trainer, module, None, batch, 0)
        if step == 1:
            callback.on_save_checkpoint(trainer, module, {})
    # Three steps of a second each, and a wait of two seconds; the 99 seconds of the save are no one's.
    assert logged == {"images_per_second": pytest.approx(3 * 12 / 5), "data_wait": pytest.approx(2 / 5)}


def a_progress(terminal: bool, **pauses: float) -> tuple[Progress, io.StringIO]:
    progress, text = Progress(**pauses), io.StringIO()
    progress._console = Console(file=text, force_terminal=terminal, width=120)
    return progress, text


def test_a_log_file_gets_a_line_now_and_then(tmp_path: Path) -> None:
    progress, text = a_progress(terminal=False, log_seconds=3600)
    progress._pause = 3600
    validating = {"limit_val_batches": 1.0, "check_val_every_n_epoch": None, "val_check_interval": 20}
    fit(tmp_path, Shows(), [progress], max_steps=40, accumulate_grad_batches=1, **validating)
    lines = [line for line in text.getvalue().splitlines() if line]
    assert re.fullmatch(r"step 20: val/loss 0.125  0:0\d elapsed, 0:0\d left", lines[0])
    assert re.fullmatch(r"step 40/40: loss 2.5  \S+ images/s  0:0\d elapsed, 0:00 left", lines[1])
    assert len(lines) == 3


def test_a_terminal_gets_a_bar_with_the_loss_of_the_whole_batch(tmp_path: Path) -> None:
    progress, text = a_progress(terminal=True)
    fit(tmp_path, Shows(), [progress], max_steps=4, accumulate_grad_batches=2)
    assert "4/4" in text.getvalue()
    assert "loss 2.5 " in text.getvalue()
    assert "0:00 elapsed, 0:00 left" in text.getvalue()


class ShowsFigures(Shows):
    """As stage 1: a loss that a newcomer cannot read, and a figure that he can."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx) - 3390, "figures": {"l1": torch.tensor(0.0625)}}


def test_what_a_module_wants_shown_stands_before_its_loss(tmp_path: Path) -> None:
    progress, text = a_progress(terminal=False)
    fit(tmp_path, ShowsFigures(), [progress], max_steps=4)
    assert re.search(r"^step 4/4: l1 0.0625  loss -3388  ", text.getvalue(), re.MULTILINE)


def test_figures_are_read_only_when_they_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading waits for the device."""
    read: list[float] = []
    progress, _ = a_progress(terminal=False)
    progress._pause = 3600
    kept = Tensor.__float__
    monkeypatch.setattr(Tensor, "__float__", lambda tensor: read.append(0) or kept(tensor))
    fit(tmp_path, ShowsFigures(), [progress], max_steps=30)
    assert len(read) == 2  # l1 and loss of the last step


def test_times_are_of_the_steps_that_this_process_has_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run resumed at step 900 of 1000 does 10 steps in 12 s: 90 take 108 s."""
    progress, text = a_progress(terminal=False)
    progress._pause = 0.0
    clock = iter([0.0, 12.0, 12.0, 20.0, 20.0])
    monkeypatch.setattr("ldm.training.callbacks.progress.time.monotonic", lambda: next(clock))
    module: Any = SimpleNamespace(automatic_optimization=False)
    metrics = {"val/psnr": torch.tensor(24.0), "val/ssim": torch.tensor(0.5), "train/loss": torch.tensor(1.0)}
    trainer: Any = SimpleNamespace(global_step=900, max_steps=1000, world_size=2, sanity_checking=False)
    trainer.callback_metrics, trainer.state = metrics, SimpleNamespace(fn="fit")
    progress.on_train_start(trainer, module)
    progress._shown_at = 4.0
    trainer.global_step = 910
    progress.on_train_batch_end(trainer, module, {"loss": torch.tensor(0.5)}, {"draws": range(40)}, 0)
    progress.on_validation_end(trainer, module)
    assert text.getvalue().splitlines() == [
        "step 910/1000: loss 0.5  10 images/s  0:12 elapsed, 1:48 left",
        "step 910: val/psnr 24  val/ssim 0.5  0:20 elapsed, 3:00 left",
    ]


def test_a_log_file_hears_of_a_long_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress, text = a_progress(terminal=False)
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr("ldm.training.callbacks.progress.time.monotonic", lambda: float(next(clock)))
    trainer: Any = SimpleNamespace(global_step=900, sanity_checking=False, num_val_batches=[4])
    progress.on_validation_start(trainer, Shows())
    for batch in range(4):
        progress.on_validation_batch_end(trainer, Shows(), None, {}, batch)
    assert text.getvalue().splitlines() == [
        "step 900: validating 2/4  0:40 elapsed, 0:40 left",
        "step 900: validating 4/4  1:20 elapsed, 0:00 left",
    ]


def test_a_line_of_a_log_file_is_never_broken(tmp_path: Path) -> None:
    progress, text = a_progress(terminal=False)
    progress._console = Console(file=text, force_terminal=False, width=20)
    progress._say("a [line] of more than twenty letters, 1 2 3")
    assert text.getvalue() == "a [line] of more than twenty letters, 1 2 3\n"


def test_a_rank_that_is_not_the_first_is_silent(tmp_path: Path) -> None:
    progress, text = a_progress(terminal=True)
    progress.disable()
    fit(tmp_path, Shows(), [progress], max_steps=4)
    assert text.getvalue() == ""


def test_wandb_gets_the_captions_of_the_rows(tmp_path: Path, runs: Any) -> None:
    trainer = a_sampling_trainer(tmp_path, Pipeline.load(runs.diffusion).manifest)
    trainer.loggers = [logger] = [create_autospec(WandbLogger, instance=True)]
    SampleLogger(classes=[2, 0], seeds=[7], steps=1).show(trainer, runs.module)
    (call,) = logger.log_image.call_args_list
    assert call.args == ("val/samples", [str(tmp_path / "images" / "val" / "samples_00000006.png")])
    assert call.kwargs == {"step": 6, "caption": ["Ankle boot; cat"]}
