"""How much of a checkpoint each rank reads on resume, and that all ranks agree on which one is good."""

import os
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from ldm.checkpoints import store
from ldm.errors import CheckpointError
from ldm.run_folder import RunFolder
from ldm.runtime import fsdp
from ldm.training import fit
from ldm.training.callbacks.checkpoints import Checkpoints
from ldm.training.strategies import DDP, FSDP2
from tests.forked import Forked
from tests.points import Automatic, PointData, a_trainer

STRATEGIES = {
    "alone": lambda: "auto",
    "DDP": lambda: DDP(timeout=60),
    "FSDP2": lambda: FSDP2(timeout=60),
    "sharded": lambda: FSDP2(timeout=60, sharded_checkpoints=True),
}


class Wide(Automatic):
    """Enough weights for what else a process reads not to matter: a checkpoint of 36 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1 << 20)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, FSDP2):
            for layer in (self.layer, self.other):
                fsdp.shard(layer, self.device_mesh["data_parallel"])


def bytes_read() -> int:
    found = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    assert found is not None
    return int(found[1])


class Notes(pl.Callback):
    """How much this process has read, and from which step it goes on."""

    def __init__(self) -> None:
        self.before = bytes_read()
        self.read = self.step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.read, self.step = bytes_read() - self.before, trainer.global_step


class Refuses(pl.Callback):
    """Ends a run by the hook that it is given, as what checks a resumed run does."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._refuse)

    def _refuse(self, *_: Any) -> None:
        raise CheckpointError("refused")


def trains(rank: int, folder: Path, strategy: str, steps: int, named: Path | None = None) -> tuple[int, int]:
    """(bytes read until the first step, the step gone on from); -1, -1 if the checkpoints are refused."""
    notes, world = Notes(), 1 if strategy == "alone" else 2
    trainer = a_trainer(
        folder,
        steps,
        [notes, Checkpoints(every=1, keep=9)],
        devices=world,
        strategy=STRATEGIES[strategy](),
        enable_checkpointing=True,
    )
    try:
        fit.run(trainer, Wide(), PointData(4, seed=1), RunFolder(folder), named)
    except CheckpointError:
        return -1, -1
    return notes.read, notes.step


