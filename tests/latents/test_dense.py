"""Dense conditions in the batches of stage 2: in the orientation of the latents, drawn by sample number, resumed."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from ldm.autoencoder.codec import Codec
from ldm.data.buckets import Buckets
from ldm.data.datamodule import VALIDATION_SEED
from ldm.data.drawn import draw_rows
from ldm.data.transforms import EvalTransform
from ldm.errors import ConfigError, DataError
from ldm.images import to_uint8
from ldm.latents.aligned import Boxes, Map, Mask, Pair, Pixels
from ldm.latents.columns import Crop
from ldm.latents.datamodule import LatentDataModule
from ldm.latents.masked import MaskedLatents, filled
from ldm.latents.parts import verify
from ldm.randomness import Draws, bijected
from tests.latents.test_datamodule import first
from tests.tiny_dense import Blocks, Halved, Scenes

ALL = {"map": Map(), "boxes": Boxes(6), "image": Pixels(), "pair": Pair()}
DRAWN = {"low_resolution": Halved()}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def make(runs):
    def make(train=None, **params):
        defaults = {"autoencoder": str(runs.autoencoder), "batch_size": 4, "resolution": 16, "seed": 3}
        return LatentDataModule(train or Scenes(), **{**defaults, **params})

    return make


def seen(module, steps):
    """The batches of the first steps, as a model reads them."""
    return [module.on_after_batch_transfer(batch, 0) for batch in first(module.train_dataloader(), steps)]


def samples(module, steps):
    """(sample number, item, mirrored, batch, place) of each sample, with the seed of training."""
    for batch in seen(module, steps):
        numbers = batch["draws"].numbers
        mirrored = Draws(module.seed, numbers, 1).uniform("flip") < 0.5
        for place, number in enumerate(numbers.tolist()):
            length = len(module.train_dataset)
            item = int(bijected(module.seed, length, [number])[0])
            yield number, item, bool(mirrored[place]), batch, place


def side(rows, mirrored):
    return rows.flip(-1) if mirrored else rows


# ---- aligned and drawn -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_what_lies_on_a_picture_is_mirrored_with_it(make, workers):
    module = make(aligned=ALL, drawn=DRAWN, transform=EvalTransform(16, "nearest"), num_workers=workers)
    module.setup()
    crop, sides = Crop(module.transform, 3), set()
    for number, item, mirrored, batch, place in samples(module, 5):
        whole = module.train_dataset[item]
        picture = side(module.transform(whole["image"]), mirrored)
        assert torch.equal(batch["image"][place], picture)
        assert torch.equal(batch["map"][place], to_uint8(picture)[0]), "the map is the picture's red channel"
        assert torch.equal(batch["pair"][place], side(module.transform(whole["pair"]), mirrored))
        boxes = Boxes(6).row(whole, crop, "x")[0]
        there = batch["boxes_mask"][place]
        assert there.sum() == len(boxes)
        assert torch.equal(batch["boxes"][place][there], Boxes().mirrored(boxes) if mirrored else boxes)
        drawn = draw_rows("low_resolution", Halved(), {"image": to_uint8(picture)[None]}, 3, [number])
        assert torch.equal(to_uint8(batch["low_resolution"])[place], drawn[0])
        sides.add(mirrored)
    assert len(sides) == 2


def test_a_sample_is_drawn_anew_each_time(make):
    module = make(Scenes(4), aligned={"image": Pixels()}, drawn=DRAWN, flip=False)
    module.setup()
    by_item: dict[int, list] = {}
    for _, item, _, batch, place in samples(module, 4):
        by_item.setdefault(item, []).append(batch["low_resolution"][place])
    for rows in by_item.values():
        assert len({row.numpy().tobytes() for row in rows}) == 4


def test_validation_is_drawn_the_same_whatever_the_seed(make):
    found = []
    for seed in (1, 2):
        module = make(num_validation=4, seed=seed, aligned=ALL, drawn=DRAWN, masked=MaskedLatents(Blocks(), 2))
        module.setup()
        found.append([module.on_after_batch_transfer(batch, 0) for batch in module.val_dataloader()])
    for one, two in zip(*found, strict=True):
        numbers = one["draws"].numbers
        pictures = {"image": to_uint8(one["image"])}
        drawn = draw_rows("low_resolution", Halved(), pictures, VALIDATION_SEED, numbers)
        assert torch.equal(to_uint8(one["low_resolution"]), drawn)
        for name in ("map", "boxes", "low_resolution", "mask", "masked_latent"):
            assert torch.equal(one[name], two[name])


@pytest.mark.parametrize("variants", [2, None])
def test_meta_batch_has_the_keys_and_the_shapes_of_a_real_one(make, variants):
    module = make(aligned=ALL, drawn=DRAWN, masked=MaskedLatents(Blocks(), variants))
    meta = module.meta_batch(rows=4)
    assert not Path("cache").exists()
    module.setup()
    (real,) = seen(module, 1)
    assert meta.keys() == real.keys()
    for name, column in meta.items():
        if isinstance(column, torch.Tensor):
            assert column.is_meta
            assert (column.shape, column.dtype) == (real[name].shape, real[name].dtype), name


def test_without_them_all_is_as_it_was(make):
    module = make()
    module.setup()
    assert {path.name for path in Path("cache").iterdir()} == {module.caches["train"][0].plan.fingerprint()}
    (batch,) = first(module.train_dataloader(), 1)
    assert set(batch) == {"moments", "sample_number", "class_label"}
    assert set(module.on_after_batch_transfer(batch, 0)) == {"latent", "draws", "class_label"}
    assert not {"aligned", "drawn", "masked"} & module.facts().keys()


def test_latents_are_the_same_with_and_without(make):
    plain, dense = make(), make(aligned=ALL, drawn=DRAWN, masked=MaskedLatents(Blocks(), 2))
    batches = []
    for module in (plain, dense):
        module.setup()
        batches.append(seen(module, 4))
    assert plain.caches["train"][0].folder == dense.caches["train"][0].folder
    for one, two in zip(*batches, strict=True):
        assert torch.equal(one["latent"], two["latent"])


def test_facts_say_what_it_is(make):
    facts = make(aligned=ALL, drawn=DRAWN, masked=MaskedLatents(Blocks(), 2)).facts()
    assert facts["aligned"]["boxes"] == {"what": "boxes", "most": 6}
    assert facts["drawn"] == {"low_resolution": {"what": "halved"}}
    assert facts["masked"] == {"masks": {"what": "blocks", "salt": 0}, "variants": 2}


def test_in_a_folder_of_their_own_they_have_names(make):
    module = make(aligned=ALL, masked=MaskedLatents(Blocks(), 2), num_validation=3, cache="mine")
    module.setup()
    names = {path.name for path in Path("mine").iterdir()}
    own = [f"-{name}" for name in (*ALL, "masked")]
    assert names == {f"{one}{part}" for one in ("train", "validation") for part in ("", *own)}
    for name in names:
        verify(Path("mine") / name)
    assert "mine/train-boxes: boxes, 7 items, 0 broken" in "\n".join(module.described())


def test_broken_items_are_in_no_batch(make):
    changes = {4: {"map": np.zeros((3, 3), np.uint8)}}
    with pytest.raises(DataError, match=r"1 items could not be read, 0 are allowed:\n  memory/4.png: map: expected"):
        make(Scenes(changes=changes), aligned=ALL).setup()
    module = make(Scenes(changes=changes, broken=(7,)), aligned=ALL, max_broken=0.2)
    module.setup()
    rows = module.train_dataloader().dataset
    assert sorted(rows.items(range(len(rows)))) == [item for item in range(10) if item not in (4, 7)]


# ---- masked latents ----------------------------------------------------------------------------------------------


def test_masked_latents_are_those_of_the_picture_with_gray_in_the_hole(make, runs):
    codec = Codec.load(runs.autoencoder)
    module = make(aligned={"image": Pixels()}, masked=MaskedLatents(Blocks(), 3))
    module.setup()
    found: dict[int, set] = {}
    for _, item, mirrored, batch, place in samples(module, 30):
        mask = batch["mask"][place : place + 1]
        assert (mask.shape, mask.dtype) == ((1, 1, 16, 16), torch.float32)
        mean, _ = codec.encode(filled(batch["image"][place : place + 1], mask, 0.0))
        expected = module.manifest.standardize(mean)
        torch.testing.assert_close(batch["masked_latent"][place : place + 1], expected, atol=5e-3, rtol=5e-3)
        found.setdefault(item, set()).add(side(mask, mirrored).numpy().tobytes())
    assert {len(masks) for masks in found.values()} <= {2, 3}, "of some items two masks are empty"
    assert max(map(len, found.values())) == 3


def test_masks_of_the_items_are_read(make, runs):
    codec, module = Codec.load(runs.autoencoder), make(masked=MaskedLatents())
    module.setup()
    for _, item, mirrored, batch, place in samples(module, 4):
        whole, crop = module.train_dataset[item], Crop(module.transform, 3)
        mask = side(Mask().placed(Mask().row(whole, crop, "x")[0]), mirrored)
        assert torch.equal(batch["mask"][place], mask)
        picture = side(module.transform(whole["image"]), mirrored)
        expected = module.manifest.standardize(codec.encode(filled(picture[None], mask[None], 0.0))[0])
        torch.testing.assert_close(batch["masked_latent"][place : place + 1], expected, atol=5e-3, rtol=5e-3)


def test_in_the_loop_a_mask_is_drawn_for_each_sample(make, runs):
    codec = Codec.load(runs.autoencoder)
    module = make(Scenes(4), aligned={"image": Pixels()}, masked=MaskedLatents(Blocks()), flip=False)
    module.setup()
    masks = set()
    for number, _, _, batch, place in samples(module, 8):
        mask = draw_rows("mask", Blocks(), {"image": to_uint8(batch["image"][place : place + 1])}, 3, [number])
        assert torch.equal(batch["mask"][place : place + 1], (mask > 0).float())
        mean, _ = codec.encode(filled(batch["image"][place : place + 1], mask, 0.0))
        torch.testing.assert_close(batch["masked_latent"][place : place + 1], module.manifest.standardize(mean))
        masks.add(mask.numpy().tobytes())
    assert len(masks) > 16


def test_without_flips_masked_pictures_are_encoded_once_unless_both_orientations_are_there(make, monkeypatch):
    encode, seen = Codec.encode, []
    monkeypatch.setattr(Codec, "encode", lambda self, images: seen.append(len(images)) or encode(self, images))

    def rows(cache, flip):
        seen.clear()
        module = make(Scenes(4), masked=MaskedLatents(Blocks(), 2), cache=cache, flip=flip)
        module.setup()
        dense = module._rows["train"].dense
        assert sum(seen) in (0, 3 * 4 * (2 if flip else 1))  # the picture, and two masks of it
        drawn = [dense.gather(np.arange(4), np.arange(4 * n, 4 * n + 4), np.zeros(4, bool), 3) for n in range(3)]
        return drawn, sum(seen)

    both, plain = rows("both", True), rows("plain", False)
    assert (both[1], plain[1]) == (24, 12)
    assert rows("both", False)[1] == 0
    for found in (plain, rows("both", False)):
        for ours, theirs in zip(found[0], both[0], strict=True):
            assert torch.equal(ours["mask"], theirs["mask"])
            torch.testing.assert_close(ours["masked_latent"], theirs["masked_latent"], atol=2e-3, rtol=2e-3)
    with pytest.raises(DataError, match=r"(?s)plain/train-masked: this part .*\n  feature.mirrored: expected"):
        make(Scenes(4), masked=MaskedLatents(Blocks(), 2), cache="plain").setup()


def test_another_autoencoder_or_generator_makes_another_part(make, other_autoencoder):
    make(masked=MaskedLatents(Blocks(), 2), cache="mine").setup()
    for change, key in (
        ({"masked": MaskedLatents(Blocks(salt=1), 2)}, "feature.masks.salt"),
        ({"masked": MaskedLatents(Blocks(), 3)}, "feature.variants"),
        ({"autoencoder": other_autoencoder}, "feature.encoder"),
    ):
        with pytest.raises(DataError, match=rf"(?s)mine/train-masked: this part .*\n  {key}: expected"):
            make(**{"masked": MaskedLatents(Blocks(), 2), "cache": "mine", **change}).setup()


def test_the_autoencoder_is_not_in_memory_unless_it_is_in_the_loop(make, monkeypatch):
    make(masked=MaskedLatents(Blocks(), 2)).setup()
    monkeypatch.setattr(Codec, "encode", lambda *args: pytest.fail("encoded again"))
    module = make(masked=MaskedLatents(Blocks(), 2))
    module.setup()
    seen(module, 2)
    assert module._codec is module._live is None


# ---- order, ranks, resumes ---------------------------------------------------------------------------------------

WANTED = {
    "cached": {"aligned": ALL, "drawn": DRAWN, "masked": MaskedLatents(Blocks(), 2)},
    "loop": {"aligned": {"image": Pixels()}, "masked": MaskedLatents(Blocks())},
}


class Recorder(pl.LightningModule):
    """Keeps all columns of the batches that it is given: {sample number: {name: row}}."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {}

    def training_step(self, batch, batch_idx):
        columns = {name: column for name, column in batch.items() if isinstance(column, torch.Tensor)}
        for place, number in enumerate(batch["draws"].numbers.tolist()):
            assert number not in self.seen
            self.seen[number] = {name: column[place].clone() for name, column in columns.items()}
        return self.weight * batch["latent"].mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, steps, path: Path, resume: Path | None = None):
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


