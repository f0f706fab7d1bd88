"""Stage 2's data: the cache is built or checked by itself, and a batch is a function of seed and sample number."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from ldm.autoencoder.codec import Codec
from ldm.checkpoints import store
from ldm.data.datamodule import VALIDATION_SEED
from ldm.data.dataset import Subset, has_captions
from ldm.data.fingerprint import parts
from ldm.data.sources.folder import ImageFolder
from ldm.data.transforms import EvalTransform
from ldm.errors import CheckpointError, ConfigError, DataError, ResourceError
from ldm.latents.datamodule import LatentDataModule
from ldm.latents.manifest import Manifest
from ldm.randomness import Draws, bijected


class Pictures:
    """A data set in memory: `number` RGB pictures of 20 x 24 noise."""

    num_classes = 3
    class_names = ("cat", "dog", "Ankle boot")

    def __init__(self, number: int, broken: tuple[int, ...] = (), captions: bool = False, salt: int = 0) -> None:
        self.number, self.broken, self.captions, self.salt = number, broken, captions, salt
        self.class_names = list(self.class_names)
        self.prepared = 0

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        if index in self.broken:
            raise DataError(f"{self.path(index)}: cannot be read")
        noise = np.random.default_rng([self.salt, index]).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        item = {"image": Image.fromarray(noise), "class_label": index % 3}
        return {**item, "caption": f"picture {index}"} if self.captions else item

    def path(self, index):
        return f"memory/{index}.png"

    def fingerprint(self):
        return f"{self.number} {self.salt} {self.captions}"

    def prepare(self):
        self.prepared += 1


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Default caches go to a folder of the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def make(runs):
    def make(train=None, **params):
        defaults = {"autoencoder": str(runs.autoencoder), "batch_size": 4, "resolution": 16, "seed": 3}
        return LatentDataModule(train or Pictures(10), **{**defaults, **params})

    return make


@pytest.fixture
def codec(runs):
    return Codec.load(runs.autoencoder)


def first(loader, number):
    return [batch for _, batch in zip(range(number), loader, strict=False)]


def latents_of(module, codec, items, mirrored):
    """Moments (N,2,c,h,w) of the pictures, encoded here and now."""
    images = torch.stack([EvalTransform(16)(module.train_dataset[item]["image"]) for item in items])
    flipped = torch.where(torch.as_tensor(mirrored)[:, None, None, None], images.flip(-1), images)
    return torch.stack(codec.encode(flipped), 1)


def test_facts_need_no_cache(make, runs, here):
    data = make()
    assert data.facts() == {
        "channels": 4,
        "resolution": 4,
        "num_classes": 3,
        "batch_size": 4,
        "num_items": 10,
        "source": data.train_dataset.fingerprint(),
        "down_factor": 4,
        "image_resolution": 16,
        "image_channels": 3,
        "autoencoder": Codec.load(runs.autoencoder).weight_hash(),
    }
    assert make(autoencoder=None).facts()["autoencoder"] is None
    assert not list(here.glob("cache/*"))


def test_the_resolution_is_the_autoencoder_s_unless_given(make, runs, here):
    with pytest.raises(ConfigError, match=r"data.params.resolution: .* does not state its resolution"):
        make(resolution=None).facts()
    assert make(resolution=None, transform=EvalTransform(8)).facts()["image_resolution"] == 8
    state = store.load(store.verify(runs.autoencoder).path)
    state["ldm"]["config"]["data"] = {"params": {"resolution": 32}}
    store.save(here / "known.ckpt", state)
    assert make(resolution=None, autoencoder=here / "known.ckpt").facts()["resolution"] == 8


def test_a_missing_autoencoder_is_an_error(make):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        make(autoencoder="logs/none").facts()


def test_a_batch_is_standardized_draws_from_the_posteriors(make, codec):
    module = make()
    module.setup("fit")
    (batch,) = first(module.train_dataloader(), 1)
    batch = module.on_after_batch_transfer(batch, 0)
    numbers = np.arange(4)
    items = bijected(3, 10, range(4))
    draws = Draws(3, numbers, 4)
    mean, std = latents_of(module, codec, items, draws.uniform("flip") < 0.5).unbind(1)
    # The module has no trainer here, so it takes the draws of validation.
    noise = Draws(VALIDATION_SEED, numbers, 4).normal("posterior", (4, 4, 4))
    torch.testing.assert_close(batch["latent"], module.manifest.standardize(mean + std * noise), atol=5e-3, rtol=5e-3)
    assert batch["latent"].dtype == torch.float32
    assert batch["class_label"].tolist() == (items % 3).tolist()
    assert batch["draws"].numbers.tolist() == numbers.tolist()
    assert set(batch) == {"latent", "class_label", "draws"}


def test_flip_can_be_off(make, codec):
    module = make(flip=False)
    module.setup()
    for step, batch in enumerate(first(module.train_dataloader(), 3)):
        numbers = range(4 * step, 4 * step + 4)
        items = bijected(3, 10, numbers)
        expected = latents_of(module, codec, items, [False] * 4)
        torch.testing.assert_close(batch["moments"].float(), expected, atol=2e-3, rtol=2e-3)


def encoded(monkeypatch, module):
    """How many pictures are encoded while a module sets up."""
    seen, encode = [], Codec.encode
    with monkeypatch.context() as patch:
        patch.setattr(Codec, "encode", lambda self, images: seen.append(len(images)) or encode(self, images))
        module.setup()
    return sum(seen)


def test_only_what_a_run_sees_is_encoded(make, here, monkeypatch):
    parts = {"train": Pictures(10), "validation": Pictures(4, salt=1)}
    assert encoded(monkeypatch, make(**parts, flip=False)) == 10 + 4
    assert encoded(monkeypatch, make(**parts, flip=True)) == 2 * 10
    assert encoded(monkeypatch, make(**parts, flip=False)) == 0
    assert len([*here.glob("cache/*")]) == 3


def test_a_cache_with_mirror_images_serves_who_sees_none(make, here, monkeypatch):
    mirrored = make(cache="here")
    assert encoded(monkeypatch, mirrored) == 20
    plain = make(cache="here", flip=False)
    assert encoded(monkeypatch, plain) == 0
    assert plain.manifest == mirrored.manifest
    make(Pictures(10, salt=1), cache="other", flip=False).setup()
    with pytest.raises(DataError, match="mirrored: expected True, found False"):
        make(Pictures(10, salt=1), cache="other").setup()


def test_a_run_that_goes_on_keeps_the_scale_of_its_latents(make):
    began, now, others = make(cache="here"), make(cache="plain", flip=False), make(Pictures(10, salt=1), cache="others")
    for module in (began, now, others):
        module.setup()
    own = now.manifest
    assert own.statistics != began.manifest.statistics
    now.keep_scale(others.manifest)
    assert now.manifest == own
    now.keep_scale(began.manifest)
    assert now.manifest == own.standardized_by(began.manifest.statistics)
    latents = torch.randn(2, 4, 4, 4)
    assert torch.equal(now.manifest.standardize(latents), began.manifest.standardize(latents))


def test_the_mirrored_half_of_a_cache_is_the_encoding_of_the_mirrored_picture(make, codec, here):
    module = make(resolution=[12, 20])
    module.setup()
    assert module.manifest.plan.shape == (4, 3, 5)
    assert json.loads(next(here.glob("cache/*/plan.json")).read_text())["pixels"]["resolution"] == [12, 20]
    transform = EvalTransform([12, 20])
    pixels = torch.stack([transform(module.train_dataset[item]["image"]) for item in range(10)])
    for side, images in enumerate((pixels, pixels.flip(-1))):
        stored, _ = module.caches["train"][0].gather(range(10), np.full(10, bool(side)))
        expected = torch.stack(codec.encode(images), 1)
        torch.testing.assert_close(torch.from_numpy(stored).float(), expected, atol=2e-3, rtol=2e-3)
    facts = module.facts()
    assert (facts["resolution"], facts["image_resolution"]) == ([3, 5], [12, 20])
    assert module.meta_batch()["latent"].shape == (2, 4, 3, 5)
    assert next(iter(module.train_dataloader()))["moments"].shape == (4, 2, 4, 3, 5)


def test_a_square_written_as_two_numbers_has_the_cache_of_one(make, here):
    for resolution in (16, [16, 16]):
        make(resolution=resolution).setup()
    assert len([*here.glob("cache/*")]) == 1


def test_pictures_that_the_autoencoder_cannot_read_are_refused_before_the_cache(make, here):
    class Infrared(Pictures):
        def channel_choices(self):
            return (5,)

    with pytest.raises(ConfigError, match=r"data.params.autoencoder: .* 3 channels, .*memory/0.png.* can have 5"):
        make(Infrared(10)).facts()
    with pytest.raises(ConfigError, match=r"data.params.channels: .* 3 channels"):
        make(Infrared(10), autoencoder=None).setup()
    assert make(Infrared(10), autoencoder=None, channels=5).facts()["channels"] == 5
    assert not any(here.glob("cache/*"))


def test_captions_come_along(make):
    module = make(Pictures(10, captions=True))
    module.setup()
    (batch,) = first(module.train_dataloader(), 1)
    assert batch["caption"] == [f"picture {item}" for item in bijected(3, 10, range(4))]


def test_validation_is_the_same_whatever_the_seed_and_never_mirrored(make, codec):
    batches = {}
    for seed in (1, 2):
        module = make(Pictures(12), num_validation=5, seed=seed)
        module.setup()
        batches[seed] = [module.on_after_batch_transfer(batch, 0) for batch in module.val_dataloader()]
    assert sum(len(batch["latent"]) for batch in batches[1]) == 5
    for one, two in zip(batches[1], batches[2], strict=True):
        assert torch.equal(one["latent"], two["latent"])
    mean = torch.cat([batch["latent"] for batch in batches[1]])
    held_out = module.validation_dataset
    order = np.concatenate([batch["draws"].numbers for batch in batches[1]])
    assert sorted(order) == list(range(5))
    images = torch.stack([EvalTransform(16)(held_out[int(item)]["image"]) for item in order])
    plain, std = codec.encode(images)
    noise = Draws(VALIDATION_SEED, order, 4).normal("posterior", (4, 4, 4))
    # Whitened by the statistics of training: a validation set has none of its own.
    torch.testing.assert_close(mean, module.manifest.standardize(plain + std * noise), atol=5e-3, rtol=5e-3)


def test_without_validation_there_is_no_loader(make):
    module = make()
    module.setup()
    assert module.val_dataloader() == []


def test_before_setup_there_is_a_clear_error(make):
    with pytest.raises(DataError, match="not open yet"):
        make().train_dataloader()


def test_the_source_is_made_ready_first(make):
    module = make(Pictures(8), validation=Pictures(4))
    module.prepare_data()
    assert (module.train_dataset.prepared, module.validation_dataset.prepared) == (1, 1)


def test_a_second_run_reads_the_cache_and_encodes_nothing(make, here, monkeypatch):
    make(num_validation=2).setup()
    monkeypatch.setattr(Codec, "encode", lambda *args: pytest.fail("encoded again"))
    module = make(num_validation=2, seed=8, batch_size=2)
    module.setup()
    assert len(list((here / "cache").iterdir())) == 2
    assert module._codec is None


def test_by_default_caches_of_other_content_lie_side_by_side(make, here, other_autoencoder):
    changes = ({}, {"autoencoder": other_autoencoder}, {"resolution": 8}, {"train": Pictures(10, salt=1)})
    for number, change in enumerate(changes, start=1):
        make(**change).setup()
        assert len(list((here / "cache").iterdir())) == number


def as_written_once(self):
    """The fingerprint of an image folder before contents were part of it."""
    return parts(fingerprint(self))[0]


fingerprint = ImageFolder.fingerprint


def test_replaced_pictures_get_a_cache_of_their_own(make, here, image_folder, caplog):
    folder = shutil.copytree(image_folder, here / "pictures")
    make(ImageFolder(folder)).setup()
    path = folder / "dogs" / "1.png"
    make(ImageFolder(shutil.copytree(folder, here / "copy", copy_function=shutil.copyfile))).setup()
    assert len(list((here / "cache").iterdir())) == 1
    path.write_bytes(bytes(path.stat().st_size))
    make(ImageFolder(folder), max_broken=0.1).setup()
    assert len(list((here / "cache").iterdir())) == 2
    make(ImageFolder(here / "copy"), cache="mine").setup()
    with pytest.raises(DataError, match=r"(?s)mine/train: .*\n  source: expected ':contents:\w+', found ':contents"):
        make(ImageFolder(folder), cache="mine").setup()


def test_replaced_validation_pictures_are_noticed(make, here, image_folder):
    folder = shutil.copytree(image_folder, here / "pictures")
    before = make(ImageFolder(image_folder), validation=ImageFolder(folder), cache="mine")
    before.setup()
    path = folder / "dogs" / "1.png"
    path.write_bytes(bytes(path.stat().st_size))
    after = make(ImageFolder(image_folder), validation=ImageFolder(folder), cache="mine")
    assert {key for key, fact in after.facts().items() if before.facts()[key] != fact} == {"validation_source"}
    with pytest.raises(DataError, match=r"(?s)mine/validation: .*\n  source: expected ':contents:\w+', found ':conten"):
        after.setup()


def files_of(here: Path) -> set[str]:
    return {str(path.relative_to(here)) for path in here.rglob("*") if path.is_file() and "pictures" not in path.parts}


@pytest.mark.parametrize("cache", [None, "mine"])
def test_a_cache_from_before_contents_were_noted_goes_on(make, here, image_folder, monkeypatch, caplog, cache):
    folder = shutil.copytree(image_folder, here / "pictures")
    with monkeypatch.context() as then:
        then.setattr(ImageFolder, "fingerprint", as_written_once)
        make(ImageFolder(folder), num_validation=4, cache=cache).setup()
    before = files_of(here)
    for _ in range(2):
        with monkeypatch.context() as now:
            now.setattr(Codec, "encode", lambda *args: pytest.fail("encoded again"))
            module = make(ImageFolder(folder), num_validation=4, cache=cache)
            module.setup()
        assert len(module.caches["train"][0]) == 16
        new = files_of(here) - before
        assert [Path(file).name for file in new] == ["contents.json"] * 2
        # Said when it is found, and not again.
        assert caplog.text.count("was made when only names and sizes of the images were recorded") == 2
    path = folder / "dogs" / "1.png"
    path.write_bytes(bytes(path.stat().st_size))
    module = make(ImageFolder(folder), num_validation=4, cache=cache, max_broken=0.2)
    if cache is None:
        module.setup()
        assert len(list((here / "cache").iterdir())) == 4
    else:
        with pytest.raises(
            DataError, match=r"(?s)mine/train: .*\n  source: expected ':contents:\w+', found ':contents"
        ):
            module.setup()


def test_an_old_cache_that_cannot_be_written_serves(make, image_folder, monkeypatch):
    with monkeypatch.context() as then:
        then.setattr(ImageFolder, "fingerprint", as_written_once)
        make(ImageFolder(image_folder)).setup()

    def refuse(*args):
        raise ResourceError("read-only")

    monkeypatch.setattr("ldm.latents.places.publish", refuse)
    make(ImageFolder(image_folder)).setup()


def test_a_value_range_is_part_of_what_a_cache_was_made_of(make, here, image_folder):
    """With none, the cache is the one that it always was."""
    make(ImageFolder(image_folder), cache="mine").setup()
    with pytest.raises(DataError, match=r"mine/train: .*\n  source: expected"):
        make(ImageFolder(image_folder, value_range=[0, 4095]), cache="mine").setup()


@pytest.mark.parametrize("num_validation", [0, 4])
def test_a_manifest_says_how_its_pictures_were_decoded(make, image_folder, monkeypatch, num_validation):
    folder = ImageFolder(image_folder, value_range=[0, 4095])
    with monkeypatch.context() as then:  # as a cache was written before this was noted
        then.setattr(ImageFolder, "decoding", lambda self: {})
        before = make(folder, num_validation=num_validation, cache="mine")
        before.setup()
    assert "value_range" not in before.manifest.plan.pixels
    after = make(folder, num_validation=num_validation, cache="mine")
    after.setup()  # it goes on
    plan, former = (module._encoding().plan(*module._sources().sized("train")) for module in (after, before))
    assert plan.pixels["value_range"] == [0, 4095]
    assert plan.fingerprint() == former.fingerprint()


def test_names_that_are_not_utf_8_from_the_folder_to_the_checkpoint(make, here):
    name = os.fsdecode(b"caf\xe9")
    for number in range(10):
        path = here / "data" / (name if number % 2 else "tea") / f"{name}{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 0, 0)).save(path)
    path.write_text("broken")
    module = make(ImageFolder(here / "data"), max_broken=0.1, cache=name)
    module.setup()
    first(module.train_dataloader(), 1)
    assert module.manifest.plan.class_names == [name, "tea"]
    assert len(module.sources(range(9))) == 9
    module = make(ImageFolder(here / "data"), max_broken=0.1, cache=name)
    module.setup()
    store.save(here / "x.ckpt", {"ldm": {"latents": module.manifest.to_dict()}})
    assert Manifest.from_dict(store.load(here / "x.ckpt")["ldm"]["latents"]) == module.manifest


def test_pictures_of_more_than_eight_bits_are_broken_not_cut_off(make):
    class Wide(Pictures):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "image": Image.fromarray(np.zeros((20, 24), dtype=np.uint16))}

    with pytest.raises(DataError, match=r"memory/0\.png: expected pixels of 8 bits"):
        make(Wide(10)).setup()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"autoencoder": "other"}, "autoencoder.weights"),
        ({"resolution": 8}, "pixels.resolution"),
        ({"transform": EvalTransform(16, "nearest")}, "pixels.interpolation"),
        ({"train": Pictures(11)}, "num_items"),
        ({"train": Pictures(10, salt=1)}, "source"),
    ],
)
def test_a_cache_asked_for_by_name_is_refused_when_stale(make, here, other_autoencoder, change, key):
    make(cache="mine").setup()
    if "autoencoder" in change:
        change = {"autoencoder": other_autoencoder}
    with pytest.raises(DataError, match=rf"(?s)mine/train: .*\n  {key}: expected .*data.params.cache"):
        make(cache="mine", **change).setup()


def test_broken_images_are_left_out_up_to_a_limit(make):
    with pytest.raises(DataError, match=r"1 items could not be read, 0 are allowed"):
        make(Pictures(10, broken=(6,))).setup()
    module = make(Pictures(10, broken=(6,)), max_broken=0.1)
    module.setup()
    assert module.manifest.broken == [6]
    labels = torch.cat([batch["class_label"] for batch in first(module.train_dataloader(), 9)])
    assert sorted(labels.tolist()) == sorted(4 * [item % 3 for item in range(10) if item != 6])


def test_a_class_without_a_readable_picture_is_named(make, here, caplog):
    for number in range(12):
        file = here / "data" / f"class {max(0, number - 8)}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 0, 0)).save(file)
    for name in ("class 0/1.png", "class 2/10.png"):
        (here / "data" / name).write_bytes(b"damaged")
    make(ImageFolder(here / "data"), max_broken=0.2).setup()
    assert "could be read, so they are missing from training: class 2; fix them" in caplog.text


def test_sample_numbers_lead_to_their_files(make):
    module = make(Pictures(10, broken=(6,)), max_broken=0.1)
    module.setup()
    batches = first(module.train_dataloader(), 4)
    for batch in batches:
        files = [file for number in batch["sample_number"].tolist() for file in module.sources([number])]
        assert [int(Path(file).stem) % 3 for file in files] == batch["class_label"].tolist()
    assert len(module.sources(range(9))) == 9
    assert "memory/6.png" not in module.sources(range(9))


def test_grey_autoencoders_get_grey_images(make_runs):
    grey = make_runs(channels=1)
    module = LatentDataModule(Pictures(6), grey.autoencoder, batch_size=2, resolution=16)
    module.setup()
    assert module.facts()["image_channels"] == module.manifest.plan.pixels["channels"] == 1


class Recorder(pl.LightningModule):
    """Keeps the latents it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch["latent"].clone(), batch["draws"].numbers.tolist()))
        return self.weight * batch["latent"].mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, steps, path: Path, resume: Path | None = None) -> list:
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        accumulate_grad_batches=module.accumulation(1),
    )
    trainer.fit(recorder, datamodule=module, ckpt_path=resume)
    trainer.save_checkpoint(path)
    return recorder.seen


