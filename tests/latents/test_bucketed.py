"""The data module of stage 2 with buckets: caches, statistics, and the conditions that come along."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.autoencoder.codec import Codec
from ldm.data.buckets import Buckets
from ldm.data.transforms import EvalTransform, center_crops
from ldm.diffusion.conditioners.features import columns
from ldm.errors import ConfigError, DataError
from ldm.latents.datamodule import LatentDataModule
from ldm.latents.manifest import Manifest
from tests.latents.test_datamodule import fit
from tests.tiny_features import CaptionedPictures, Colors, Words

SIZES = [[12, 16], [16, 16], [16, 12]]
ITEMS = {(12, 16): [0], (16, 16): [1, 2, 3, 4, 5, 6, 7], (16, 12): [8, 9, 10, 11]}
"""Of twelve pictures of 20 to 31 by 24 pixels."""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def make(runs):
    def make(train=None, tokens: bool = False, **params):
        buckets = Buckets(sizes=SIZES, min_items=1, constant_tokens=tokens, batch_multiple=2)
        defaults = {"autoencoder": str(runs.autoencoder), "batch_size": 4, "buckets": buckets, "seed": 3}
        return LatentDataModule(train or CaptionedPictures(12), **{**defaults, **params})

    return make


def first(loader, number):
    return [batch for _, batch in zip(range(number), loader, strict=False)]


def items_of(module, batch) -> list[int]:
    """The items of a batch, by the names of their sources."""
    return [int(Path(module.sources([number])[0]).stem) for number in batch["sample_number"].tolist()]


def test_facts_and_shapes(make):
    module = make(tokens=True, features={"text": Words()}, numbers=["target_size"])
    facts = module.facts()
    assert facts["buckets"] == [[[12, 16], 1, 6], [16, 7, 4], [[16, 12], 4, 6]]
    assert (facts["resolution"], facts["image_resolution"]) == (4, 16)
    batches = module.meta_batches(rows=3)
    assert [tuple(batch["latent"].shape) for batch in batches] == [(3, 4, 4, 4), (3, 4, 3, 4), (3, 4, 4, 3)]
    assert [batch["draws"].batch_size for batch in batches] == [4, 6, 6]
    for batch in batches:
        assert batch.keys() == module.meta_batch().keys()
        assert {"text.tokens", "target_size", "caption"} <= batch.keys()


def test_each_latent_is_of_the_crop_of_its_bucket(make):
    module = make(cache="mine")
    codec = Codec.load(module.autoencoder[1])
    module.setup()
    assert {path.name for path in Path("mine").iterdir()} == {
        *("train-12x16", "train-16x16", "train-16x12", "train-captions")
    }
    for (size, items), cache in zip(ITEMS.items(), module.caches["train"], strict=True):
        pixels = torch.stack([EvalTransform(size)(module.train_dataset[item]["image"]) for item in items])
        mean, std = codec.encode(pixels)
        stored, labels = cache.gather(range(len(items)), np.zeros(len(items), bool))
        torch.testing.assert_close(torch.from_numpy(stored[:, 0]).float(), mean, atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(torch.from_numpy(stored[:, 1]).float(), std, atol=1e-2, rtol=1e-2)
        assert labels.tolist() == [item % 3 for item in items]


def test_statistics_are_of_all_latents_together(make):
    module = make(cache="mine")
    module.setup()
    means, squares, stds = [], [], []
    for cache in module.caches["train"]:
        for side in (False, True):
            moments, _ = cache.gather(range(len(cache)), np.full(len(cache), side))
            values = moments.astype(np.float64).transpose(1, 2, 0, 3, 4).reshape(2, 4, -1)
            means.append(values[0])
            squares.append(values[0] ** 2)
            stds.append(values[1] ** 2)
    mean = np.concatenate(means, 1).mean(1)
    variance = np.concatenate(squares, 1).mean(1) - mean**2 + np.concatenate(stds, 1).mean(1)
    manifest = module.manifest
    np.testing.assert_allclose(manifest.mean, mean)
    np.testing.assert_allclose(manifest.std, np.sqrt(variance))
    assert manifest.sizes == SIZES
    assert manifest.plan.shape == (4, 4, 4)
    assert manifest.num_items == manifest.plan.num_items == 12
    assert Manifest.from_dict(manifest.to_dict()) == manifest
    assert "sizes" not in module.caches["train"][0].manifest.to_dict()


def test_captions_features_and_numbers_are_those_of_the_items(make):
    numbers = ["original_size", "crop_top_left", "target_size", "score"]
    module = make(features={"text": Words(), "look": Colors()}, numbers=numbers)
    module.setup()
    sizes, seen = set(), set()
    for batch in first(module.train_dataloader(), 12):
        items = items_of(module, batch)
        seen |= {*items}
        size = tuple(4 * side for side in batch["moments"].shape[-2:])
        sizes.add(size)
        assert {*items} <= {*ITEMS[size]}
        assert batch["class_label"].tolist() == [item % 3 for item in items]
        for item, caption in zip(items, batch["caption"], strict=True):
            assert caption in module.train_dataset.captions(item)
        expected = columns(Words(), "text", {"caption": batch["caption"]}, torch.device("cpu"))
        assert all(torch.equal(batch[name], column) for name, column in expected.items())
        looks = [Colors().encode(module.train_dataset[item]["image"], None)["vector"] for item in items]
        assert torch.equal(batch["look.vector"], torch.stack(looks))
        originals = module.train_dataset.sizes()[items]
        assert batch["original_size"].tolist() == originals.tolist()
        assert batch["target_size"].tolist() == [list(size)] * len(items)
        assert batch["crop_top_left"].tolist() == center_crops(originals, np.array([size] * len(items))).tolist()
        assert batch["score"].tolist() == items
    assert sizes == {*ITEMS}
    assert seen == set(range(12))


def test_other_buckets_leave_captions_and_features_as_they_are(make, here):
    diary = here / "encoded.txt"
    make(features={"text": Words(diary=str(diary))}).setup()
    encoded = diary.read_text()
    make(features={"text": Words(diary=str(diary))}, buckets=Buckets(sizes=[16, [16, 12]], min_items=1)).setup()
    assert diary.read_text() == encoded


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("micro", [None, 2])
def test_seven_steps_are_three_and_four_after_a_resume(make, here, tokens, micro):
    params = {"micro_batch_size": micro, "tokens": tokens, "num_workers": 2}
    straight = fit(make(tokens=tokens), 7, here / "a.ckpt")
    begun = fit(make(**params), 3, here / "b.ckpt")
    resumed = fit(make(**params), 7, here / "c.ckpt", here / "b.ckpt")

    def rows(seen):
        return {number: row for latents, numbers in seen for number, row in zip(numbers, latents, strict=True)}

    whole, pieces = rows(straight), rows([*begun, *resumed])
    assert sorted(whole) == sorted(pieces) == list(range(len(whole)))
    assert all(torch.equal(whole[number], pieces[number]) for number in whole)


def test_broken_pictures_are_left_out_of_their_bucket(make):
    module = make(CaptionedPictures(12, broken=(3, 9)), max_broken=0.2)
    module.setup()
    assert module.manifest.broken == [3, 9]
    seen = {item for batch in first(module.train_dataloader(), 20) for item in items_of(module, batch)}
    assert seen == set(range(12)) - {3, 9}


def test_too_many_broken_pictures_over_all_buckets(make):
    with pytest.raises(DataError, match="2 items could not be read, 1 are allowed"):
        make(CaptionedPictures(12, broken=(3, 9)), max_broken=0.1).setup()


def test_validation_is_in_the_sizes_that_are_trained(make):
    module = make(num_validation=6)
    module.setup()
    batches = list(module.val_dataloader())
    assert sorted(number for batch in batches for number in batch["sample_number"].tolist()) == list(range(6))
    trained = {tuple(cache.plan.shape) for cache in module.caches["train"]}
    assert {tuple(batch["moments"].shape[2:]) for batch in batches} <= trained


def test_what_a_further_run_starts_from_is_compared_as_a_whole(make):
    module = make(cache="mine")
    plan, statistics = module.expected()
    assert statistics is None
    module.setup()
    again, found = make(cache="mine").expected()
    assert again.differences(plan) == again.differences(module.manifest.plan) == []
    assert found == module.manifest.statistics


def test_one_resolution_or_buckets(make):
    with pytest.raises(ConfigError, match=r"data.params.resolution: leave it out where there are `buckets`"):
        make(resolution=16)


def test_sizes_that_the_autoencoder_cannot_divide(make):
    with pytest.raises(ConfigError, match=r"data.params.buckets: the size 16 x 10: expected multiples of 4"):
        make(buckets=Buckets(sizes=[16, [16, 10]])).facts()


def test_transforms_of_every_size(make):
    module = make(transform=lambda size: EvalTransform(size, interpolation="bilinear"))
    module.setup()
    assert {cache.plan.pixels["interpolation"] for cache in module.caches["train"]} == {"bilinear"}


def test_the_folders_are_listed(make, caplog):
    module = make(features={"text": Words()})
    module.setup()
    assert len(module.described()) == 5
    with caplog.at_level(logging.INFO):
        module.train_dataloader()
    assert any("height x width" in record.getMessage() for record in caplog.records)
