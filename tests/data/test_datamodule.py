"""The data module of stage 1: batches, draws, the clock in a trainer, workers that ignore signals."""

import itertools
import logging
import multiprocessing
import os
import signal
import subprocess
import time

import pytest
import torch
from PIL import Image
from pytorch_lightning import LightningModule, Trainer

from ldm.data.datamodule import VALIDATION_SEED, ImageDataModule
from ldm.data.dataset import Subset
from ldm.data.held_out import hold_out
from ldm.data.loading import TransformedDataset, chosen
from ldm.data.sources.folder import ImageFolder
from ldm.data.transforms import EvalTransform
from ldm.errors import ConfigError, DataError
from ldm.randomness import Draws, KeyedBijection
from ldm.runtime.signals import ignore_in_worker
from tests.tiny_features import CaptionedPictures

CPU_TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "use_distributed_sampler": False,
    "check_val_every_n_epoch": None,
    "val_check_interval": 4,
    "num_sanity_val_steps": 1,
}


class Recorder(LightningModule):
    """Learns nothing much; keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple] = []
        self.validated: list[tuple] = []

    def training_step(self, batch, batch_index):
        images, draws = batch["image"], batch["draws"]
        shown = images.sum((1, 2, 3)).tolist(), draws.normal("noise", (2,)).tolist(), torch.rand(()).item()
        self.seen.append((draws.numbers.tolist(), *shown))
        return (self.weight - images.mean()) ** 2

    def validation_step(self, batch, batch_index):
        draws = batch["draws"]
        self.validated.append((draws.numbers.tolist(), batch["image"].sum().item(), draws.uniform("t").tolist()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def make(image_folder):
    def build(train: ImageFolder | None = None, **options) -> ImageDataModule:
        options = {"batch_size": 6, "resolution": 16, "seed": 3, "num_validation": 5} | options
        return ImageDataModule(train or ImageFolder(image_folder), **options)

    return build


@pytest.fixture
def fit(make):
    def run(steps: int, checkpoint=None, accumulate: int = 1, seed: int = 3, **options) -> tuple[Recorder, Trainer]:
        recorder = Recorder()
        trainer = Trainer(max_steps=steps, accumulate_grad_batches=accumulate, **CPU_TRAINER)
        trainer.fit(recorder, make(seed=seed, micro_batch_size=6 // accumulate, **options), ckpt_path=checkpoint)
        return recorder, trainer

    return run


def test_facts(make):
    data, whole = make(), make(channels=1, num_validation=0)
    source = data.train_dataset.fingerprint()
    facts = {"channels": 3, "resolution": 16, "num_classes": 2, "batch_size": 6, "num_items": 15, "source": source}
    assert data.facts() == facts
    assert whole.facts() == facts | {"channels": 1, "num_items": 20, "source": whole.train_dataset.fingerprint()}
    assert whole.facts()["source"] != source


def test_height_and_width_from_the_facts_to_the_batch(make):
    data = make(resolution=[12, 20], channels=4)
    assert (data.facts()["resolution"], data.facts()["channels"]) == ([12, 20], 4)
    assert data.meta_batch()["image"].shape == (2, 4, 12, 20)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert next(iter(loader))["image"].shape[1:] == (4, 12, 20)
    assert make(resolution=[16, 16]).facts() == make(resolution=16).facts()


def test_a_validation_set_of_its_own_is_a_fact(make, image_folder):
    own = ImageFolder(image_folder)
    assert make(num_validation=0, validation=own).facts()["validation_source"] == own.fingerprint()


def test_wrong_parameters(make, image_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"data.params.channels: .* 5 channels, .* can have 1 or 3 or 4"):
        make(channels=5)
    with pytest.raises(ConfigError, match="micro_batch_size: 4 does not divide"):
        make(micro_batch_size=4)
    with pytest.raises(ConfigError, match="not both"):
        make(validation=ImageFolder(image_folder))
    with pytest.raises(DataError, match="num_validation"):
        make(num_validation=-1)
    with pytest.raises(DataError, match="num_validation: cannot hold out 1 of 1 items"):
        hold_out(Subset(ImageFolder(image_folder), [0]), 1)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="classes of the validation data set differ"):
        make(num_validation=0, validation=ImageFolder(tmp_path))


@pytest.mark.parametrize(
    ("wanted", "held_out", "said"),
    [
        (5000, 2, "5000 of 20 items would leave none to train on; a tenth, 2, is held out instead"),
        (20, 2, "20 of 20 items would leave none"),
        (15, 15, "15 of 20 items are held out, 5 are left to train on; a tenth would be 2"),
        (10, 10, ""),
    ],
)
def test_a_small_data_set_holds_out_a_tenth_where_more_is_asked_than_there_is(make, caplog, wanted, held_out, said):
    data = make(num_validation=wanted)
    assert (len(data.train_dataset), len(data.validation_dataset)) == (20 - held_out, held_out)
    assert said in caplog.text
    assert bool(said) == bool(caplog.text)


@pytest.fixture
def lonely(tmp_path):
    """Seven classes, of which six have one picture and the first has 30."""
    for number in range(36):
        file = tmp_path / "lonely" / str(max(0, number - 29)) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 0, 0)).save(file)
    return tmp_path / "lonely"


def test_classes_of_which_nothing_is_left_to_train_on_are_named(lonely, caplog):
    data = ImageDataModule(ImageFolder(lonely), 4, 16, num_validation=20)
    left = {data.train_dataset[item]["class_label"] for item in range(len(data.train_dataset))}
    lost = [str(label) for label in range(7) if label not in left]
    assert 0 < len(lost) < 7
    assert f"include all items of {len(lost)} classes" in caplog.text
    assert f"none are left to train on: {', '.join(lost)}; hold out fewer" in caplog.text


def test_nothing_is_said_of_classes_where_there_are_none_or_they_are_not_known(lonely, caplog):
    class Unknown:
        """What a data set of one's own has at least."""

        num_classes, class_names = 7, None

        def __len__(self):
            return 36

    hold_out(ImageFolder(lonely, classes=False), 15)
    hold_out(Unknown(), 15)
    hold_out(Subset(Unknown(), range(36)), 15)
    assert caplog.text == ""


