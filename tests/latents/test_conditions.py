"""Captions, features and numbers in the batches of stage 2: chosen by sample number, from caches of any age."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ldm.autoencoder.codec import Codec
from ldm.data.datamodule import VALIDATION_SEED
from ldm.data.loading import chosen
from ldm.data.transforms import EvalTransform
from ldm.diffusion.conditioners.features import columns
from ldm.diffusion.networks.unet import UNet
from ldm.diffusion.noise_schedules import SqrtLinear
from ldm.diffusion.objectives import DDPM
from ldm.errors import ConfigError, DataError
from ldm.latents.build import Source, build
from ldm.latents.datamodule import LatentDataModule
from ldm.latents.manifest import Manifest
from ldm.randomness import bijected
from tests.latents.test_datamodule import fit
from tests.tiny_features import WIDTH, CaptionedPictures, Colors, TogetherPictures, WordConditioner, Words, words


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def make(runs):
    def make(train=None, **params):
        defaults = {"autoencoder": str(runs.autoencoder), "batch_size": 4, "resolution": 16, "seed": 3}
        return LatentDataModule(train or CaptionedPictures(10), **{**defaults, **params})

    return make


def first(loader, number):
    return [batch for _, batch in zip(range(number), loader, strict=False)]


def folders() -> set[Path]:
    return {*Path("cache").iterdir()}


def seen(module, steps: int = 30) -> dict[int, tuple[int, str]]:
    """{sample number: (item, caption)} of the first steps."""
    found = {}
    for batch in first(module.train_dataloader(), steps):
        for number, caption in zip(batch["sample_number"].tolist(), batch["caption"], strict=True):
            length = len(module.train_dataset)
            found[number] = (int(bijected(module.seed, length, [number])[0]), caption)
    return found


# ---- which caption -----------------------------------------------------------------------------------------------


def test_the_sample_number_chooses_evenly():
    numbers = np.arange(30_000)
    found = chosen(5, numbers, np.full(len(numbers), 3))
    assert np.bincount(found, minlength=3) == pytest.approx([10_000] * 3, abs=300)
    assert not np.array_equal(found, chosen(6, numbers, np.full(len(numbers), 3)))
    assert chosen(5, numbers, np.ones(len(numbers))).max() == 0
    for start in (0, 17):
        np.testing.assert_array_equal(chosen(5, numbers[start : start + 8], [3] * 8), found[start : start + 8])


def test_each_caption_of_an_item_is_used(make):
    module = make()
    module.setup()
    found = seen(module, 100)
    for item in range(10):
        assert {caption for other, caption in found.values() if other == item} == {*words(item)}
    for number, (item, caption) in found.items():
        assert caption == words(item)[int(chosen(3, [number], [len(words(item))])[0])]


def test_validation_sees_the_same_captions_whatever_the_seed(make):
    batches = []
    for seed in (1, 2):
        module = make(num_validation=4, seed=seed)
        module.setup()
        batches.append([batch["caption"] for batch in module.val_dataloader()])
    assert batches[0] == batches[1]
    module = make(num_validation=4)
    module.setup()
    for batch in module.val_dataloader():
        for number, caption in zip(batch["sample_number"], batch["caption"], strict=True):
            several = module.validation_dataset.captions(int(number))
            assert caption == several[int(chosen(VALIDATION_SEED, [number], [len(several)])[0])]


@pytest.mark.parametrize("workers", [0, 2])
def test_features_are_those_of_the_chosen_caption(make, workers):
    module = make(features={"text": Words(), "look": Colors()}, num_workers=workers)
    module.setup()
    for batch in first(module.train_dataloader(), 5):
        expected = columns(Words(), "text", {"caption": batch["caption"]}, torch.device("cpu"))
        for name, column in expected.items():
            assert torch.equal(batch[name], column)
        items = [int(bijected(3, 10, [number])[0]) for number in batch["sample_number"]]
        looks = [Colors().encode(module.train_dataset[int(item)]["image"], None)["vector"] for item in items]
        assert torch.equal(batch["look.vector"], torch.stack(looks))


def test_meta_batch_has_the_keys_and_the_shapes_of_a_real_one(make):
    names = ["original_size", "crop_top_left", "target_size", "score", "tag"]
    data = make(features={"text": Words()}, numbers=names)
    meta = data.meta_batch(rows=4)
    assert not Path("cache").exists()
    data.setup()
    (real,) = first(data.train_dataloader(), 1)
    data.on_after_batch_transfer(real, 0)
    assert meta.keys() == real.keys()
    for name, column in meta.items():
        if isinstance(column, torch.Tensor):
            assert column.is_meta
            assert (column.shape, column.dtype) == (real[name].shape, real[name].dtype), name
    assert meta["caption"] == [""] * 4


def test_seven_steps_are_three_and_four_after_a_resume(make, here):
    captions = {}
    for name, steps, resume in (("a", 7, None), ("b", 3, None), ("c", 7, here / "b.ckpt")):
        module, captions[name] = make(features={"text": Words()}), []
        transferred = module.on_after_batch_transfer

        def noted(batch, index, name=name, transferred=transferred):
            captions[name] += [*zip(batch["sample_number"].tolist(), batch["caption"], strict=True)]
            return transferred(batch, index)

        module.on_after_batch_transfer = noted
        fit(module, steps, here / f"{name}.ckpt", resume)
    assert captions["a"] == captions["b"] + captions["c"]
    assert [number for number, _ in captions["a"]] == list(range(28))


# ---- cached or not, the loss is the same --------------------------------------------------------------------------


def test_cached_and_uncached_conditions_give_the_same_loss_bit_for_bit(make):
    torch.manual_seed(0)
    sizes = {"model_channels": 16, "channel_mult": [1, 1], "num_res_blocks": 1, "attention_levels": [1], "num_heads": 2}
    network = UNet(in_channels=4, vector_channels=WIDTH, context_dim=WIDTH, **sizes)
    for weight in network.parameters():  # those that start at zero hide the conditions
        torch.nn.init.normal_(weight, std=0.1)
    objective = DDPM(schedule=SqrtLinear())
    losses, gradients = [], []
    for features in ({"text": Words()}, None):
        module = make(features=features)
        module.setup()
        conditioner = WordConditioner(Words())
        if features is not None:
            conditioner.feature.encode = lambda *args: pytest.fail("encoded, although the batch has it")
        network.zero_grad()
        found = []
        for batch in first(module.train_dataloader(), 3):
            batch = module.on_after_batch_transfer(batch, 0)
            assert ("text.tokens" in batch) == (features is not None)
            found.append(objective.loss(network, batch["latent"], conditioner(batch), batch["draws"]))
        torch.cat(found).sum().backward()
        losses.append(torch.cat(found))
        gradients.append([weight.grad.clone() for weight in network.parameters()])
    assert torch.equal(*losses)
    assert len({*losses[0].tolist()}) == 12
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


# ---- which folders there are -------------------------------------------------------------------------------------


def test_other_captions_rebuild_the_text_alone(make, monkeypatch):
    make(features={"text": Words(diary="diary")}, num_validation=3).setup()
    before = folders()
    assert len(before) == 6
    Path("diary").unlink()
    monkeypatch.setattr(Codec, "encode", lambda *args: pytest.fail("encoded again"))
    other = CaptionedPictures(10, captions=[[f"new {item}"] for item in range(10)])
    module = make(other, features={"text": Words(diary="diary")}, num_validation=3)
    module.setup()
    assert len(folders() - before) == 4
    assert sorted(Path("diary").read_text().splitlines()) == sorted(f"new {item}" for item in range(10))
    assert all(caption.startswith("new") for _, caption in seen(module).values())


def test_in_a_folder_of_their_own_other_captions_are_refused_by_key(make):
    make(cache="mine").setup()
    assert {path.name for path in Path("mine").iterdir()} == {"train", "train-captions"}
    other = make(CaptionedPictures(10, captions=[["a"]] * 10), cache="mine")
    with pytest.raises(DataError, match=r"(?s)mine/train-captions: .*source: .*Remove the folder \(rm -r mine/t"):
        other.setup()
    shutil.rmtree("mine/train-captions")
    other.setup()
    assert {caption for _, caption in seen(other).values()} == {"a"}


def test_another_autoencoder_shares_captions_and_features(make, other_autoencoder):
    make(features={"text": Words(diary="diary")}).setup()
    before = folders()
    Path("diary").unlink()
    make(autoencoder=other_autoencoder, features={"text": Words(diary="diary")}).setup()
    assert len(folders() - before) == 1
    assert not Path("diary").exists()


def test_another_encoder_makes_a_part_of_its_own(make):
    make(features={"text": Words()}, cache="mine").setup()
    make(features={"text": Words(), "more": Words(salt=1)}, cache="mine").setup()
    with pytest.raises(DataError, match=r"(?s)mine/train-text: .*feature.weights: expected 'salt 2', found 'salt 0'"):
        make(features={"text": Words(salt=2)}, cache="mine").setup()


def test_the_encoder_is_not_in_memory_while_training(make):
    text = Words()
    make(features={"text": text}).setup()
    assert not text.in_memory
    text.encode = lambda *args: pytest.fail("loaded again")
    make(features={"text": text}).setup()

    class Failing(Words):
        def encode(self, value, device):
            super().encode(value, device)
            raise ConfigError("fails")

    failing = Failing(salt=1)
    with pytest.raises(ConfigError, match="fails"):
        make(features={"text": failing}).setup()
    assert not failing.in_memory


def test_missing_captions_are_seen_before_pictures_are_encoded(make, monkeypatch):
    monkeypatch.setattr(Codec, "encode", lambda *args: pytest.fail("encoded"))
    with pytest.raises(DataError, match=r"memory/4.png: has no caption"):
        make(CaptionedPictures(10, captions=[["a"]] * 4 + [[]] + [["a"]] * 5)).setup()


def test_progress_says_which_part_it_is(make, capsys, monkeypatch):
    monkeypatch.setattr("ldm.runtime.progress.LOG_SECONDS", 0.0)
    make(CaptionedPictures(100), features={"text": Words()}).setup()
    said = capsys.readouterr().out
    assert "train text: 64/100" in said
    assert "train captions: 100/100" in said


# ---- broken items ------------------------------------------------------------------------------------------------


def test_items_without_picture_or_captions_are_in_no_batch(make):
    pictures = CaptionedPictures(10, broken=(6,), unreadable=(2,))
    with pytest.raises(DataError, match=r"1 items could not be read, 0 are allowed:\n  memory/2.txt"):
        make(pictures).setup()
    module = make(pictures, max_broken=0.1, features={"text": Words()})
    module.setup()
    assert module.manifest.broken == [6]
    kept = [item for item in range(10) if item not in (2, 6)]
    epoch = first(module.train_dataloader(), 2)
    captions = [caption for batch in epoch for caption in batch["caption"]]
    labels = [label for batch in epoch for label in batch["class_label"].tolist()]
    assert sorted(labels) == sorted(item % 3 for item in kept)
    assert all(any(caption in words(item) for item in kept) for caption in captions)
    assert sorted(module.sources(range(8))) == [f"memory/{item}.png" for item in kept]


def test_captions_that_are_mended_find_their_pictures_in_the_cache(make, monkeypatch):
    """The latents do not depend on what is wrong with captions."""
    make(CaptionedPictures(10, unreadable=(2,), captions=[["a"]] * 10), max_broken=0.1).setup()
    monkeypatch.setattr(Codec, "encode", lambda *args: pytest.fail("encoded again"))
    module = make(CaptionedPictures(10))
    module.setup()
    assert module.manifest.broken == []


# ---- old caches --------------------------------------------------------------------------------------------------


def old_cache(module: LatentDataModule, folder: Path | None = None, shards: int | None = None) -> Path:
    """The module's cache as it was written when captions lay in the latents' own sidecars."""
    encoding, (part,) = module._encoding(), module._sources().sized("train")
    plan = dataclasses.replace(encoding.plan(part), source=part.dataset.fingerprint(), captions=True)
    folder = folder or Path("cache") / plan.fingerprint()
    source = Source(lambda item: encoding.read(part, item, captions=True))

    def encode(images):
        if shards is not None and len([*folder.glob("shard*.json")]) == shards:
            raise KeyboardInterrupt
        return encoding.codec.encode(images)

    build(folder, plan, encode, source)
    return folder


@pytest.fixture(params=[CaptionedPictures, TogetherPictures])
def single(request):
    """A data set of one caption an item, as all were then."""
    return lambda: request.param(10, captions=[words(item, 1) for item in range(10)])


class One:
    """Of `single`, as it was then: a caption is a string."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getattr__(self, name):
        return getattr(self.dataset, name)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        item = self.dataset[index]
        return {**item, "caption": item["caption"][0]}