@pytest.mark.parametrize(("workers", "micro"), [(0, None), (2, 2)])
def test_seven_steps_are_three_and_four_after_a_resume(make, here, workers, micro):
    params = {"num_workers": workers, "micro_batch_size": micro}
    straight = fit(make(**params), 7, here / "a.ckpt")
    begun = fit(make(**params), 3, here / "b.ckpt")
    resumed = fit(make(**params), 7, here / "c.ckpt", here / "b.ckpt")
    assert [number for _, numbers in straight for number in numbers] == list(range(28))
    assert len(begun) + len(resumed) == len(straight)
    for (one, numbers), (other, others) in zip(straight, begun + resumed, strict=True):
        assert torch.equal(one, other)
        assert numbers == others


def test_the_manifest_can_go_into_a_checkpoint(make, here):
    module = make()
    module.setup()
    store.save(here / "x.ckpt", {"ldm": {"latents": module.manifest.to_dict()}})
    assert Manifest.from_dict(store.load(here / "x.ckpt")["ldm"]["latents"]) == module.manifest


def test_a_log_file_hears_of_the_building_now_and_then(make, here, capsys, monkeypatch):
    monkeypatch.setattr("ldm.runtime.progress.LOG_SECONDS", 0.0)
    make(encode_batch_size=2).setup()
    assert re.search(r"^train latents: 4/10  0:\d\d elapsed, 0:\d\d left$", capsys.readouterr().out, re.MULTILINE)


def test_meta_batch_has_the_keys_and_the_shapes_of_a_real_one(make, here):
    data = make()
    meta = data.meta_batch(rows=4)
    assert not list(here.glob("cache/*"))  # it needs none
    data.setup()
    (real,) = first(data.train_dataloader(), 1)
    data.on_after_batch_transfer(real, 0)
    assert meta.keys() == real.keys() - {"sample_number"}
    for name in ("latent", "class_label"):
        assert meta[name].is_meta
        assert (meta[name].shape, meta[name].dtype) == (real[name].shape, real[name].dtype)


@pytest.mark.parametrize("captions", [True, False])
def test_captions_are_seen_behind_any_number_of_broken_items(captions):
    """They decide which cache it is, and a data set of others need not say whether it has some."""
    pictures = Pictures(100, broken=tuple(range(99)), captions=captions)
    assert has_captions(pictures) == has_captions(Subset(pictures, [98, 99])) == captions