def test_a_class_without_a_readable_picture_is_named(lonely, fit, caplog):
    for name in ("3/32.png", "0/1.png"):
        (lonely / name).write_bytes(b"damaged")
    fit(9, train=ImageFolder(lonely), num_validation=0, max_broken=0.1)
    assert caplog.text.count("none of its images can be read") == 1
    assert "class 3: none of its images can be read" in caplog.text


def test_a_world_that_does_not_fit(make, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="4 ranks"):
        make().train_dataloader()


def test_all_ranks_together_see_what_one_sees(make, monkeypatch):
    def first_batches(rank: int, world: int, loader: str) -> list[dict]:
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("RANK", str(rank))
        return [batch for batch, _ in zip(getattr(make(), loader)(), range(4), strict=False)]

    for alone, first, second in zip(
        *(first_batches(*r, "train_dataloader") for r in ((0, 1), (0, 2), (1, 2))), strict=True
    ):
        assert torch.cat([first["image"], second["image"]]).equal(alone["image"])
        assert torch.cat([first["class_label"], second["class_label"]]).equal(alone["class_label"])
    shares = [first_batches(rank, 2, "val_dataloader") for rank in range(2)]
    assert sorted(n for share in shares for batch in share for n in batch["sample_number"].tolist()) == list(range(5))


def test_sample_numbers_lead_to_their_files(make, image_folder):
    module = make()
    batches = [batch for batch, _ in zip(module.train_dataloader(), range(4), strict=False)]
    for batch in batches:
        files = [file for number in batch["sample_number"].tolist() for file in module.sources([number])]
        for file, image in zip(files, batch["image"], strict=True):
            whole = EvalTransform(16)(Image.open(file).convert("RGB"))
            assert image.equal(whole) or image.equal(whole.flip(-1))
    assert len(module.sources([0, 15, 0, 3])) == 3  # 15 items an epoch: 15 is of the second one
    assert make().sources([0]) == []  # before there is a loader


def test_training_follows_the_clock(fit):
    recorder, trainer = fit(8)
    assert [entry[0] for entry in recorder.seen] == [list(range(6 * step, 6 * step + 6)) for step in range(8)]
    assert trainer.datamodule.images_seen == 48
    noise = Draws(3, range(6), 6).normal("noise", (2,)).tolist()
    assert recorder.seen[0][2] == noise
    assert len({entry[3] for entry in recorder.seen}) == 8


def test_validation_is_the_same_every_time_in_every_run(fit):
    recorder, _ = fit(8)
    passes = [recorder.validated[i : i + 1] for i in range(len(recorder.validated))]
    assert len(passes) == 3
    assert passes[0] == passes[1] == passes[2]
    numbers, _, uniforms = recorder.validated[0]
    assert sorted(numbers) == list(range(5))
    assert uniforms == Draws(VALIDATION_SEED, numbers, 6).uniform("t").tolist()
    assert fit(4, seed=4)[0].validated[0] == recorder.validated[0]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_the_same(fit, tmp_path, workers, accumulate):
    whole, _ = fit(7, accumulate=accumulate)
    first, trainer = fit(3, accumulate=accumulate, num_workers=workers)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert trainer.datamodule.state_dict() == {"images_seen": 18, "step": 3}
    second, resumed = fit(7, tmp_path / "a.ckpt", accumulate, num_workers=workers)
    assert first.seen + second.seen == whole.seen
    assert resumed.datamodule.images_seen == 42


