"""Shard files and what the store makes of them: all shards or no checkpoint, and a damaged one is never loaded."""

import json
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY

from ldm.checkpoints import sealed_file, shards, store, writer
from ldm.errors import CheckpointError, NumericError, PeerError, ResourceError

WORLD = 2
NAME = "step=4.ckpt"


def whole(step: int) -> dict[str, Any]:
    """A checkpoint as one process would save it; three rows, so that the second rank has fewer than the first."""
    weights = {"a": torch.arange(6.0).reshape(3, 2) + step, "b": torch.full((1,), 1.5, dtype=torch.bfloat16)}
    moments = {"exp_avg": torch.arange(6.0).reshape(3, 2) - step, "step": torch.tensor(float(step))}
    return {
        "state_dict": {**weights, "plain": torch.ones(2)},
        "optimizer_states": [{"state": {0: moments}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "global_step": step,
        "nothing": None,
    }


def share(rank: int, step: int = 4, token: str = "0", timeout: float = 20.0) -> dict[str, Any]:
    """The same as rank `rank` of two saves it."""
    state = whole(step)
    sharded = {
        "state_dict.a": state["state_dict"]["a"],
        "state_dict.b": state["state_dict"]["b"],
        "optimizer_states[0].state.0.exp_avg": state["optimizer_states"][0]["state"][0]["exp_avg"],
    }
    state["state_dict"].update(a=None, b=None)
    state["optimizer_states"][0]["state"][0]["exp_avg"] = None
    first = {key: min(rank * -(-len(tensor) // WORLD), len(tensor)) for key, tensor in sharded.items()}
    rows = {key: tensor.chunk(WORLD)[rank] if len(tensor) > rank else tensor[:0] for key, tensor in sharded.items()}
    place = {"folder": f"{NAME}.{token}{shards.SUFFIX}", "rank": rank, "world": WORLD, "timeout": timeout}
    offsets = {key: [first[key], *[0] * (tensor.ndim - 1)] for key, tensor in sharded.items()}
    return {**state, "shard": {**place, "tensors": rows, "offsets": offsets}}


def save(path: Path, step: int = 4, token: str = "0") -> None:
    with ThreadPoolExecutor(WORLD) as ranks:
        list(ranks.map(lambda rank: store.save(path, share(rank, step, token)), range(WORLD)))


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same(ours[name], theirs[name]) for name in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def test_it_loads_as_what_one_process_would_have_saved(tmp_path):
    save(tmp_path / NAME)
    assert same(store.load(tmp_path / NAME), whole(4))
    rest = store.load(tmp_path / NAME, read_shards=lambda folder: {})
    assert rest["state_dict"]["a"] is None
    assert sorted(sealed_file.read(tmp_path / NAME)["shards"]["files"]) == [
        f"rank-0000{rank}-of-00002.safetensors" for rank in range(WORLD)
    ]
    assert store.newest(tmp_path) == tmp_path / NAME


def test_the_key_is_the_one_that_torch_reads():
    assert shards.OFFSETS == CUSTOM_METADATA_KEY


def test_every_kind_of_damage_to_a_shard_is_found(tmp_path):
    store.save(tmp_path / "step=3.ckpt", whole(3))
    draw = random.Random(0)
    for round_ in range(30):
        save(tmp_path / NAME, token=str(round_))
        victim = draw.choice(sorted(tmp_path.glob(f"*.{round_}{shards.SUFFIX}/*.safetensors")))
        good = victim.read_bytes()
        if round_ == 0:
            victim.unlink()
        elif round_ == 1:
            victim.write_bytes(good[:-1])
        else:
            place = draw.randrange(len(good))
            victim.write_bytes(good[:place] + bytes([good[place] ^ 1 << draw.randrange(8)]) + good[place + 1 :])
        with pytest.raises(CheckpointError, match=victim.name):
            store.load(tmp_path / NAME)
    assert store.newest(tmp_path) == tmp_path / "step=3.ckpt"
    assert (tmp_path / f"{NAME}.corrupt").exists()


@pytest.mark.parametrize("replaced", ["flipped", "removed"])
def test_a_shard_that_changes_after_the_verification_is_found(tmp_path, replaced):
    save(tmp_path / NAME)
    verified = store.verify(tmp_path / NAME)
    shard = next(tmp_path.rglob("rank-00001-of-*.safetensors"))
    data, times = bytearray(shard.read_bytes()), shard.stat()
    data[-1] ^= 1
    if replaced == "flipped":
        shard.write_bytes(data)
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    else:
        shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        store.load(verified)


def test_a_shard_that_changes_while_it_is_read_is_found(tmp_path):
    save(tmp_path / NAME)

    def replaces(folder: Path) -> dict[str, Any]:
        shard = next(folder.glob("*.safetensors"))
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        return {}

    with pytest.raises(CheckpointError, match="replaced while it was read"):
        store.load(tmp_path / NAME, replaces)


def test_a_shard_may_be_linked_or_touched_while_it_is_read(tmp_path):
    save(tmp_path / NAME)

    def backs_up(folder: Path) -> dict[str, Any]:
        shard = next(folder.glob("*.safetensors"))
        os.link(shard, tmp_path / "backup")
        shard.touch()
        (tmp_path / NAME).chmod(0o400)
        return {}

    assert store.load(tmp_path / NAME, backs_up)


def test_the_old_shards_go_when_the_new_ones_are_sealed(tmp_path):
    for step, token in ((4, "0"), (5, "1")):
        save(tmp_path / NAME, step, token)
    assert sorted(os.listdir(tmp_path)) == [NAME, f"{NAME}.1{shards.SUFFIX}"]
    assert same(store.load(tmp_path / NAME), whole(5))
    store.remove(tmp_path / NAME)
    assert not os.listdir(tmp_path)


def test_waiting_for_many_ranks_asks_for_one_file_at_a_time(tmp_path, monkeypatch):
    notes = [tmp_path / f"rank-{rank:05d}-of-00100.json" for rank in range(100)]
    written, asked = iter(notes), []

    def sleep(seconds: float) -> None:
        next(written).write_text('{"crc32": "0"}')

    exists = Path.exists
    monkeypatch.setattr(shards.time, "sleep", sleep)
    monkeypatch.setattr(Path, "exists", lambda file: asked.append(file) or exists(file))
    assert len(shards.await_all(tmp_path, 100, 60.0)) == 100
    assert len(asked) == 200  # each once in vain


def test_a_rank_that_never_writes_is_missed_and_the_old_file_stands(tmp_path):
    save(tmp_path / NAME)
    with pytest.raises(PeerError, match=r"0\.1 s.*rank-00001"):
        store.save(tmp_path / NAME, share(0, 5, "1", timeout=0.1))
    assert same(store.load(tmp_path / NAME), whole(4))
    assert sorted(os.listdir(tmp_path)) == [NAME, f"{NAME}.0{shards.SUFFIX}"]


def test_a_weight_that_is_not_finite_on_one_rank_is_no_checkpoint_on_any(tmp_path):
    bad = share(1)
    bad["shard"]["tensors"]["state_dict.a"] = torch.full((1, 2), float("nan"))
    with pytest.raises(NumericError, match=r"state_dict\.a"):
        store.save(tmp_path / NAME, bad)
    with pytest.raises(NumericError, match=r"rank-00001.*state_dict\.a"):
        store.save(tmp_path / NAME, share(0))
    assert not os.listdir(tmp_path)


def test_a_full_disk_on_one_rank_is_told_to_the_main_one(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "save_file", full)
        with pytest.raises(ResourceError, match="No space left"):
            store.save(tmp_path / NAME, share(1))
    with pytest.raises(ResourceError, match=r"rank-00001.*No space left"):
        store.save(tmp_path / NAME, share(0))
    assert not os.listdir(tmp_path)


def test_sweep_removes_shards_that_no_checkpoint_names(tmp_path):
    save(tmp_path / NAME)
    store.save(tmp_path / NAME, share(1, 5, "1"))  # and rank 0 was killed
    assert writer.sweep(tmp_path) == [tmp_path / f"{NAME}.1{shards.SUFFIX}"]
    (tmp_path / NAME).rename(tmp_path / f"{NAME}.superseded")
    assert writer.sweep(tmp_path) == []  # it can be put back
    (tmp_path / f"{NAME}.superseded").unlink()
    assert writer.sweep(tmp_path) == [tmp_path / f"{NAME}.0{shards.SUFFIX}"]
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["../elsewhere.shards", "/tmp/x.shards", "plain", "link.shards"])
def test_a_file_cannot_send_us_elsewhere(tmp_path, name):
    inside, outside = tmp_path / "inside", tmp_path / "elsewhere.shards"
    for folder in (inside, outside):
        folder.mkdir()
    (inside / "link.shards").symlink_to(outside)
    path = inside / NAME
    store.save(path, whole(4) | {"shards": {"folder": name, "files": {}}})
    with pytest.raises(CheckpointError, match="folder of shards"):
        store.load(path)
    store.remove(path)
    assert outside.exists()


@pytest.mark.parametrize("rounds", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_kill_9_of_either_rank_leaves_a_good_checkpoint(tmp_path, rounds):
    draw = random.Random(0)
    folder = tmp_path / "checkpoints"
    save(folder / NAME, 0, "first")
    for round_ in range(rounds):
        children = []
        for rank in range(WORLD):
            child = os.fork()
            if child == 0:
                for step in range(1, 10_000):
                    store.save(folder / NAME, share(rank, step, f"{round_}-{step}"))
                os._exit(0)
            children.append(child)
        time.sleep(draw.uniform(0.01, 0.15))
        draw.shuffle(children)
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        state = store.load(folder / NAME)
        assert same(state, whole(state["global_step"]))
        writer.sweep(folder)
        (kept,) = folder.glob(f"*{shards.SUFFIX}")
        assert sorted(os.listdir(folder)) == [NAME, kept.name]
        assert json.loads((kept / "rank-00001-of-00002.json").read_text()).keys() == {"crc32"}
