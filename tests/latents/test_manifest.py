"""The latent cache: same bytes whoever builds it and however often it is killed; refused if anything is off."""

import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.errors import DataError, ResourceError
from ldm.latents.build import Source, build, shard_items
from ldm.latents.claims import Claims, publish, read_sealed, seal
from ldm.latents.manifest import CacheSpec, Manifest, verify
from ldm.latents.reader import LatentCache, LatentDataset
from ldm.latents.shards import MANIFEST, PLAN
from ldm.latents.statistics import Statistics
from ldm.randomness import Draws
from ldm.runtime import signals
from tests.points import in_a_child

SHAPE = (2, 4, 3)
PLAN_FACTS = CacheSpec(
    shape=SHAPE,
    num_items=50,
    source="abc",
    pixels={"resolution": 8, "crop": "center", "interpolation": "bicubic", "pixel_range": [-1.0, 1.0], "channels": 3},
    autoencoder={"weights": "f00d", "config": {"encoder": {"channels": 8}}, "path": "logs/a"},
    num_classes=3,
    class_names=["a", "b", "c"],
    captions=True,
    shard_items=8,
    encode_batch=4,
)


def pixels(item: int) -> torch.Tensor:
    """(3, 8, 6), different for each item."""
    return torch.rand(3, 8, 6, generator=torch.Generator().manual_seed(item)) * 2 - 1


def read(item: int) -> dict:
    return {"image": pixels(item), "class_label": item % 3, "caption": f"picture {item} é"}


WEIGHT = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1))