def test_short_passes_of_the_trainer_do_not_start_the_order_again(fit, monkeypatch):
    monkeypatch.setitem(CPU_TRAINER, "limit_train_batches", 3)
    monkeypatch.setitem(CPU_TRAINER, "val_check_interval", 3)
    assert [entry[0][0] for entry in fit(7)[0].seen] == [6 * step for step in range(7)]


def test_without_validation(make, fit):
    assert make(num_validation=0).val_dataloader() == []
    assert fit(2, num_validation=0)[0].validated == []


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_reported_and_replaced_then_stop_the_run(tmp_path, caplog, workers):
    for index in range(10):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(tmp_path / f"{index}.png")
    (tmp_path / "4.png").write_bytes(b"")

    def run(allowed: float) -> Recorder:
        recorder = Recorder()
        data = ImageDataModule(ImageFolder(tmp_path), 5, 16, num_workers=workers, max_broken=allowed)
        Trainer(max_steps=4, **CPU_TRAINER).fit(recorder, data)
        return recorder

    with caplog.at_level(logging.WARNING, logger="ldm"):
        assert len(run(allowed=0.1).seen) == 4
    assert [("4.png" in message, "next readable" in message) for message in caplog.messages] == [(True, True)]
    with pytest.raises(DataError, match=r"1 of 10 images are broken.*4\.png.*max_broken"):
        run(allowed=0.05)


def _worker(ready) -> None:
    ignore_in_worker(0)
    ready.set()
    time.sleep(60)


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="Linux tells who sent a signal")
def test_workers_end_for_their_parent_and_for_nobody_else():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_worker, args=(ready,), daemon=True)
    process.start()
    try:
        assert ready.wait(30)
        for name in ("TERM", "INT", "HUP", "USR1", "USR2"):
            subprocess.run(["/bin/sh", "-c", f"kill -{name} {process.pid}"], check=True)
        process.join(0.3)
        assert process.is_alive()
        process.terminate()
        process.join(10)
        assert process.exitcode == 0
    finally:
        os.kill(process.pid, signal.SIGKILL) if process.is_alive() else None


def test_a_worker_takes_no_signal_before_it_knows_what_to_make_of_it(make, tmp_path, monkeypatch):
    def note(worker_id: int) -> None:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        (tmp_path / "blocked").write_text(str(signal.SIGTERM in blocked))

    monkeypatch.setattr("ldm.data.datamodule.ignore_in_worker", note)
    next(iter(make(num_workers=1).train_dataloader()))
    assert (tmp_path / "blocked").read_text() == "True"
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("captions", [True, False])
@pytest.mark.parametrize("classes", [True, False])
def test_meta_batch_has_the_keys_and_the_shapes_of_a_real_one(captions, classes, tmp_path):
    for index in range(6):
        picture = tmp_path / ("a", "b")[index % 2] / f"{index}.png"
        picture.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 16)).save(picture)
        if captions:
            picture.with_suffix(".txt").write_text(f"picture {index}")
    data = ImageDataModule(ImageFolder(tmp_path, classes=classes), batch_size=2, resolution=16, seed=1)
    real = next(iter(data.train_dataloader()))
    data.on_before_batch_transfer(real, 0)
    data.on_after_batch_transfer(real, 0)
    meta = data.meta_batch()
    assert meta.keys() == real.keys() - {"sample_number", "broken"}
    assert ("caption" in meta, "class_label" in meta) == (captions, classes)
    for name, value in meta.items():
        assert type(value) is type(real[name]), name
        if isinstance(value, torch.Tensor):
            assert value.is_meta
            assert (value.shape, value.dtype) == (real[name].shape, real[name].dtype)
    assert len(meta["draws"]) == len(real["draws"])


def test_of_several_captions_the_sample_number_chooses_one():
    """As a latent cache's batches do, and in validation the same in every run."""
    pictures = CaptionedPictures(12)
    seen = {}
    for seed in (3, 3, 4):
        data = ImageDataModule(pictures, batch_size=4, resolution=16, seed=seed, num_validation=3)
        seen.setdefault(seed, []).append([batch["caption"] for batch in data.val_dataloader()])
        items = KeyedBijection()(seed, 9)
        for batch in itertools.islice(data.train_dataloader(), 9):
            for number, caption in zip(batch["sample_number"].tolist(), batch["caption"], strict=True):
                several = data.train_dataset.captions(items([number])[0])
                assert caption == several[int(chosen(seed, [number], [len(several)])[0])]
    assert seen[3][0] == seen[3][1] == seen[4][0]


def test_an_item_of_several_captions_without_any_is_broken():
    dataset = TransformedDataset(CaptionedPictures(4, captions=[[]] + [["a"]] * 3), EvalTransform(8), 3, 8, 0)
    row = dataset[0, 0]
    assert row["caption"] == "a"
    assert row["broken"] == {0: "memory/0.png: has no caption"}
