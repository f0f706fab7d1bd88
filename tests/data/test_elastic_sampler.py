"""The elastic order: the same global batches in every layout, every item once an epoch, resumable anywhere."""

from itertools import chain, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.elastic_sampler import ElasticBatchSampler, accumulation, divisors, validation_batches
from ldm.errors import ConfigError, DataError
from ldm.randomness import STANDARD, KeyedBijection, Order, StoredPermutation

SIZES = st.integers(1, 40)
unhurried = settings(deadline=None, max_examples=50)  # other work on the machine is no failure


@st.composite
def layouts(draw) -> tuple[int, int, int]:
    """(batch size, world size, accumulation) that fit together."""
    world, pieces, micro = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    return world * pieces * micro, world, pieces


ORDERS = st.sampled_from([KeyedBijection(), StoredPermutation()])


def global_batches(length, batch_size, world, pieces, seed=5, seen=0, steps=4, order: Order = STANDARD.order):
    """What all ranks together train on in each step, as the optimizer sees it."""
    ranks = [
        ElasticBatchSampler(length, batch_size, seed, lambda: seen, pieces, rank, world, order) for rank in range(world)
    ]
    streams = [list(islice(rank, steps * pieces)) for rank in ranks]
    assert all(len(batch) == batch_size // world // pieces for stream in streams for batch in stream)
    return [
        list(chain.from_iterable(stream[step * pieces + piece] for piece in range(pieces) for stream in streams))
        for step in range(steps)
    ]


@unhurried
@given(length=SIZES, layout=layouts(), seed=st.integers(-5, 2**63), order=ORDERS)
def test_every_layout_trains_on_the_same_global_batches(length, layout, seed, order):
    batch_size, world, pieces = layout
    expected = global_batches(length, batch_size, 1, 1, seed, order=order)
    assert global_batches(length, batch_size, world, pieces, seed, order=order) == expected
    numbers = [number for batch in expected for number, _ in batch]
    assert numbers == list(range(4 * batch_size))


@unhurried
@given(length=SIZES, batch_size=SIZES, epoch=st.integers(0, 3), order=ORDERS)
def test_each_epoch_visits_each_item_once_in_its_own_order(length, batch_size, epoch, order):
    steps = -(-(epoch + 1) * length // batch_size)
    rows = list(chain.from_iterable(islice(ElasticBatchSampler(length, batch_size, 1, order=order), steps)))
    visited = [item for number, item in rows if number // length == epoch]
    assert visited == order(1, length)(range(epoch * length, (epoch + 1) * length))
    assert sorted(visited) == list(range(length))


@unhurried
@given(length=SIZES, layout=layouts(), steps=st.integers(0, 7), order=ORDERS)
def test_resuming_gives_the_tail(length, layout, steps, order):
    batch_size, world, pieces = layout
    whole = global_batches(length, batch_size, world, pieces, steps=steps + 3, order=order)
    resumed = global_batches(length, batch_size, world, pieces, seen=steps * batch_size, steps=3, order=order)
    assert resumed == whole[steps:]


def test_a_resume_may_change_the_world_size():
    whole = global_batches(7, 12, 1, 1, steps=4)
    assert global_batches(7, 12, 2, 3, steps=2) + global_batches(7, 12, 4, 1, seen=24, steps=2) == whole


def test_the_position_is_asked_anew_by_every_iteration():
    seen = 0
    sampler = ElasticBatchSampler(10, 4, seed=0, position=lambda: seen)
    assert next(iter(sampler))[0][0] == 0
    seen = 8
    assert next(iter(sampler))[0][0] == 8


def test_seeds_and_epochs_differ():
    first, other = (global_batches(30, 30, 1, 1, seed, steps=2) for seed in (1, 2))
    items = [[item for _, item in batch] for batch in (*first, *other)]
    assert len({tuple(batch) for batch in items}) == 4


def test_it_has_no_length():
    with pytest.raises(TypeError):
        len(ElasticBatchSampler(4, 2, 0))


@pytest.mark.parametrize("order", [KeyedBijection(), StoredPermutation()])
def test_addresses_are_plain_integers(order):
    ((number, item), *_) = next(iter(ElasticBatchSampler(4, 2, 0, order=order)))
    assert type(number) is int
    assert type(item) is int


def test_batches_that_cannot_be_shared():
    with pytest.raises(ConfigError, match="may be 1, 2, 5, 10"):
        ElasticBatchSampler(100, 10, 0, accumulation=3)
    with pytest.raises(
        ConfigError, match=r"10 cannot be divided among 4 ranks\. Use batch_size 8 or 12, .* 1, 2, 5, 10"
    ):
        accumulation(10, None, 4)
    with pytest.raises(ConfigError, match="Use batch_size 4, or"):
        accumulation(2, None, 4)
    with pytest.raises(ConfigError, match=r"micro_batch_size: 3 does not divide .* 1, 2, 5, 10"):
        accumulation(10, 3, 1)
    for batch_size, micro in ((0, None), (-4, None), (4, 0)):
        with pytest.raises(ConfigError, match="positive"):
            accumulation(batch_size, micro, 1)
    with pytest.raises(DataError, match="0 batches: the data set holds 0 items"):
        ElasticBatchSampler(0, 10, 0)


@unhurried
@given(micro=st.integers(1, 12), factor=st.integers(1, 12), world=st.integers(1, 12))
def test_accumulation_keeps_to_the_limit_with_the_fewest_pieces(micro, factor, world):
    batch_size = micro * factor * world
    pieces = accumulation(batch_size, micro, world)
    fitting = [p for p in divisors(batch_size // world) if batch_size // world // p <= micro]
    assert pieces == min(fitting)
    assert accumulation(batch_size, None, world) == 1


@unhurried
@given(length=st.integers(1, 60), micro=st.integers(1, 9), world=st.integers(1, 7))
def test_validation_visits_each_item_once_in_equally_many_batches(length, micro, world):
    ranks = [validation_batches(length, micro, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch for batches in ranks for batch in batches)
    assert all(number == item for batches in ranks for batch in batches for number, item in batch)
    items = [item for batches in ranks for batch in batches for _, item in batch]
    if length >= world:
        assert sorted(items) == list(range(length))
    else:
        assert all(sorted(item for batch in batches for _, item in batch) == list(range(length)) for batches in ranks)
    if length >= world * micro:
        sizes = [len(batch) for batches in ranks for batch in batches]
        # Fewer rounds than needed are made only where some rank would have nothing to do.
        rounds = -(-length // (world * micro))
        assert max(sizes) <= micro or rounds * world > length
        assert np.ptp(sizes) <= 1
