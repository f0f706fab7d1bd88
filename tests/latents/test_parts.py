"""Parts of a cache: the same bytes whoever builds them, however often they are killed; refused if anything is off."""

import dataclasses
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.diffusion.conditioners.features import Part, stacked
from ldm.errors import ConfigError, DataError, ResourceError
from ldm.latents.dataset_parts import DatasetParts
from ldm.latents.manifest import CacheSpec, Manifest
from ldm.latents.part_reader import PartReader
from ldm.latents.parts import CAPTIONS, Found, PartManifest, PartSpec, build_part, described, verify
from ldm.latents.ragged import from_raw, pack, to_raw
from ldm.latents.shards import MANIFEST, PLAN
from ldm.runtime import signals
from tests.points import in_a_child
from tests.tiny_features import LONGEST, WIDTH, CaptionedPictures, Colors, TogetherPictures, Words, words

CPU = torch.device("cpu")
ITEMS = 150


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def parts():
    return lambda cache="cache", **params: DatasetParts("train", CaptionedPictures(ITEMS, **params), Path(cache))


def built(parts: DatasetParts, feature=None) -> tuple[PartReader, PartReader]:
    captions = parts.captions()
    return captions, parts.feature("text", feature or Words(), captions, CPU)


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "claims"
    }


# ---- what is in them ---------------------------------------------------------------------------------------------


def test_captions_come_back_whatever_they_are(here):
    odd = ["", "née", "😀👩‍👩‍👧", "مرحبا", "word " * 10_000, os.fsdecode(b"caf\xe9"), "two\nlines"]
    texts = [[odd[number % 7], f"{number}"][: 1 + number % 2] for number in range(40)]
    reader = DatasetParts("train", CaptionedPictures(40, captions=texts)).captions()
    items = np.arange(40)
    assert reader.counts(items).tolist() == [len(several) for several in texts]
    assert reader.texts(items, np.zeros(40, int)) == [several[0] for several in texts]
    assert reader.texts(items, reader.counts(items) - 1) == [several[-1] for several in texts]
    assert reader.texts(np.array([39, 3, 39]), np.array([1, 0, 0])) == ["39", "مرحبا", texts[39][0]]
    verify(reader.folder)


def test_features_of_each_caption_as_they_are_stacked(parts):
    captions, reader = built(parts())
    assert reader.plan.num_shards > 1
    rng = np.random.default_rng(0)
    items = rng.integers(0, ITEMS, 200)
    which = rng.integers(0, 3, 200) % captions.counts(items)
    feature = Words()
    expected = stacked(feature, "text", [feature.encode(text, CPU) for text in captions.texts(items, which)])
    found = reader.gather("text", items, which)
    assert [*found] == [*expected]
    for name, column in expected.items():
        assert found[name].dtype == column.dtype
        assert found[name].is_contiguous()
        assert torch.equal(found[name], column)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.bool, torch.int64, torch.float64])
def test_types_that_numpy_has_not(dtype):
    tensor = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    assert torch.equal(from_raw(to_raw(tensor), dtype), tensor)
    assert from_raw(to_raw(tensor), dtype).dtype == dtype


def test_a_ragged_part_takes_the_bytes_of_its_rows():
    ragged = {"tokens": Part((100, 4), torch.float16, ragged=True)}
    rows = [[{"tokens": np.full((length, 4), length, "<i2")}] for length in (1, 2, 3)]
    data, count, lengths = pack(ragged, rows)
    assert (count, lengths) == (3, {"tokens": 6})
    assert len(data) == 128 + 6 * 4 * 2
    assert len(pack(ragged, [[], []])[0]) == 128


def test_readers_travel_to_workers_without_the_files(parts):
    captions, reader = built(parts())
    captions.texts(np.arange(5), np.zeros(5, int))
    reader.gather("text", np.arange(ITEMS), np.zeros(ITEMS, int))
    for one in (captions, reader):
        assert len(pickle.dumps(one)) < 20_000
    copied = pickle.loads(pickle.dumps(reader))
    assert torch.equal(
        copied.gather("text", np.array([7]), np.array([0]))["text.vector"],
        reader.gather("text", np.array([7]), np.array([0]))["text.vector"],
    )


def test_a_feature_of_pictures_has_a_row_for_each_item():
    pictures = CaptionedPictures(10)
    reader = DatasetParts("train", pictures, threads=2).feature("look", Colors(), None, CPU)
    found = reader.gather("look", np.arange(10), np.zeros(10, int))
    expected = stacked(Colors(), "look", [Colors().encode(pictures[item]["image"], CPU) for item in range(10)])
    assert torch.equal(found["look.vector"], expected["look.vector"])
    assert reader.plan.source == pictures.pictures_fingerprint()


