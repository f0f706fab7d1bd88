"""What several ranks ask of a file system where they share a cache."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.errors import DataError
from ldm.latents import reader, writing
from ldm.latents.build import Source, build
from ldm.latents.manifest import CacheSpec, Manifest
from ldm.latents.reader import LatentCache, LatentDataset
from ldm.latents.shards import mapped
from ldm.runtime import distributed
from tests.forked import Forked

PLAN = CacheSpec((1, 2, 2), 40, "abc", {"resolution": 4}, {"weights": "0"}, shard_items=8, encode_batch=4)


def make(folder: Path) -> Manifest:
    def encode(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images[:, :, :2, :2], torch.ones(len(images), *PLAN.shape)

    source = Source(lambda item: {"image": torch.full((1, 4, 4), item / 40)})
    return build(folder, PLAN, encode, source, distributed.rank(), distributed.world_size())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "whole"
    make(folder)
    return folder


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sizes and sidecars that this process looks at, and what it merges."""
    calls: list[str] = []
    for module, name in ((writing, "check_size"), (writing, "read_sealed"), (reader, "check_sizes")):
        original = getattr(module, name)

        def wrapped(*args, name=name, original=original):
            calls.append(name)
            return original(*args)

        monkeypatch.setattr(module, name, wrapped)
    merged = writing.Writer.merged
    monkeypatch.setattr(writing.Writer, "merged", lambda self: calls.append("merged") or merged(self))
    return calls


def test_of_a_finished_cache_one_rank_of_a_machine_looks_at_the_shards(grouped: Forked, whole, monkeypatch):
    def work(rank: int) -> list[str]:
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        calls = watched(monkeypatch)
        cache = LatentCache(whole, PLAN, make(whole))
        assert len(cache) == 40
        assert cache.gather([3, 39], np.zeros(2, bool))[0].shape == (2, 2, *PLAN.shape)
        return calls

    assert grouped(2, work) == [["check_size", "read_sealed"] * PLAN.num_shards, []]


@pytest.mark.parametrize("lost", ["shard-00003.bin", "shard-00001.json"])
def test_what_one_rank_misses_all_build(grouped: Forked, whole, tmp_path, lost, monkeypatch):
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    (copy / lost).unlink()

    def work(rank: int) -> Manifest:
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        return make(copy)

    assert grouped(2, work) == [Manifest.read(whole)] * 2
    assert (copy / lost).read_bytes() == (whole / lost).read_bytes()


def test_one_rank_merges_and_the_others_read_its_manifest(grouped: Forked, whole, tmp_path, monkeypatch):
    def work(rank: int) -> tuple[Manifest, int]:
        calls = watched(monkeypatch)
        return make(tmp_path / "new"), calls.count("merged")

    manifests, merged = zip(*grouped(3, work), strict=True)
    assert list(manifests) == [Manifest.read(whole)] * 3
    assert sorted(merged) == [0, 0, 1]


def test_a_manifest_of_before_is_merged_anew(whole, tmp_path):
    """Not taken for one that another process has just written."""
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    (copy / "shard-00002.bin").unlink()
    before = (copy / "manifest.json").stat().st_ino
    assert make(copy) == Manifest.read(whole)
    assert (copy / "manifest.json").stat().st_ino != before


def test_a_shard_that_is_gone_after_that_is_told_when_it_is_touched(whole, tmp_path):
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    cache = LatentCache(copy, PLAN, make(copy))
    (copy / "shard-00004.bin").unlink()
    with pytest.raises(DataError, match=r"shard-00004.bin: missing: bytes: expected \d+, found None"):
        cache.gather([39], np.zeros(1, bool))


def test_without_broken_items_rows_are_not_listed(whole, monkeypatch):
    """A thousand million of them would take 45 GB of each rank."""
    cache = LatentCache(whole)
    monkeypatch.setattr(LatentCache, "items", lambda self, rows: pytest.fail("asked for all rows"))
    assert len(LatentDataset(cache, 0, True)) == 40


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="as Linux tells how memory is mapped")
def test_nothing_is_read_ahead_of_a_row(whole):
    """A row of 16 KB would bring up to megabytes from the disk with it."""
    file = whole / "shard-00000.bin"
    found = mapped(file)
    assert found.tobytes() == file.read_bytes()
    assert not found.flags.writeable
    entry = Path("/proc/self/smaps").read_bytes().split(b"%s\n" % os.fsencode(file))[1]  # other names are not all UTF-8
    flags = next(line for line in entry.splitlines() if line.startswith(b"VmFlags:"))
    assert b"rr" in flags.split()  # MADV_RANDOM
