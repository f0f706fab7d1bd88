"""Features on disk: the same rows whoever computes them, how often that is interrupted, and in which batches."""

import os
import signal
import time

import numpy as np
import pytest
import torch

from ldm.errors import DataError, NumericError, PeerError, ResourceError
from ldm.evaluation import feature_store
from ldm.evaluation.feature_store import BLOCK, Column, FeatureStore, column
from tests.evaluation.spaces import Projection

NUMBER = 2 * BLOCK + 40


def picture(index: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(index).integers(0, 256, (3, 4, 4), dtype=np.uint8))


def make(indices) -> torch.Tensor:
    return torch.stack([picture(index) for index in indices])


def filled(root, number=NUMBER, batch_size=64, space=None, make=make) -> np.ndarray:
    space = space or Projection()
    store = FeatureStore({"kind": "test"}, number, root)
    store.fill(make, [column(space)], batch_size)
    return store.table(column(space).key).array()


def test_rows_are_those_of_the_pictures_in_order(tmp_path):
    rows = filled(tmp_path)
    assert rows.shape == (NUMBER, 15)
    assert np.array_equal(rows[300:303], Projection()(make(range(300, 303))).numpy())


def test_batches_and_ranks_change_nothing(tmp_path, forked):
    alone = filled(tmp_path / "alone")
    assert np.array_equal(alone, filled(tmp_path / "small", batch_size=7))

    def work(rank):
        def together(indices):  # or a rank that starts late finds all blocks done
            (tmp_path / f"rank {rank} has begun").touch()
            while not (tmp_path / f"rank {1 - rank} has begun").exists():
                time.sleep(0.01)
            return make(indices)

        space = Projection()
        rows = filled(tmp_path / "ranks", batch_size=7, space=space, make=together)
        return rows, space.seen

    results = forked(2, work)
    assert all(np.array_equal(alone, rows) for rows, _ in results)
    assert sum(seen for _, seen in results) == NUMBER
    assert all(seen for _, seen in results)
    names = [sorted(path.name for path in (tmp_path / one).rglob("*.npy")) for one in ("alone", "small", "ranks")]
    assert names[0] == names[1] == names[2]


def test_what_is_there_is_not_made_again_and_a_store_grows(tmp_path):
    space = Projection()
    few = filled(tmp_path, 100, space=space)
    assert space.seen == 100
    assert np.array_equal(filled(tmp_path, NUMBER, space=space)[:100], few)
    assert space.seen == 100 + NUMBER
    assert len(filled(tmp_path, 100, space=space)) == 100
    assert space.seen == 100 + NUMBER


def test_each_picture_is_made_once_for_all_columns(tmp_path):
    made = []

    def counted(indices):
        made.extend(indices)
        return make(indices)

    spaces = [Projection(), Projection("other/none", 4)]
    store = FeatureStore({"kind": "test"}, NUMBER, tmp_path)
    store.fill(counted, [column(space) for space in spaces])
    assert made == [*range(NUMBER)]
    assert [store.table(column(space).key).array().shape[1] for space in spaces] == [15, 11]


def test_killed_and_started_again(tmp_path):
    """At the third block; what was finished stays, and nothing half written is read."""
    child = os.fork()
    if child == 0:
        store = FeatureStore({"kind": "test"}, 4 * BLOCK, tmp_path)
        store.fill(lambda few: make(few) if few[0] < 2 * BLOCK else time.sleep(100), [column(Projection())])
        os._exit(1)
    while len([*tmp_path.rglob("0*.npy")]) < 2:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (folder,) = tmp_path.iterdir()
    (folder / f"00003.{column(Projection()).key}.npy").write_bytes(b"\x93NUMPY cut")
    (folder / f"00002.{column(Projection()).key}.npy.tmp.elsewhere.1").write_bytes(b"half")
    space = Projection()
    rows = filled(tmp_path, 4 * BLOCK, space=space)
    assert space.seen == 2 * BLOCK
    assert np.array_equal(rows, filled(tmp_path / "whole", 4 * BLOCK))
    assert not [*tmp_path.rglob("*.tmp.*")]


def test_a_block_that_has_become_shorter_is_not_taken_for_whole(tmp_path):
    """As another process may leave it, where the file system has no locks."""
    space = Projection()
    store = FeatureStore({"kind": "test"}, 40, tmp_path)
    store.fill(make, [column(space)])
    file = store.path(0, column(space).key)
    np.save(file, np.load(file)[:30])
    with pytest.raises(DataError, match=r"00000.*npy: expected 40 rows, found 30; the same command computes them"):
        store.table(column(space).key).array()
    assert len(filled(tmp_path, 40)) == 40


def test_features_that_are_not_finite_write_nothing(tmp_path):
    broken = Column("0" * 16, lambda images: images.float().flatten(1) / 0, "broken/none")
    store = FeatureStore({"kind": "test"}, 10, tmp_path)
    with pytest.raises(NumericError, match=r"broken/none: not finite for one of the pictures 0 to 9"):
        store.fill(lambda few: torch.zeros(len(few), 1, 2, 2), [broken])
    assert not [*tmp_path.rglob("*.npy")]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(ResourceError, match="cannot build a store of features there"):
        filled(tmp_path / "taken")


def test_others_are_waited_for_with_bounded_patience(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "PATIENCE", 0.5)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:

        def hang(few):
            os.write(write, b".")
            time.sleep(100)

        FeatureStore({"kind": "test"}, 10, tmp_path).fill(hang, [column(Projection())])
        os._exit(1)
    os.read(read, 1)
    try:
        with pytest.raises(PeerError, match="1 blocks are claimed by other processes"):
            filled(tmp_path, 10)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert len(filled(tmp_path, 10)) == 10