def assert_same(ours, theirs, rounded=()):
    assert ours.keys() == theirs.keys()
    for number, row in ours.items():
        assert row.keys() == theirs[number].keys()
        for name, value in row.items():
            if name in rounded:
                torch.testing.assert_close(value, theirs[number][name], rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(value, theirs[number][name]), (number, name)


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize(("workers", "micro"), [(0, None), (2, 2), (0, 1)])
def test_seven_steps_are_three_and_four_after_a_resume(make, here, wanted, workers, micro):
    params = {**WANTED[wanted], "num_workers": workers, "micro_batch_size": micro}
    straight = fit(make(**WANTED[wanted]), 7, here / "a.ckpt")
    begun = fit(make(**params), 3, here / "b.ckpt")
    resumed = fit(make(**params), 7, here / "c.ckpt", here / "b.ckpt")
    assert [*straight] == list(range(28))
    # How many pictures an autoencoder encodes at once shows in the last bit.
    assert_same(straight, begun | resumed, ["masked_latent"] if wanted == "loop" and micro else [])


@pytest.mark.parametrize("wanted", WANTED)
def test_two_ranks_see_what_one_sees(make, wanted, monkeypatch):
    found: list[dict] = []
    for world in (1, 2):
        rows: dict[int, dict] = {}
        for rank in range(world):
            monkeypatch.setenv("WORLD_SIZE", str(world))
            monkeypatch.setenv("RANK", str(rank))
            module = make(**WANTED[wanted])
            module.setup()
            for batch in seen(module, 6):
                columns = {name: column for name, column in batch.items() if isinstance(column, torch.Tensor)}
                for place, number in enumerate(batch["draws"].numbers.tolist()):
                    assert number not in rows
                    rows[number] = {name: column[place] for name, column in columns.items()}
        found.append(rows)
    assert [*found[0]] == list(range(24))
    assert_same(*found, ["masked_latent"] if wanted == "loop" else [])


def test_buckets_have_a_part_for_each_size(make):
    buckets = Buckets(sizes=[[16, 16], [16, 24]], constant_tokens=False, min_items=1)

    class Two(Scenes):
        def __getitem__(self, index):
            self.size = (21, 27) if index % 2 else (20, 38)
            return super().__getitem__(index)

        def sizes(self):
            return np.array([self[index]["image"].size[::-1] for index in range(self.number)])

    params = {"resolution": None, "buckets": buckets, "num_validation": 0, "cache": "mine", "batch_size": 2}
    module = make(Two(12), aligned=ALL, drawn=DRAWN, masked=MaskedLatents(Blocks(), 2), **params)
    assert {tuple(batch["map"].shape[1:]) for batch in module.meta_batches()} == {(16, 16), (16, 24)}
    module.setup()
    names = {path.name for path in Path("mine").iterdir()}
    assert names == {f"train-{size}{part}" for size in ("16x16", "16x24") for part in ("", *_suffixes())}
    rows = module.train_dataloader().dataset
    for number in range(len(rows)):
        (item,) = rows.items([number])
        batch = rows.__getitems__([(number, number)])
        size = tuple(batch["map"].shape[1:])
        mirrored = bool(Draws(3, [number], 1).uniform("flip")[0] < 0.5)
        row, _ = Map().row(module.train_dataset[int(item)], Crop(EvalTransform(size), 3), "x")
        assert torch.equal(batch["map"][0], side(row, mirrored))
        assert tuple(batch["mask"].shape) == (1, 1, *size)
    assert len(module.described()) == 12


def _suffixes():
    return [f"-{name}" for name in (*ALL, "masked")]


# ---- wrong configurations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"aligned": {"latent": Map()}}, r"data.params.aligned.latent: expected a name .* that no other column has"),
        ({"aligned": {"map": Blocks()}}, r"data.params.aligned.map: expected a column .*aligned.py\), found Blocks"),
        ({"drawn": {"mask": Map()}}, r"data.params.drawn.mask: expected a column .*drawn.py\), found Map"),
        ({"aligned": {"mask": Mask()}, "masked": MaskedLatents(Blocks(), 2)}, r"two columns of the name mask"),
        ({"masked": MaskedLatents(Blocks())}, r"data.params.masked: without variants .* data.params.aligned.image="),
        ({"drawn": DRAWN}, r"data.params.drawn.low_resolution: Halved reads 'image'.* data.params.aligned"),
    ],
)
def test_a_wrong_configuration_is_one_message(make, params, said):
    with pytest.raises(ConfigError, match=said):
        make(**params).meta_batch()
    assert not Path("cache").exists()