def size_of(folder: Path, step: int) -> int:
    """Bytes of a checkpoint and its shards."""
    file = folder / "checkpoints" / f"step={step:08d}.ckpt"
    return file.stat().st_size + sum(shard.stat().st_size for shard in file.parent.glob(f"{file.name}.*/*.safetensors"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_rank_verifies_and_each_reads_what_it_loads(forked: Forked, tmp_path: Path, strategy: str) -> None:
    run: Any = partial(trains, folder=tmp_path, strategy=strategy)
    world = 1 if strategy == "alone" else 2
    forked(world, partial(run, steps=2))
    size = size_of(tmp_path, 2)
    assert size > 30e6
    read = forked(world, partial(run, steps=3))
    assert [step for _, step in read] == [2] * world
    # What ranks take their rows of is mapped into memory and not read: what is counted of it is the verification.
    loads = 0 if strategy in ("FSDP2", "sharded") else 1
    assert [round(number / size, 1) for number, _ in read] == pytest.approx([1 + loads, loads][:world], abs=0.3)


@pytest.mark.parametrize("strategy", ["DDP", "sharded"])
def test_all_ranks_fall_back_to_the_same_checkpoint_or_refuse_together(
    forked: Forked, tmp_path: Path, strategy: str
) -> None:
    run: Any = partial(trains, folder=tmp_path, strategy=strategy)
    forked(2, partial(run, steps=2))
    for damaged, expected in (([2], 1), ([1, 2], -1)):
        for step in damaged:
            file = tmp_path / "checkpoints" / f"step={step:08d}.ckpt"
            shards = store.shards_of(file)
            flip(max(shards.glob("*.safetensors")) if shards else file)
        assert [found for _, found in forked(2, partial(run, steps=2))] == [expected] * 2
    assert len(list(tmp_path.rglob("*.corrupt"))) == 2


@pytest.mark.parametrize("error", [CheckpointError("a.ckpt: was replaced"), KeyError("a bug")], ids=["known", "bug"])
@pytest.mark.parametrize("guilty", [0, 1])
def test_a_checkpoint_that_one_rank_alone_cannot_load_ends_all(
    forked: Forked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guilty: int, error: Exception
) -> None:
    run: Any = partial(trains, folder=tmp_path, strategy="DDP")
    forked(2, partial(run, steps=1))
    load = store.load

    def work(rank: int) -> Any:
        def fails(*_: Any) -> Any:
            raise error

        monkeypatch.setattr(store, "load", fails if rank == guilty else load)
        try:
            return run(rank, steps=2)
        except KeyError:
            return "a bug"

    found = forked(2, work)
    refused = (-1, -1)
    assert found[1 - guilty] == refused
    assert found[guilty] == (refused if isinstance(error, CheckpointError) else "a bug")
    state = RunFolder(tmp_path).read_state()
    assert state is not None
    assert state.status == "failed"
    if isinstance(error, CheckpointError):
        assert state.exit_code == 4


def test_a_rank_that_takes_long_to_load_is_waited_for(
    forked: Forked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Any = partial(trains, folder=tmp_path)
    forked(2, partial(run, strategy="DDP", steps=1))
    monkeypatch.setitem(STRATEGIES, "hasty", lambda: DDP(timeout=4))
    load = store.load

    def work(rank: int) -> Any:
        def slow(*own: Any) -> Any:
            time.sleep(rank * 8.0)
            return load(*own)

        monkeypatch.setattr(store, "load", slow)
        return run(rank, strategy="hasty", steps=2)

    assert [step for _, step in forked(2, work)] == [1, 1]


def test_an_average_alone_is_not_gone_on_from(tmp_path: Path) -> None:
    trains(0, tmp_path, "alone", 1)
    state = store.load(store.verify(tmp_path))
    named = tmp_path / "averages" / "std=0.1.ckpt"
    store.save(named, {"state_dict": state["state_dict"], "ldm": state.get("ldm", {})})
    with pytest.raises(CheckpointError, match=r"std=0\.1\.ckpt: holds weights alone: sample from it"):
        fit.run(
            a_trainer(tmp_path, 2, enable_checkpointing=True), Wide(), PointData(4, seed=1), RunFolder(tmp_path), named
        )


def flip(file: Path) -> None:
    """One bit in its middle."""
    with file.open("r+b") as handle:
        handle.seek(file.stat().st_size // 2)
        byte = handle.read(1)[0]
        handle.seek(-1, os.SEEK_CUR)
        handle.write(bytes([byte ^ 8]))


@pytest.mark.parametrize("strategy", ["alone", "DDP"])
def test_a_named_checkpoint_is_gone_on_from_and_later_ones_are_set_aside(
    forked: Forked, tmp_path: Path, strategy: str
) -> None:
    run: Any = partial(trains, folder=tmp_path, strategy=strategy)
    world = 1 if strategy == "alone" else 2
    forked(world, partial(run, steps=3))
    named = tmp_path / "checkpoints" / "step=00000002.ckpt"
    for name, step in (("step=00000002", 2), ("step=00000003", 3), ("std=0.05", 3)):
        store.save(tmp_path / "averages" / f"{name}.ckpt", {"ldm": {"step": step}})
    read = forked(world, partial(run, steps=4, named=named))
    assert [step for _, step in read] == [2] * world
    assert read[0][0] < 2.3 * size_of(tmp_path, 2)
    assert (tmp_path / "checkpoints" / "step=00000003.ckpt.superseded").is_file()
    kept = ["std=0.05.ckpt", "step=00000002.ckpt", "step=00000003.ckpt.superseded"]
    assert sorted(path.name for path in (tmp_path / "averages").iterdir()) == kept
    assert store.newest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step=00000004.ckpt"
    state = RunFolder(tmp_path).read_state()
    assert state is not None
    assert state.resume_from == "checkpoints/step=00000004.ckpt"


@pytest.mark.parametrize("hook", ["on_load_checkpoint", "on_train_start"])
def test_a_resume_that_is_refused_sets_nothing_aside(tmp_path: Path, hook: str) -> None:
    trains(0, tmp_path, "alone", 3)
    folder = RunFolder(tmp_path)
    (folder.checkpoints / "best.ckpt").symlink_to("step=00000003.ckpt")
    before = {file.name for file in folder.checkpoints.iterdir()}
    named = folder.checkpoints / "step=00000002.ckpt"
    trainer = a_trainer(tmp_path, 4, [Refuses(hook)], enable_checkpointing=True, limit_val_batches=1)
    with pytest.raises(CheckpointError, match="refused"):
        fit.run(trainer, Wide(), PointData(4, seed=1), folder, named)
    assert {file.name for file in folder.checkpoints.iterdir()} == before
    state = folder.read_state()
    assert state is not None
    assert state.resume_from == "checkpoints/step=00000003.ckpt"


def test_a_validation_without_training_sets_nothing_aside(tmp_path: Path) -> None:
    trains(0, tmp_path, "alone", 3)
    folder = RunFolder(tmp_path)
    before = {file.name for file in folder.checkpoints.iterdir()}
    trainer = a_trainer(tmp_path, 4, enable_checkpointing=True, limit_val_batches=1)
    fit.validate(trainer, Wide(), PointData(4, seed=1), folder, folder.checkpoints / "step=00000002.ckpt")
    assert {file.name for file in folder.checkpoints.iterdir()} == before