def encode(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A convolution that is not flip equivariant, with a positional term."""
    h = torch.nn.functional.conv2d(images, WEIGHT, stride=2) + torch.linspace(0, 1, 3)
    mean, std = h.chunk(2, 1)
    return mean + 0.3, 0.8 * std.sigmoid()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "claims"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A cache built in one go."""
    folder = tmp_path_factory.mktemp("cache") / "whole"
    build(folder, PLAN_FACTS, encode, Source(read))
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


# ---- what is in it -----------------------------------------------------------------------------------------------


def test_records_are_the_encoding_of_the_pixels_and_of_the_mirrored_pixels(whole):
    cache = LatentCache(whole, PLAN_FACTS)
    assert len(cache) == 50
    for item in range(50):
        for mirrored in (False, True):
            image = pixels(item)[None]
            expected = torch.stack(encode(image.flip(-1) if mirrored else image), 1)[0].half().numpy()
            moments, labels = cache.gather([item], np.array([mirrored]))
            np.testing.assert_allclose(moments[0].astype(float), expected.astype(float), rtol=2e-3, atol=1e-3)
            assert labels.tolist() == [item % 3]


def test_mirrored_record_is_not_the_mirrored_latent(whole):
    cache = LatentCache(whole)
    plain, _ = cache.gather(range(50), np.zeros(50, bool))
    mirrored, _ = cache.gather(range(50), np.ones(50, bool))
    assert np.abs(plain[..., ::-1].astype(float) - mirrored).max() > 0.1


def test_statistics_equal_those_of_numpy_on_the_whole(whole):
    cache = LatentCache(whole)
    both = np.concatenate([cache.gather(range(50), np.full(50, side))[0] for side in (False, True)]).astype(np.float64)
    mean, std = both[:, 0], both[:, 1]
    np.testing.assert_allclose(cache.manifest.mean, mean.mean((0, 2, 3)), rtol=1e-12)
    variance = mean.var((0, 2, 3)) + (std**2).mean((0, 2, 3))
    np.testing.assert_allclose(cache.manifest.std, np.sqrt(variance), rtol=1e-12)


def test_standardized_draws_have_zero_mean_and_unit_variance(whole):
    cache = LatentCache(whole)
    manifest = cache.manifest
    moments = torch.cat([torch.from_numpy(cache.gather(range(50), np.full(50, s))[0]).float() for s in (False, True)])
    mean, std = moments.repeat(40, 1, 1, 1, 1).unbind(1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    latents = manifest.standardize(mean + std * noise)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(2), atol=0.01, rtol=0)
    torch.testing.assert_close(latents.var((0, 2, 3)), torch.ones(2), atol=0.02, rtol=0)


@settings(deadline=None, max_examples=50)
@given(
    mean=st.lists(st.floats(-100, 100), min_size=2, max_size=2),
    std=st.lists(st.floats(1e-2, 100), min_size=2, max_size=2),
    seed=st.integers(0, 2**31),
)
def test_unwhiten_undoes_whiten(mean, std, seed):
    manifest = Manifest(PLAN_FACTS, mean, std, [], [])
    latents = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(seed)) * 10
    torch.testing.assert_close(manifest.unstandardize(manifest.standardize(latents)), latents, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(manifest.standardize(manifest.unstandardize(latents)), latents, atol=2e-2, rtol=1e-4)


def test_whiten_keeps_dtype():
    manifest = Manifest(PLAN_FACTS, [1.0, 2.0], [2.0, 4.0], [], [])
    out = manifest.standardize(torch.zeros(1, *SHAPE, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert out[0, :, 0, 0].tolist() == [-0.5, -0.5]


def test_manifest_survives_a_checkpoint(whole, tmp_path):
    manifest = Manifest.read(whole)
    torch.save(manifest.to_dict(), tmp_path / "m.pt")
    assert Manifest.from_dict(torch.load(tmp_path / "m.pt", weights_only=True)) == manifest


def test_a_channel_without_spread_is_not_divided_by_zero(tmp_path):
    plan = dataclasses.replace(PLAN_FACTS, num_items=5)
    manifest = build(tmp_path, plan, lambda x: (torch.zeros(len(x), *SHAPE), torch.zeros(len(x), *SHAPE)), Source(read))
    assert manifest.std == [1.0, 1.0]


# ---- reading -----------------------------------------------------------------------------------------------------


def test_a_gathered_batch_equals_item_by_item(whole):
    cache = LatentCache(whole)
    rng = np.random.default_rng(0)
    rows, mirrored = rng.integers(0, 50, 200), rng.random(200) < 0.5
    moments, labels = cache.gather(rows, mirrored)
    for i, row in enumerate(rows):
        one, label = cache.gather([row], mirrored[i : i + 1])
        np.testing.assert_array_equal(moments[i], one[0])
        assert labels[i] == label[0]
    assert cache.captions(rows) == [f"picture {row} é" for row in rows]


@pytest.mark.parametrize("workers", [0, 2])
def test_dataset_gives_batches_by_sample_number(whole, workers):
    batches = [[(100, 7), (101, 3), (102, 7)], [(50, 49), (51, 0)]]
    dataset = LatentDataset(LatentCache(whole), seed=5, flip=True)
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=batches, collate_fn=lambda b: b, num_workers=workers)
    for keys, batch in zip(batches, loader, strict=True):
        numbers, rows = np.array(keys).T
        mirrored = Draws(5, numbers, 1).uniform("flip").numpy() < 0.5
        np.testing.assert_array_equal(batch["moments"].numpy(), dataset.cache.gather(rows, mirrored)[0])
        assert batch["sample_number"].tolist() == numbers.tolist()
        assert batch["class_label"].tolist() == [row % 3 for row in rows]
        assert batch["caption"] == [f"picture {row} é" for row in rows]


def test_flip_is_fair_depends_on_the_number_and_can_be_off(whole):
    cache = LatentCache(whole)
    keys = [(number, 4) for number in range(1000)]
    plain = torch.from_numpy(cache.gather([4], np.array([False]))[0][0])
    flipped = [bool((row != plain).any()) for row in LatentDataset(cache, 0, True).__getitems__(keys)["moments"]]
    assert 430 < sum(flipped) < 570
    assert not any((row != plain).any() for row in LatentDataset(cache, 0, False).__getitems__(keys)["moments"])


def test_without_mirror_images_a_cache_is_the_plain_half_of_one_with_them(whole, tmp_path):
    plan, seen = dataclasses.replace(PLAN_FACTS, mirrored=False), []

    def counted(images):
        seen.append(len(images))
        return encode(images)

    build(tmp_path / "plain", plan, counted, Source(read))
    assert sum(seen) == 50
    cache, rows, side = LatentCache(tmp_path / "plain", plan), range(50), np.zeros(50, bool)
    for own, other in zip(cache.gather(rows, side), LatentCache(whole).gather(rows, side), strict=True):
        np.testing.assert_array_equal(own, other)
    mean, std = cache.gather(rows, side)[0].astype(np.float64).swapaxes(0, 1)
    np.testing.assert_allclose(cache.manifest.mean, mean.mean((0, 2, 3)), rtol=1e-12)
    variance = mean.var((0, 2, 3)) + (std**2).mean((0, 2, 3))
    np.testing.assert_allclose(cache.manifest.std, np.sqrt(variance), rtol=1e-12)
    sizes = [(folder / "shard-00000.bin").stat().st_size for folder in (tmp_path / "plain", whole)]
    assert sizes == [8 * (2 * 2 * 24 + 8), 8 * (4 * 2 * 24 + 8)]


def test_who_sees_no_mirror_images_takes_a_cache_with_them_and_not_the_other_way_round(whole, tmp_path):
    plain = dataclasses.replace(PLAN_FACTS, mirrored=False)
    assert LatentCache(whole, plain).plan == PLAN_FACTS
    assert build(whole, plain, encode, Source(read)).plan == PLAN_FACTS
    build(tmp_path / "plain", plain, encode, Source(read))
    with pytest.raises(DataError, match="mirrored: expected True, found False"):
        LatentCache(tmp_path / "plain", PLAN_FACTS)
    with pytest.raises(DataError, match="plain: holds no mirror images"):
        LatentDataset(LatentCache(tmp_path / "plain"), 0, flip=True)


def test_plans_with_mirror_images_are_written_and_named_as_before_there_was_a_choice():
    assert PLAN_FACTS.fingerprint() == "a8ca429b1e7ee1fb"
    assert "mirrored" not in PLAN_FACTS.to_dict()
    plain = dataclasses.replace(PLAN_FACTS, mirrored=False)
    assert plain.fingerprint() != PLAN_FACTS.fingerprint()
    assert CacheSpec.from_dict(plain.to_dict()) == plain


def test_no_labels_and_no_captions(tmp_path):
    plan = dataclasses.replace(PLAN_FACTS, num_classes=None, class_names=None, captions=False, num_items=5)
    build(tmp_path, plan, encode, Source(lambda item: {"image": pixels(item)}))
    batch = LatentDataset(LatentCache(tmp_path), 0, True).__getitems__([(0, 1)])
    assert set(batch) == {"moments", "sample_number"}


def test_broken_items_leave_no_hole(tmp_path):
    def some_broken(item):
        if item in (0, 9, 17):
            raise DataError(f"images/{item}.png: cannot be read")
        return read(item)

    with pytest.raises(DataError, match=r"(?s)3 items could not be read, 2 are allowed.*images/9.png"):
        build(tmp_path, PLAN_FACTS, encode, Source(some_broken, max_broken=2))
    manifest = build(tmp_path, PLAN_FACTS, encode, Source(some_broken, max_broken=3))
    cache = LatentCache(tmp_path)
    assert manifest.broken == [0, 9, 17]
    assert len(cache) == manifest.num_items == 47
    items = [item for item in range(50) if item not in manifest.broken]
    assert cache.items(range(47)).tolist() == items
    moments, labels = cache.gather(range(47), np.zeros(47, bool))
    assert labels.tolist() == [item % 3 for item in items]
    assert cache.captions([0, 46]) == ["picture 1 é", "picture 49 é"]
    whole_mean = moments[:, 0].astype(np.float64).mean((0, 2, 3))
    mirrored = cache.gather(range(47), np.ones(47, bool))[0][:, 0].astype(np.float64).mean((0, 2, 3))
    np.testing.assert_allclose(manifest.mean, (whole_mean + mirrored) / 2, rtol=1e-12)
    verify(tmp_path)


def test_nothing_left_is_an_error(tmp_path):
    def all_broken(item):
        raise DataError("gone")

    with pytest.raises(DataError, match="holds 50 items, 50 of them broken: 0 left"):
        build(tmp_path, PLAN_FACTS, encode, Source(all_broken, max_broken=50))


@pytest.mark.parametrize(("label", "found"), [(3, "3"), (-1, "-1"), (None, "None")])
def test_a_label_out_of_range_is_refused_by_name(tmp_path, label, found):
    source = Source(lambda item: {**read(item), "class_label": label}, name="images/{}.png".format)
    with pytest.raises(DataError, match=rf"images/0.png: class_label: expected 0 .. 2, found {found}"):
        build(tmp_path, PLAN_FACTS, encode, source)


@pytest.mark.parametrize("value", [65505.0, -1e6, float("inf"), float("nan")])
def test_moments_beyond_fp16_are_an_error(tmp_path, value):
    def diverged(images):
        mean, std = encode(images)
        mean[-1, 0, 0, 0] = value
        return mean, std

    with pytest.raises(DataError, match=r"images/3.png: posterior mean: expected magnitudes up to 65504"):
        build(tmp_path, PLAN_FACTS, diverged, Source(read, name="images/{}.png".format))
    assert not list(tmp_path.glob("shard*"))


def test_a_latent_of_another_shape_is_refused(tmp_path):
    def narrow(images):
        return tuple(part[..., :-1] for part in encode(images))

    with pytest.raises(DataError, match=r"latent shape: expected \(2, 4, 3\), found \(2, 4, 2\)"):
        build(tmp_path, PLAN_FACTS, narrow, Source(read))


# ---- building ----------------------------------------------------------------------------------------------------


def start(
    folder: Path, rank: int = 0, world_size: int = 1, delay: float = 0.0, diary: Path | None = None
) -> multiprocessing.Process:
    """A builder in a process of its own, which writes its id into `diary` for each batch that it encodes."""

    def slowly(images):
        time.sleep(delay)
        if diary is not None:
            with diary.open("a") as file:
                file.write(f"{os.getpid()} ")
        return encode(images)

    def work():
        torch.set_num_threads(1)
        build(folder, PLAN_FACTS, slowly, Source(read), rank, world_size)
        os._exit(0)  # no teardown of what was inherited from the test runner

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def finish(*processes: multiprocessing.Process) -> None:
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


@pytest.mark.parametrize("world", [2, 3])
def test_bytes_do_not_depend_on_the_world_size(whole, tmp_path, world):
    finish(*[start(tmp_path / "w", rank, world, delay=0.005) for rank in range(world)])
    assert content(tmp_path / "w") == content(whole)


def test_two_builders_that_do_not_know_of_each_other_share_the_work(whole, tmp_path):
    finish(*[start(tmp_path / "w", delay=0.05, diary=tmp_path / "diary") for _ in range(2)])
    assert content(tmp_path / "w") == content(whole)
    encoded_by = (tmp_path / "diary").read_text().split()
    assert len(encoded_by) == 2 * 13, "13 batches, plain and mirrored, each by one of the two alone"
    assert len(set(encoded_by)) == 2


def test_a_dead_ranks_share_is_taken_over(whole, tmp_path):
    other = start(tmp_path / "w", rank=1, world_size=2, delay=0.05)
    time.sleep(0.2)
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    build(tmp_path / "w", PLAN_FACTS, encode, Source(read), rank=0, world_size=2)
    assert content(tmp_path / "w") == content(whole)


def kill_until_done(folder: Path, rng: random.Random, world: int) -> int:
    """Start builders and kill one of them at a random moment, until one comes to the end; the number of kills."""
    kills = 0
    for attempt in range(200):
        builders = [start(folder, rank, world, delay=0.01) for rank in range(world)]
        # Later attempts may live longer: a busy machine takes more than a quarter of a second to start one and to sync.
        time.sleep(rng.uniform(0.0, 0.25 + 0.01 * attempt))
        for builder in builders:
            os.kill(builder.pid, signal.SIGKILL)
            builder.join()
        kills += sum(builder.exitcode == -signal.SIGKILL for builder in builders)
        if (folder / MANIFEST).exists():
            return kills
    raise AssertionError("no progress")


def check_killed(whole: Path, folder: Path, seed: int, world: int) -> int:
    kills = kill_until_done(folder, random.Random(seed), world)
    build(folder, PLAN_FACTS, encode, Source(read))
    # What a killed writer leaves of a shard is swept when that shard is claimed; of the rest when it is written.
    assert content(folder) == content(whole)
    verify(folder)
    return kills


@pytest.mark.parametrize("seed", [0, 1])
def test_a_build_killed_at_any_moment_goes_on_to_the_same_bytes(whole, tmp_path, seed):
    assert check_killed(whole, tmp_path / "k", seed, world=1 + seed) > 0


@pytest.mark.slow
def test_fifty_kills(whole, tmp_path):
    kills = 0
    for seed in range(10, 200):
        kills += check_killed(whole, tmp_path / str(seed), seed, world=1 + seed % 2)
        if kills >= 50:
            break
    assert kills >= 50


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_build_at_the_border_of_a_batch(whole, tmp_path, number):
    def asked(images):
        if len(list((tmp_path / "w").glob("shard*.json"))) == 2:
            os.kill(os.getpid(), number)
        return encode(images)

    def interrupted():
        signals.listen()
        build(tmp_path / "w", PLAN_FACTS, asked, Source(read))

    assert in_a_child(interrupted) == 128 + number
    assert len(list((tmp_path / "w").glob("shard*.json"))) == 2
    build(tmp_path / "w", PLAN_FACTS, encode, Source(read))
    assert content(tmp_path / "w") == content(whole)


def test_leftovers_of_a_dead_writer_are_swept(whole, tmp_path):
    names = (
        "shard-00003.bin.tmp.elsewhere.77",
        "shard-00003.json.tmp.here.1",
        "plan.json.tmp.x.1",
        "manifest.json.tmp.x.1",
    )
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    build(tmp_path, PLAN_FACTS, encode, Source(read))
    assert content(tmp_path) == content(whole)


def test_a_finished_cache_is_not_encoded_again(copy):
    build(copy, PLAN_FACTS, lambda x: pytest.fail("encoded again"), Source(lambda i: pytest.fail("read again")))


@pytest.mark.parametrize("name", ["shard-00002.bin", "shard-00002.json", MANIFEST])
def test_what_is_missing_is_built_again_alone(whole, copy, name):
    (copy / name).unlink()
    encoded = []

    def counting(images):
        encoded.append(len(images))
        return encode(images)

    build(copy, PLAN_FACTS, counting, Source(read))
    assert content(copy) == content(whole)
    assert sum(encoded) == (0 if name == MANIFEST else 16)


def test_the_begun_layout_holds(whole, copy):
    (copy / MANIFEST).unlink()
    (copy / "shard-00000.bin").unlink()
    build(copy, dataclasses.replace(PLAN_FACTS, shard_items=16, encode_batch=8), encode, Source(read))
    assert content(copy) == content(whole)


def test_threads_change_nothing(whole, tmp_path):
    build(tmp_path, PLAN_FACTS, encode, Source(read, threads=4))
    assert content(tmp_path) == content(whole)


def test_progress_counts_to_the_end(tmp_path):
    seen = []
    build(tmp_path, PLAN_FACTS, encode, Source(read), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (50, 50)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@given(st.integers(1, 10**8), st.integers(64, 10**6), st.integers(1, 256))
def test_shards_hold_whole_batches_and_stay_small(items, record, batch):
    size = shard_items(items, record, batch)
    assert size % batch == 0
    assert size == batch or (size - batch) * record <= 2**28
    assert size == batch or items / (size - batch) >= 256


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot build a latent cache there"):
        build(tmp_path / "file" / "cache", PLAN_FACTS, encode, Source(read))


def test_a_full_disk_is_a_resource_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"x.bin: cannot write the latent cache: No space left.*needed 3 bytes"):
        publish(tmp_path / "x.bin", b"abc")
    assert not list(tmp_path.iterdir())


def test_without_file_locks_the_build_still_works(whole, tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    build(tmp_path, PLAN_FACTS, encode, Source(read))
    assert content(tmp_path) == content(whole)


def test_claims_exclude_another_process(tmp_path):
    claims = Claims(tmp_path)
    with claims.take(3, tmp_path / "shard-00003.bin") as mine:
        assert mine
        reader, writer = os.pipe()
        if not (child := os.fork()):
            others = Claims(tmp_path)
            answers = []
            for number in (3, 4):
                with others.take(number, tmp_path / "x") as got:
                    answers.append(got)
            os.write(writer, bytes(answers))
            os._exit(0)
        os.waitpid(child, 0)
    claims.close()
    assert list(os.read(reader, 2)) == [0, 1]
    os.close(reader)
    os.close(writer)


# ---- refused -----------------------------------------------------------------------------------------------------

STALE = {
    "autoencoder.weights": {"autoencoder": {**PLAN_FACTS.autoencoder, "weights": "beef"}},
    "autoencoder.config.encoder.channels": {
        "autoencoder": {**PLAN_FACTS.autoencoder, "config": {"encoder": {"channels": 16}}}
    },
    "source": {"source": "abd"},
    "num_items": {"num_items": 51},
    "shape": {"shape": (2, 4, 4)},
    "dtype": {"dtype": "bfloat16"},
    "format": {"format": 2},
    "pixels.resolution": {"pixels": {**PLAN_FACTS.pixels, "resolution": 16}},
    "pixels.crop": {"pixels": {**PLAN_FACTS.pixels, "crop": "random"}},
    "pixels.interpolation": {"pixels": {**PLAN_FACTS.pixels, "interpolation": "nearest"}},
    "pixels.pixel_range": {"pixels": {**PLAN_FACTS.pixels, "pixel_range": [0.0, 1.0]}},
    "pixels.channels": {"pixels": {**PLAN_FACTS.pixels, "channels": 1}},
    "num_classes": {"num_classes": 4},
    "class_names": {"class_names": ["a", "b", "d"]},
    "captions": {"captions": False},
}


@pytest.mark.parametrize("key", STALE)
def test_a_stale_cache_is_refused_by_key(copy, key):
    wanted = dataclasses.replace(PLAN_FACTS, **STALE[key])
    assert wanted.fingerprint() != PLAN_FACTS.fingerprint()
    for attempt in (lambda: LatentCache(copy, wanted), lambda: build(copy, wanted, encode, Source(read))):
        with pytest.raises(DataError, match=rf"(?s){copy}.*\n  {key}: expected .*, found .*cache_latents.py") as caught:
            attempt()
        assert caught.value.exit_code == 3
        assert str(caught.value).count(": expected") == 1
    (copy / MANIFEST).unlink()
    with pytest.raises(DataError, match=rf"\n  {key}: expected"):
        build(copy, wanted, encode, Source(read))


def test_replaced_pictures_are_refused_and_a_cache_from_before_they_were_noticed_goes_on(tmp_path):
    now = dataclasses.replace(PLAN_FACTS, source="abc:contents:12")
    build(tmp_path / "old", PLAN_FACTS, encode, Source(read))
    assert build(tmp_path / "old", now, encode, Source(read)).plan == PLAN_FACTS
    LatentCache(tmp_path / "old", now)
    build(tmp_path / "new", now, encode, Source(read))
    LatentCache(tmp_path / "new", now)
    replaced = dataclasses.replace(PLAN_FACTS, source="abc:contents:13")
    with pytest.raises(DataError, match=r"\n  source: expected ':contents:13', found ':contents:12'"):
        LatentCache(tmp_path / "new", replaced)


def test_names_that_are_not_utf_8_are_sealed_and_read(tmp_path):
    """In class names, the autoencoder's path, the reasons of broken items, and captions; the rest is as ever."""
    name = os.fsdecode(b"caf\xe9")
    path = {**PLAN_FACTS.autoencoder, "path": f"logs/{name}"}
    plan = dataclasses.replace(PLAN_FACTS, class_names=["a", "b", name], autoencoder=path)

    def broken(item):
        if item == 7:
            raise DataError(f"{name}/7.png: cannot be read")
        return {**read(item), "caption": f"{name} é"}

    manifest = build(tmp_path / "cache", plan, encode, Source(broken, max_broken=1))
    assert manifest.broken == [7]
    assert verify(tmp_path / "cache") == Manifest.read(tmp_path / "cache") == manifest
    assert LatentCache(tmp_path / "cache", plan).captions([3]) == [f"{name} é"]
    assert read_sealed(tmp_path / "cache" / "shard-00000.json")["broken"] == {"7": f"{name}/7.png: cannot be read"}
    assert seal({"a": "é"}).startswith('{\n "a": "é"'.encode())
    for file in (tmp_path / "cache").glob("*.json"):
        file.read_text(encoding="utf-8")


def test_where_the_autoencoder_lies_is_not_compared(copy):
    moved = dataclasses.replace(PLAN_FACTS, autoencoder={**PLAN_FACTS.autoencoder, "path": "elsewhere"})
    LatentCache(copy, moved)


def test_a_cache_of_another_format_is_refused(copy):
    tree = read_sealed(copy / MANIFEST)
    tree["plan"]["format"] = 0
    (copy / MANIFEST).write_bytes(seal(tree))
    with pytest.raises(DataError, match=r"manifest.json: format: expected 1, found 0"):
        LatentCache(copy)


def test_a_shard_of_another_cache_is_found(copy, tmp_path):
    build(tmp_path / "other", PLAN_FACTS, lambda x: encode(x * 0.5), Source(read))
    for suffix in (".bin", ".json"):
        shutil.copy(tmp_path / "other" / f"shard-00001{suffix}", copy)
    with pytest.raises(DataError, match=r"shard-00001.bin: damaged: crc32: expected"):
        LatentCache(copy).gather([9], np.array([False]))
    with pytest.raises(DataError, match=r"shard-00001.bin: damaged"):
        verify(copy)


def test_an_unfinished_cache_is_refused(copy):
    (copy / MANIFEST).unlink()
    with pytest.raises(DataError, match=r"manifest.json: no such file.*cache_latents.py"):
        LatentCache(copy)


def test_verify_finds_every_flipped_bit(copy):
    verify(copy)
    rng = random.Random(0)
    files = [path for path in sorted(copy.iterdir()) if path.name != "claims"]
    weights = [path.stat().st_size for path in files]
    for trial in range(100):
        path = files[trial] if trial < len(files) else rng.choices(files, weights)[0]
        sound = path.read_bytes()
        hurt = bytearray(sound)
        hurt[rng.randrange(len(hurt))] ^= 1 << rng.randrange(8)
        path.write_bytes(hurt)
        with pytest.raises(DataError, match=path.name):
            verify(copy)
        path.write_bytes(sound)
    verify(copy)


def test_a_flipped_bit_is_found_at_the_first_read_of_its_shard(copy):
    path = copy / "shard-00004.bin"
    hurt = bytearray(path.read_bytes())
    hurt[1000] ^= 4
    path.write_bytes(hurt)
    cache = LatentCache(copy)
    cache.gather([0, 31], np.array([False, True]))
    with pytest.raises(DataError, match=r"shard-00004.bin: damaged: crc32: expected \w+, found \w+. Delete it"):
        cache.gather([0, 33], np.array([False, True]))


@pytest.mark.parametrize("name", ["shard-00002.bin", "shard-00002.json", MANIFEST, PLAN])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_found(copy, name, share):
    path = copy / name
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DataError, match=f"{name}: (truncated|damaged)"):
        verify(copy)
    if name.endswith(".bin"):
        with pytest.raises(DataError, match=f"{name}: truncated: bytes: expected"):
            LatentCache(copy)


def test_verify_names_all_damage(copy):
    (copy / "shard-00001.bin").unlink()
    (copy / "shard-00003.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"(?s)shard-00001.bin: missing.*shard-00003.bin: truncated"):
        verify(copy)


def test_damage_is_repaired_as_the_message_says(whole, copy):
    path = copy / "shard-00004.bin"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DataError, match=r"Delete it; `python scripts/cache_latents.py"):
        verify(copy)
    path.unlink()
    build(copy, PLAN_FACTS, encode, Source(read))
    assert content(copy) == content(whole)


def described(encoder: str | None, decoder: str) -> dict:
    hashes = {"weights": f"{encoder} {decoder}"} | ({} if encoder is None else {"encoder": encoder})
    return {**hashes, "config": {"encoder": {"width": 8}, "decoder": {"name": decoder}}, "path": decoder}


def test_another_decoder_of_the_same_encoder_is_as_good(whole):
    plan = Manifest.read(whole).plan
    first, second, other = (
        dataclasses.replace(plan, autoencoder=described(*one)) for one in (("a", "x"), ("a", "y"), ("b", "y"))
    )
    assert first.differences(second) == []
    assert any(line.startswith("autoencoder.weights") for line in first.differences(other))
    deeper = dataclasses.replace(second, autoencoder=described("a", "y") | {"config": {"encoder": {"width": 9}}})
    assert first.differences(deeper) == ["autoencoder.config.encoder.width: expected 8, found 9"]


def test_plans_that_do_not_know_their_encoder_are_compared_as_ever(whole):
    plan = Manifest.read(whole).plan
    old, same, new = (
        dataclasses.replace(plan, autoencoder=one)
        for one in (described(None, "x"), described(None, "x") | {"encoder": "a"}, described("a", "x"))
    )
    assert old.differences(same) == []
    assert old.fingerprint() == same.fingerprint()
    assert old.differences(new)


def test_a_scale_of_one_s_own_has_tensors_of_its_own():
    latents = torch.ones(1, 1, 1, 1)
    plan = CacheSpec((1, 1, 1), 1, "", {}, {"weights": "w"})
    manifest = Manifest(plan, mean=[0.0], std=[1.0], broken=[], shards=[])
    assert manifest.standardize(latents).item() == 1.0
    assert manifest.standardized_by(Statistics([0.0], [2.0])).standardize(latents).item() == 0.5
    assert manifest.standardize(latents).item() == 1.0


def test_the_autoencoder_is_where_the_one_at_hand_is(whole):
    """Trained again it may have the same weights: a cache is then found that names a run which has gone."""
    plan = Manifest.read(whole).plan
    made = dataclasses.replace(Manifest.read(whole), plan=dataclasses.replace(plan, autoencoder=described("a", "x")))
    found = made.decoded_by(described("a", "x") | {"path": "new"})
    assert found.plan.autoencoder == described("a", "x") | {"path": "new"}
    assert made.plan.differences(found.plan) == []
    assert made.decoded_by(described("a", "x")) is made