def test_a_transform_of_another_kind_is_refused(make):
    class Other:
        size = (16, 16)
        describe, __call__ = EvalTransform(16).describe, EvalTransform(16).__call__

    with pytest.raises(ConfigError, match=r"data.params.transform: .* as EvalTransform crops them, found Other"):
        make(transform=Other(), aligned={"map": Map()}).setup()


def test_latents_beyond_fp16_name_their_picture(make, monkeypatch):
    monkeypatch.setattr("ldm.latents.masked.LARGEST", 1e-6)
    with pytest.raises(DataError, match=r"memory/0.png: latent of the masked picture: expected magnitudes up to"):
        make(masked=MaskedLatents(Blocks(), 2)).setup()


def test_a_mask_of_its_own_is_one():
    with pytest.raises(ConfigError, match=r"data.params.masked.variants: an item has one mask of its own, found 4"):
        MaskedLatents(variants=4)


def test_a_data_set_without_the_key_is_seen_before_anything_is_encoded(make, monkeypatch):
    class Plain(Scenes):
        def __getitem__(self, index):
            return {"image": super().__getitem__(index)["image"], "class_label": 0}

    monkeypatch.setattr(Codec, "encode", lambda *args: pytest.fail("encoded"))
    with pytest.raises(ConfigError, match=r"aligned.map: reads map, and the items .*memory/1.png.* have image, class"):
        make(Plain(broken=(0,)), aligned={"map": Map()}).setup()
    with pytest.raises(ConfigError, match=r"data.params.masked: reads mask, and"):
        make(Plain(), masked=MaskedLatents()).setup()


def test_readers_travel_without_the_files(make):
    module = make(aligned={"image": Pixels()})
    module.setup()
    rows = module.train_dataloader().dataset
    (part,) = rows.parts()
    part.gather("image", np.array([0]), np.array([0]))
    assert len(pickle.dumps(rows)) < 50_000
