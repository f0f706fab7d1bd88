"""The data module of stage 1 with buckets: batches of one size, the clock with batches of several lengths, resumes."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import LightningModule, Trainer

from ldm.data.buckets import Buckets
from ldm.data.datamodule import VALIDATION_SEED, ImageDataModule
from ldm.data.sources.folder import ImageFolder
from ldm.data.transforms import EvalTransform, TrainTransform
from ldm.errors import ConfigError
from ldm.randomness import Draws
from tests.many_sizes import SHAPES, SIZES

CPU_TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "use_distributed_sampler": False,
    "check_val_every_n_epoch": None,
    "val_check_interval": 1000,
    "num_sanity_val_steps": 1,
}


class Recorder(LightningModule):
    """Keeps, by sample number, what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[int, tuple] = {}
        self.batches: list[tuple] = []
        self.validated: list[int] = []

    def training_step(self, batch, batch_index):
        images, draws = batch["image"], batch["draws"]
        columns = images.mean((1, 2, 3)), draws.normal("noise", (2,)), draws.stratified("timestep")
        for number, *row in zip(draws.numbers.tolist(), *(column.tolist() for column in columns), strict=True):
            assert number not in self.seen
            self.seen[number] = (*row, batch["class_label"][0].dtype)
        self.batches.append((self.trainer.global_step, tuple(images.shape[2:]), draws.batch_size, len(draws)))
        return (self.weight - images.mean()) ** 2

    def validation_step(self, batch, batch_index):
        self.validated += batch["draws"].numbers.tolist()
        assert batch["draws"].seed == VALIDATION_SEED

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def make(many_sizes):
    def build(tokens: bool = False, **options) -> ImageDataModule:
        buckets = Buckets(**SIZES, min_items=1, constant_tokens=tokens, batch_multiple=2)
        options = {"batch_size": 4, "seed": 3, "num_validation": 6, "buckets": buckets} | options
        return ImageDataModule(ImageFolder(many_sizes), **options)

    return build


@pytest.fixture
def fit(make):
    def run(steps: int, checkpoint=None, micro: int | None = None, **options) -> tuple[Recorder, Trainer]:
        data, recorder = make(micro_batch_size=micro, **options), Recorder()
        trainer = Trainer(max_steps=steps, accumulate_grad_batches=data.accumulation(1), **CPU_TRAINER)
        trainer.fit(recorder, data, ckpt_path=checkpoint)
        return recorder, trainer

    return run


def test_facts_and_shapes(make):
    data = make()
    facts = data.facts()
    assert sum(items for _, items, _ in facts["buckets"]) == facts["num_items"] == len(SHAPES) - 6
    assert {tuple(size) if isinstance(size, list) else size for size, _, _ in facts["buckets"]} == {
        16,
        (8, 16),
        (16, 8),
    }
    assert {batch for _, _, batch in facts["buckets"]} == {4}
    shapes = [tuple(batch["image"].shape) for batch in data.meta_batches(rows=3)]
    assert shapes[0] == tuple(data.meta_batch(3)["image"].shape) == (3, 3, *data.size)
    assert sorted(shapes) == [(3, 3, 8, 16), (3, 3, 16, 8), (3, 3, 16, 16)]


@pytest.mark.parametrize("tokens", [False, True])
def test_a_batch_is_of_one_size_and_numbers_are_contiguous(fit, tokens):
    recorder, trainer = fit(40, tokens=tokens)
    sizes = {size: batch for _, size, batch, _ in recorder.batches}
    assert sizes == {(16, 16): 4, (16, 8): 8 if tokens else 4, (8, 16): 8 if tokens else 4}
    assert sorted(recorder.seen) == list(range(sum(length for *_, length in recorder.batches)))
    assert trainer.datamodule.images_seen == len(recorder.seen)
    assert trainer.datamodule.state_dict() == {"images_seen": len(recorder.seen), "step": 40}


def test_images_are_cropped_to_their_bucket(make, many_sizes):
    data = make(num_validation=0, transform=EvalTransform, batch_size=8)
    batch = next(iter(data.train_dataloader()))
    numbers = batch["sample_number"].tolist()
    dataset = ImageFolder(many_sizes)
    for number, pixels in zip(numbers, batch["image"], strict=True):
        (path,) = data.sources([number])
        item = next(item for item in range(len(dataset)) if dataset.path(item) == path)
        torch.testing.assert_close(pixels, EvalTransform(tuple(pixels.shape[1:]))(dataset[item]["image"]))