def test_captions_that_come_with_the_pictures():
    together = TogetherPictures(10)
    reader = DatasetParts("train", together).captions()
    assert reader.texts(np.arange(10), np.zeros(10, int)) == [words(item)[0] for item in range(10)]
    assert reader.plan.source == together.fingerprint()


def test_equal_captions_in_a_row_are_encoded_once(here):
    pictures = CaptionedPictures(8, captions=[["a cat"]] * 8)
    built(DatasetParts("train", pictures), Words(diary="diary"))
    assert Path("diary").read_text() == "a cat\n"


def test_captions_that_are_cut_are_counted(caplog):
    texts = [["one two", "one two three four five six"]] * 3 + [["x " * 10_000]] + [["one"]] * 96
    captions, reader = built(DatasetParts("train", CaptionedPictures(100, captions=texts)))
    assert reader.manifest.num_cut == 4
    assert "features.text: 4 of 103 captions are longer than what it reads, and their ends have no" in caplog.text
    assert "text of 103 captions, 4 of them too long, 100 items, 0 broken, 0.0 MB" in str(reader)
    assert "too long" not in str(captions)


# ---- broken, missing, wrong --------------------------------------------------------------------------------------


def test_unreadable_captions_are_counted_and_leave_no_rows(caplog):
    pictures = CaptionedPictures(10, unreadable=(2, 7))
    with pytest.raises(DataError, match=r"(?s)2 items could not be read, 1 are allowed:.*memory/2.txt: cannot be read"):
        DatasetParts("train", pictures, max_broken=1).captions()
    captions, features = built(DatasetParts("train", pictures, max_broken=2))
    assert captions.broken == features.broken == [2, 7]
    assert captions.counts(np.array([1, 2, 3])).tolist() == [2, 0, 1]
    assert caplog.text.count("memory/2.txt") == 1
    verify(captions.folder)
    verify(features.folder)


@pytest.mark.parametrize("none", [[], None])
@pytest.mark.parametrize("kind", [CaptionedPictures, TogetherPictures])
def test_a_missing_caption_is_named(none, kind):
    texts = [["a"]] * 10
    texts[6] = none
    with pytest.raises(DataError, match=r"memory/6.png: has no caption, as others have; give it one, which may be"):
        DatasetParts("train", kind(10, captions=texts), max_broken=9).captions()


def test_a_caption_of_more_than_a_megabyte_is_named():
    with pytest.raises(DataError, match=r"memory/0.png: a caption of 1048577 bytes; expected 1048576 at most"):
        DatasetParts("train", CaptionedPictures(1, captions=[["x" * ((1 << 20) + 1)]])).captions()


def test_a_value_that_cannot_be_encoded_breaks_its_item():
    class Picky(Words):
        def encode(self, value, device):
            if "9" in value:
                raise DataError("9 is no word")
            return super().encode(value, device)

    parts = DatasetParts("train", CaptionedPictures(10), max_broken=1)
    assert built(parts, Picky())[1].broken == [9]
    none = DatasetParts("train", CaptionedPictures(10))
    with pytest.raises(DataError, match=r"memory/9.png: 9 is no word"):
        built(none, Picky(salt=1))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"tokens": torch.zeros(LONGEST + 1, WIDTH, dtype=torch.float16)}, r"tokens: expected up to \(6, 8\)"),
        ({"tokens": torch.zeros(0, WIDTH, dtype=torch.float16)}, r"tokens: expected up to"),
        ({"tokens": torch.zeros(2, WIDTH)}, r"tokens: expected .* torch.float16, found \(2, 8\) torch.float32"),
        ({"vector": torch.zeros(WIDTH - 1)}, r"vector: expected \(8,\) torch.float32, found \(7,\)"),
        ({"vector": torch.full((WIDTH,), torch.inf)}, r"vector: not finite as torch.float32"),
        (None, r"tokens: is not among what it makes: other"),
    ],
)
def test_a_feature_that_makes_something_else_than_it_says(made, said):
    class Wrong(Words):
        def encode(self, value, device):
            return {"other": torch.zeros(1)} if made is None else super().encode(value, device) | made

    with pytest.raises(ConfigError, match=f"data.params.features.text: {said}"):
        built(DatasetParts("train", CaptionedPictures(3)), Wrong())


def test_a_feature_of_captions_needs_some():
    with pytest.raises(ConfigError, match=r"data.params.features.text: reads captions, and the data set .* has none"):
        DatasetParts("train", CaptionedPictures(3)).feature("text", Words(), None, CPU)


def test_pictures_without_what_a_feature_reads():
    class Depth(Colors):
        reads = "depth"

    with pytest.raises(DataError, match=r"memory/0.png: has no depth, which a feature reads"):
        DatasetParts("train", CaptionedPictures(3)).feature("depth", Depth(), None, CPU)


# ---- building ----------------------------------------------------------------------------------------------------