@pytest.mark.parametrize("cache", [None, "mine"])
def test_an_old_cache_goes_on_with_its_captions(make, single, cache, monkeypatch):
    folder = old_cache(make(One(single()), cache=cache), None if cache is None else Path("mine/train"))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(Codec, "encode", lambda *args: pytest.fail("encoded again"))
    module = make(single(), cache=cache, features={"text": Words()})
    module.setup()
    assert module.caches["train"][0].folder == folder
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert {path.name for path in folder.parent.iterdir()} >= {folder.name}
    assert len([*folder.parent.iterdir()]) == 2, "the feature alone is new"
    for batch in first(module.train_dataloader(), 3):
        items = [int(bijected(3, 10, [number])[0]) for number in batch["sample_number"]]
        assert batch["caption"] == [words(int(item), 1)[0] for item in items]
        expected = columns(Words(), "text", {"caption": batch["caption"]}, torch.device("cpu"))
        assert torch.equal(batch["text.tokens"], expected["text.tokens"])


def test_an_old_cache_that_is_half_built_is_completed_as_it_was_begun(make, single):
    module = make(One(single()), encode_batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        old_cache(module, shards=2)
    (folder,) = folders()
    module = make(One(single()), encode_batch_size=2)
    module.setup()
    assert folders() == {folder}
    assert Manifest.read(folder).plan.captions
    (batch,) = first(module.train_dataloader(), 1)
    assert batch["caption"][0] in [words(item, 1)[0] for item in range(10)]


def test_an_old_cache_of_other_captions_is_refused_where_it_was_named(make, single):
    old_cache(make(One(single()), cache="mine"), Path("mine/train"))
    other = CaptionedPictures(10, captions=[["a"]] * 10)
    with pytest.raises(DataError, match=r"(?s)mine/train: .*\n  source: expected .*") as caught:
        make(other, cache="mine").setup()
    assert str(caught.value).count(": expected") == 1


def test_a_data_set_without_captions_has_the_cache_that_it_always_had(make, image_folder):
    from ldm.data.sources.folder import ImageFolder

    module = make(ImageFolder(image_folder))
    plan = module._encoding().plan(*module._sources().sized("train"))
    assert plan.captions is False
    assert plan.source == module.train_dataset.fingerprint()
    module.setup()
    assert len(folders()) == 1


# ---- numbers -----------------------------------------------------------------------------------------------------


def test_numbers_of_sizes_and_columns(make):
    names = ["target_size", "original_size", "crop_top_left", "tag", "score"]
    module = make(numbers=names, num_validation=3)
    module.setup()
    (batch,) = first(module.train_dataloader(), 1)
    rest = module.train_dataset
    order = bijected(3, 7, range(4))
    items = [rest.indices[item] for item in order]
    assert batch["original_size"].tolist() == [[20.0 + item, 24.0] for item in items]
    assert batch["target_size"].tolist() == [[16.0, 16.0]] * 4
    assert batch["score"].tolist() == [float(item) for item in items]
    assert batch["tag"].shape == (4, 3)
    assert {batch[name].dtype for name in names} == {torch.float32}


@pytest.mark.parametrize("resolution", [16, [12, 20], [20, 12]])
def test_the_crop_is_where_the_transform_makes_it(make, resolution):
    """A picture whose red and green are its own coordinates tells where the crop begins."""
    transform = EvalTransform(resolution, "nearest")
    for height, width in ((40, 64), (64, 40), (33, 33), (64, 127), (101, 50)):
        grid = np.stack(np.broadcast_arrays(np.arange(height)[:, None], np.arange(width), 0), 2).astype(np.uint8)

        class Grid(CaptionedPictures):
            def sizes(self, size=(height, width)):
                return np.array([size])

        module = make(Grid(1), resolution=resolution, numbers=["crop_top_left"], batch_size=1)
        module.setup()
        (batch,) = first(module.train_dataloader(), 1)
        (corner,) = batch["crop_top_left"].tolist()
        scale = max(transform.size[0] / height, transform.size[1] / width)
        seen = (transform(Image.fromarray(grid))[:2, 0, 0] + 1) * 127.5
        assert np.abs(np.array(corner) - np.round(seen.numpy()) * scale).max() <= 1.0


@pytest.mark.parametrize(
    ("names", "dataset", "said"),
    [
        (["scor"], CaptionedPictures, r"scor: .*memory/0.png.* has no such column; did you mean 'score'\?"),
        (["original_size"], TogetherPictures, r"original_size: .* does not know the sizes of its pictures"),
    ],
)
def test_numbers_that_the_data_set_has_not(make, names, dataset, said):
    with pytest.raises(ConfigError, match=rf"data.params.numbers: {said}"):
        make(dataset(10), numbers=names).meta_batch()


def test_what_a_validation_set_lacks_is_said_before_anything_is_encoded(make):
    for lacking, params in (("has_captions", {"features": {"text": Words()}}), ("columns", {"numbers": ["score"]})):
        bare = CaptionedPictures(4)
        setattr(bare, lacking, dict)  # no captions, or no columns
        with pytest.raises(ConfigError, match=r"data\.params\.(features\.text: reads captions|numbers: score)"):
            make(validation=bare, **params).setup()
        assert not Path("cache").exists()


@pytest.mark.parametrize("name", ["captions", "a.b", "../x", ""])
def test_names_of_features_are_names(make, name):
    with pytest.raises(ConfigError, match=r"expected a name of letters, digits and _"):
        make(features={name: Words()})


def test_facts_say_what_the_features_are(make):
    assert make(features={"text": Words(salt=2)}).facts()["features"] == {"text": Words(salt=2).describe()}
    assert "features" not in make().facts()


def test_padding_is_no_token(make):
    module = make(features={"text": Words()})
    module.setup()
    (batch,) = first(module.train_dataloader(), 1)
    tokens, mask = batch["text.tokens"], batch["text.tokens_mask"]
    assert mask.sum(1).tolist() == [min(6, 1 + len(caption.split())) for caption in batch["caption"]]
    assert not tokens[~mask].any()
    assert F.pad(mask, (1, 0), value=True)[:, :-1][mask].all(), "padding is at the end"