@pytest.mark.parametrize("tokens", [False, True])
def test_times_are_stratified_over_each_global_batch(fit, tokens):
    recorder, _ = fit(12, tokens=tokens)
    first = 0
    for _, _, batch, length in recorder.batches:
        assert batch == length
        times = sorted(recorder.seen[number][2] for number in range(first, first + length))
        assert np.allclose(np.diff(times), 1 / length, atol=1e-6)
        first += length


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("at", [1, 5, 8])
def test_resumed_and_in_other_pieces_it_is_the_same_run(fit, tmp_path, tokens, at):
    whole, _ = fit(12, tokens=tokens)
    begun, trainer = fit(at, tokens=tokens, micro=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(12, tokens=tokens, checkpoint=tmp_path / "half.ckpt", num_workers=2)
    assert begun.seen.keys().isdisjoint(resumed.seen)
    assert {**begun.seen, **resumed.seen} == whole.seen
    assert [row for row in whole.batches if row[0] >= at] == resumed.batches


def test_another_batch_size_goes_on_from_the_images_seen(fit, tmp_path):
    begun, trainer = fit(5, tokens=True)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    second, trainer = fit(9, tokens=True, batch_size=6, checkpoint=tmp_path / "first.ckpt")
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    third, trainer = fit(14, tokens=True, batch_size=6, checkpoint=tmp_path / "second.ckpt")
    straight, _ = fit(14, tokens=True, batch_size=6, checkpoint=tmp_path / "first.ckpt")
    assert sorted([*begun.seen, *second.seen, *third.seen]) == list(range(trainer.datamodule.images_seen))
    assert {**second.seen, **third.seen} == straight.seen


def test_validation_shows_each_item_once(make):
    recorder = Recorder()
    Trainer(**CPU_TRAINER).validate(recorder, make(), verbose=False)
    assert sorted(recorder.validated) == list(range(6))


def test_the_table_is_shown_at_the_start(make, caplog):
    with caplog.at_level(logging.INFO):
        make().train_dataloader()
    assert any("height x width" in record.getMessage() for record in caplog.records)


def test_an_unreadable_image_gives_way_to_one_of_its_bucket(many_sizes, tmp_path):
    for index, file in enumerate(sorted(many_sizes.rglob("*.png"))):
        (tmp_path / f"{index:02}.png").write_bytes(file.read_bytes())
    dataset = ImageFolder(tmp_path)
    known = dataset.sizes()
    broken = int(np.flatnonzero((known == (16, 32)).all(1))[0])
    (tmp_path / f"{broken:02}.png").write_bytes(b"no picture")
    dataset.sizes = lambda: known
    data = ImageDataModule(dataset, batch_size=4, buckets=Buckets(**SIZES), max_broken=0.1)
    rows = [row for row in range(len(dataset)) if data.bucketing.train.item(row) == broken]
    view = data.train_dataloader().dataset
    found = view[0, rows[0]]
    assert list(found["broken"]) == [broken]
    assert found["image"].shape == (3, 8, 16)


def test_transforms_of_every_size(make, many_sizes):
    data = make(transform=lambda size: TrainTransform(size, flip=0.0))
    assert data.transform(Image.new("RGB", (50, 70))).shape == (3, *data.size)
    assert isinstance(data.eval_transform, EvalTransform)


def test_one_resolution_or_buckets(make):
    with pytest.raises(ConfigError, match="either `resolution` or `buckets`"):
        make(resolution=16)
    with pytest.raises(ConfigError, match="either `resolution` or `buckets`"):
        make(buckets=None)


def test_batches_that_cannot_be_shared(make):
    sizes = Buckets(sizes=[16, [16, 10]], min_items=1, constant_tokens=True, batch_multiple=2)
    data = make(batch_size=12, buckets=sizes)
    assert data.bucketing.batch_sizes() == [12, 20]
    assert (data.accumulation(1), data.accumulation(2), data.accumulation(4)) == (1, 1, 1)
    assert make(batch_size=12, micro_batch_size=4, buckets=sizes).accumulation(1) == 4  # three would not divide 20
    with pytest.raises(ConfigError, match=r"batch_multiple: batches of 12, 20 images .* 3 ranks x 1 micro-batches"):
        data.accumulation(3)
    with pytest.raises(ConfigError, match=r"batch_size: the global batch of 12 cannot be divided among 5"):
        data.accumulation(5)


def test_draws_of_a_global_batch_that_starts_anywhere():
    draws = Draws(1, [10, 11, 12], 6, first=8)
    whole = Draws(1, range(8, 14), 6, first=8)
    assert torch.equal(draws.stratified("t"), whole.stratified("t")[2:5])
    assert torch.equal(whole[2:5].stratified("t"), draws.stratified("t"))
    assert np.allclose(np.diff(sorted(whole.stratified("t").tolist())), 1 / 6, atol=1e-6)