class Slow(Words):
    """Takes time for each caption."""

    def encode(self, value, device):
        time.sleep(0.001)
        return super().encode(value, device)


def start(cache: Path, world: int = 1, rank: int = 0, diary: Path | None = None) -> multiprocessing.Process:
    """A builder in a process of its own."""

    def work():
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        parts = DatasetParts("train", CaptionedPictures(ITEMS), cache)
        parts.feature("text", Slow(diary=diary), parts.captions(), CPU)
        os._exit(0)  # no teardown of what was inherited from the test runner

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Captions and a feature built in one go."""
    folder = tmp_path_factory.mktemp("parts") / "whole"
    built(DatasetParts("train", CaptionedPictures(ITEMS), folder))
    return folder


@pytest.fixture
def copy(whole, here):
    return Path(shutil.copytree(whole, here / "copy"))


@pytest.mark.parametrize("world", [1, 2])
def test_a_build_killed_at_any_moment_goes_on_to_the_same_bytes(whole, here, world):
    draw, kills = random.Random(world), 0
    for attempt in range(100):
        builders = [start(here / "killed", world, rank) for rank in range(world)]
        time.sleep(draw.uniform(0.0, 0.2 + 0.02 * attempt))
        for builder in builders:
            os.kill(builder.pid, signal.SIGKILL)
            builder.join()
            kills += builder.exitcode == -signal.SIGKILL
        if (here / "killed" / "train-text" / MANIFEST).exists():
            break
    built(DatasetParts("train", CaptionedPictures(ITEMS), here / "killed"))
    assert kills > 0
    assert content(here / "killed") == content(whole)


@pytest.mark.parametrize("world", [1, 2])
def test_two_builders_share_the_work(whole, here, world):
    """Ranks of one run, or two that know nothing of each other."""
    diary = here / "diary"
    builders = [start(here / "both", world, rank if world == 2 else 0, diary) for rank in range(2)]
    for builder in builders:
        builder.join(60)
        assert builder.exitcode == 0
    assert content(here / "both") == content(whole)
    everything = [text for item in range(ITEMS) for text in words(item)]
    assert sorted(diary.read_text().splitlines()) == sorted(everything), "each caption is encoded once"


def test_a_signal_ends_a_build_and_keeps_finished_shards(whole, here):
    class Asked(Words):
        def encode(self, value, device):
            if (here / "w" / "train-text" / "shard-00000.json").exists():
                os.kill(os.getpid(), signal.SIGTERM)
            return super().encode(value, device)

    def interrupted():
        signals.listen()
        built(DatasetParts("train", CaptionedPictures(ITEMS), here / "w"), Asked())

    assert in_a_child(interrupted) == 128 + signal.SIGTERM
    assert [path.name for path in (here / "w" / "train-text").glob("shard*.json")] == ["shard-00000.json"]
    built(DatasetParts("train", CaptionedPictures(ITEMS), here / "w"))
    assert content(here / "w") == content(whole)


def test_a_finished_part_needs_no_encoder(copy):
    class Absent(Words):
        def encode(self, value, device):
            pytest.fail("encoded again")

    built(DatasetParts("train", CaptionedPictures(ITEMS), copy), Absent())


@pytest.mark.parametrize("name", ["shard-00001.bin", "shard-00001.json", MANIFEST])
@pytest.mark.parametrize("part", ["train-text", "train-captions"])
def test_what_is_missing_is_built_again_alone(whole, copy, part, name):
    if not (copy / part / name).exists():
        name = name.replace("00001", "00000")
    (copy / part / name).unlink()
    built(DatasetParts("train", CaptionedPictures(ITEMS), copy), Words(diary="diary"))
    assert content(copy) == content(whole)
    encoded = len(Path("diary").read_text().splitlines()) if Path("diary").exists() else 0
    assert encoded == (128 if part == "train-text" and name != MANIFEST else 0)


def test_a_full_disk_is_a_resource_error_and_leaves_nothing(whole, here, monkeypatch):
    written = os.fsync

    def full(fd):
        if "train-text" in os.readlink(f"/proc/self/fd/{fd}") and (here / "full/train-text/shard-00000.json").exists():
            raise OSError(28, "No space left on device")
        written(fd)

    parts = DatasetParts("train", CaptionedPictures(ITEMS), here / "full")
    with monkeypatch.context() as then:
        then.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match=r"train-text/shard-00000.json: cannot write .*No space left.*needed"):
            built(parts)
    assert not [*(here / "full").rglob("*.tmp.*")]
    built(parts)
    assert content(here / "full") == content(whole)


def test_threads_change_nothing(whole, here):
    built(DatasetParts("train", CaptionedPictures(ITEMS), here / "threads", threads=4))
    assert content(here / "threads") == content(whole)


# ---- refused -----------------------------------------------------------------------------------------------------

SPEC = PartSpec("text", "caption", "abc", 10, described(Words().parts), Words().describe())


@pytest.mark.parametrize(
    ("key", "change"),
    {
        "source": {"source": "abd"},
        "num_items": {"num_items": 11},
        "reads": {"reads": "title"},
        "feature.weights": {"feature": Words(salt=1).describe()},
        "feature.max_length": {"feature": {**Words().describe(), "max_length": 7}},
        "parts.tokens.dtype": {"parts": described(Words(dtype="bfloat16").parts)},
    }.items(),
)
def test_a_stale_part_is_refused_by_key(here, key, change):
    rows = [{name: to_raw(made) for name, made in Words().encode("a b", CPU).items()}]

    def build_it(plan, folder=here / "part"):
        return build_part(folder, plan, lambda items: ((item, Found(rows)) for item in items))

    build_it(SPEC)
    wanted = dataclasses.replace(SPEC, **change)
    assert wanted.fingerprint() != SPEC.fingerprint()
    for attempt in (lambda: build_it(wanted), lambda: PartReader(here / "part", wanted)):
        with pytest.raises(DataError, match=rf"(?s)this part of a latent cache .*\n  {key}: expected") as caught:
            attempt()
        assert str(caught.value).count(": expected") == 1
    (here / "part" / MANIFEST).unlink()
    with pytest.raises(DataError, match=rf"\n  {key}: expected"):
        build_it(wanted)


def test_what_it_is_called_and_how_it_is_laid_out_is_not_compared():
    assert SPEC.fingerprint() == dataclasses.replace(SPEC, name="t5", shard_items=8).fingerprint()


def test_a_part_is_no_latent_cache_and_the_other_way_round(copy):
    with pytest.raises(DataError, match=r"manifest.json: kind: expected latents, found part"):
        Manifest.read(copy / "train-text")
    with pytest.raises(DataError, match=r"plan.json: kind: expected latents, found part"):
        CacheSpec.read(copy / "train-text")
    with pytest.raises(DataError, match=r"\n  feature: expected .*\n"):
        PartReader(copy / "train-text", PartReader(copy / "train-captions").plan)


@pytest.mark.parametrize("part", ["train-text", "train-captions"])
def test_verify_finds_every_flipped_bit(copy, part):
    folder, draw = copy / part, random.Random(0)
    verify(folder)
    files = [path for path in sorted(folder.iterdir()) if path.name != "claims"]
    weights = [path.stat().st_size for path in files]
    for trial in range(60):
        path = files[trial] if trial < len(files) else draw.choices(files, weights)[0]
        sound = path.read_bytes()
        hurt = bytearray(sound)
        hurt[draw.randrange(len(hurt))] ^= 1 << draw.randrange(8)
        path.write_bytes(hurt)
        with pytest.raises(DataError, match=path.name):
            verify(folder)
        path.write_bytes(sound)
    verify(folder)


def test_damage_is_found_at_the_first_read_of_a_shard(copy):
    path = copy / "train-text" / "shard-00001.bin"
    hurt = bytearray(path.read_bytes())
    hurt[-1] ^= 4
    path.write_bytes(hurt)
    reader = PartReader(copy / "train-text")
    reader.gather("text", np.array([0, 63]), np.zeros(2, int))
    with pytest.raises(DataError, match=r"shard-00001.bin: damaged: crc32: expected \w+, found \w+. Delete it"):
        reader.gather("text", np.array([0, 64]), np.zeros(2, int))


@pytest.mark.parametrize("name", ["shard-00000.bin", "shard-00000.json", MANIFEST, PLAN])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_file_is_found(copy, name, share):
    path = copy / "train-text" / name
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DataError, match=f"{name}: (truncated|damaged)"):
        verify(copy / "train-text")
    if name.endswith(".bin"):
        with pytest.raises(DataError, match=f"{name}: truncated: bytes: expected"):
            PartReader(copy / "train-text")


def test_a_shard_of_another_part_is_found(copy):
    built(DatasetParts("train", CaptionedPictures(ITEMS), Path("other")), Words(salt=1))
    for suffix in (".bin", ".json"):
        shutil.copy(f"other/train-text/shard-00001{suffix}", copy / "train-text")
    with pytest.raises(DataError, match=r"shard-00001.bin: damaged: crc32"):
        verify(copy / "train-text")
    (copy / "train-text" / MANIFEST).unlink()
    with pytest.raises(DataError, match=r"shard-00001.json: plan: expected \w+, found \w+. Delete it"):
        built(DatasetParts("train", CaptionedPictures(ITEMS), copy))


def test_manifests_come_back(copy):
    manifest = PartManifest.read(copy / "train-captions")
    assert PartManifest.from_dict(manifest.to_dict()) == manifest
    assert manifest.num_rows == sum(len(words(item)) for item in range(ITEMS))
    assert manifest.plan.rows() == CAPTIONS
