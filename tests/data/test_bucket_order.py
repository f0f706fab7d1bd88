"""The order of buckets: the same in every layout, every item equally often, resumable anywhere, without a pattern."""

from itertools import chain, islice, pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ldm.data.bucket_order import BucketBatchSampler, BucketOrder, Rows, bucket_validation_batches
from ldm.errors import ConfigError, DataError
from ldm.randomness import KeyedBijection, StoredPermutation

unhurried = settings(deadline=None, max_examples=40)


@st.composite
def orders(draw) -> BucketOrder:
    number = draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(1, 40), min_size=number, max_size=number))
    sizes = draw(st.lists(st.integers(1, 9), min_size=number, max_size=number))
    return BucketOrder(lengths, sizes, draw(st.integers(0, 2**64 - 1)))


def numbers_of_batches(order: BucketOrder, steps: int) -> np.ndarray:
    """(steps + 1, buckets): how many batches of each bucket there are before each step."""
    taken = np.zeros((steps + 1, len(order.sizes)), dtype=np.int64)
    for step in range(steps):
        taken[step + 1, order.batch(step).bucket] += 1
    return taken.cumsum(0)


@unhurried
@given(order=orders())
def test_batches_follow_on_one_another(order):
    first, places = 0, [0] * len(order.sizes)
    for step in range(600):
        batch = order.batch(step)
        assert batch == (batch.bucket, places[batch.bucket], order.sizes[batch.bucket], first)
        first += batch.size
        places[batch.bucket] += batch.size


@unhurried
@given(order=orders(), steps=st.lists(st.integers(0, 2000), min_size=1, max_size=8))
def test_any_step_can_be_asked_for_in_any_order(order, steps):
    anew = BucketOrder(order.lengths, order.sizes, order.seed)
    walked = [anew.batch(step) for step in range(2001)]
    assert [order.batch(step) for step in steps] == [walked[step] for step in steps]


def test_far_from_the_start():
    order = BucketOrder([1_000_003, 77, 5_000], [64, 96, 128], seed=3)
    far = 10**12
    batches = [order.batch(step) for step in range(far - 300, far + 300)]
    for one, other in pairwise(batches):
        assert other.first == one.first + one.size
    for step in (far - 300, far, far + 299):
        batch = order.batch(step)
        assert order.step_of(batch.first) == order.step_of(batch.first + batch.size - 1) == step


@unhurried
@given(order=orders(), number=st.integers(0, 5000))
def test_the_step_of_a_sample_number(order, number):
    batch = order.batch(order.step_of(number))
    assert batch.first <= number < batch.first + batch.size


@unhurried
@given(order=orders())
def test_never_further_from_its_share_than_the_number_of_buckets(order):
    """The claim of the module's docstring: of f_b t batches by time t, one more or less; and t is the step, give or
    take the number of buckets."""
    steps, buckets = 1500, len(order.sizes)
    rates = [n / size for n, size in zip(order.lengths, order.sizes, strict=True)]
    shares = np.array(rates) / sum(rates)
    expected = np.arange(steps + 1)[:, None] * shares
    assert (np.abs(numbers_of_batches(order, steps) - expected) < 1 + buckets * shares + 1e-9).all()


@unhurried
@given(order=orders(), periods=st.integers(1, 2))
def test_all_items_are_visited_exactly_equally_often_over_a_period(order, periods):
    visits = np.zeros(sum(order.lengths), dtype=np.int64)
    assume(order.period * periods < 4000)
    for step in range(order.period * periods):
        batch = order.batch(step)
        np.add.at(visits, order.rows(batch, 0, batch.size), 1)
    assert len(set(visits.tolist())) == 1


def test_no_stretch_favors_a_bucket():
    """Any 200 steps visit items of each bucket as often as the others', give or take two batches of the bucket."""
    order = BucketOrder([300, 57, 120, 1000], [8, 8, 8, 8], seed=11)
    counts = numbers_of_batches(order, 20_000)
    images = (counts[200:] - counts[:-200]) * np.array(order.sizes)
    visits = images / np.array(order.lengths)
    expected = 200 * 8 / sum(order.lengths)
    assert (np.abs(visits - expected) * np.array(order.lengths) < 2.9 * np.array(order.sizes)).all()


def test_class_shares_do_not_shift():
    """A class that is rare in one bucket and common in another has its share of every thousand images."""
    order = BucketOrder([400, 100], [10, 10], seed=2)
    labels = np.concatenate([np.arange(400) % 10 == 0, np.arange(100) % 2 == 0])
    for start in range(0, 5000, 100):
        batches = [order.batch(step) for step in range(start, start + 100)]
        seen = [labels[row] for batch in batches for row in order.rows(batch, 0, batch.size)]
        assert abs(np.mean(seen) - labels.mean()) < 0.02


@pytest.mark.parametrize("of_items", [KeyedBijection(), StoredPermutation()])
def test_items_of_a_bucket_come_in_permutations(of_items):
    order = BucketOrder([12, 30], [5, 7], seed=4, order=of_items)
    streams: dict[int, list[int]] = {0: [], 1: []}
    for step in range(400):
        batch = order.batch(step)
        streams[batch.bucket] += order.rows(batch, 0, batch.size)
    for bucket, rows in ((0, range(12)), (1, range(12, 42))):
        epochs = [streams[bucket][place : place + len(rows)] for place in range(0, 10 * len(rows), len(rows))]
        assert all(sorted(epoch) == [*rows] for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 10


def test_two_equal_buckets_do_not_alternate():
    order = BucketOrder([100, 100], [10, 10], seed=0)
    buckets = np.array([order.batch(step).bucket for step in range(4000)])
    assert buckets.mean() == 0.5
    follows = (buckets[1:] != buckets[:-1]).mean()
    assert 0.55 < follows < 0.95  # both strict alternation (1) and long runs would be patterns
    for lag in range(1, 50):
        assert abs(np.corrcoef(buckets[lag:], buckets[:-lag])[0, 1]) < 0.6
    for lag in range(3, 50):
        assert abs(np.corrcoef(buckets[lag:], buckets[:-lag])[0, 1]) < 0.06


def test_a_rare_bucket_comes_at_any_place():
    """One in ten steps, at every place of ten alike but the ends, which have a neighbor on one side alone."""
    order = BucketOrder([90, 10], [1, 1], seed=5)
    places = np.array([step % 10 for step in range(20_000) if order.batch(step).bucket == 1])
    assert len(places) == pytest.approx(2000, abs=2)
    assert np.bincount(places, minlength=10) == pytest.approx([111, *[222] * 8, 111], abs=40)


def test_seeds_differ():
    first, other = ([BucketOrder([9, 9], [3, 3], seed).batch(step) for step in range(40)] for seed in (1, 2))
    assert first != other


def test_rows_name_their_bucket():
    numbered = Rows([3, 1, 0, 4])
    assert len(numbered) == 8
    found = [numbered.place(row) for row in range(8)]
    assert found == [(0, 0), (0, 1), (0, 2), (1, 0), (3, 0), (3, 1), (3, 2), (3, 3)]


def global_batches(order, world, pieces, step=0, seen=0, steps=6):
    """What all ranks together train on in each step."""
    ranks = [BucketBatchSampler(order, lambda: (step, seen), pieces, rank, world) for rank in range(world)]
    streams = [list(islice(rank, steps * pieces)) for rank in ranks]
    return [
        list(chain.from_iterable(stream[step * pieces + piece] for piece in range(pieces) for stream in streams))
        for step in range(steps)
    ]


@st.composite
def layouts(draw) -> tuple[BucketOrder, int, int]:
    """(order, world size, accumulation) that fit together."""
    world, pieces = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    number = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, 40), min_size=number, max_size=number))
    shares = draw(st.lists(st.integers(1, 4), min_size=number, max_size=number))
    return BucketOrder(lengths, [share * world * pieces for share in shares], draw(st.integers(0, 99))), world, pieces


@unhurried
@given(layout=layouts(), steps=st.integers(0, 7))
def test_every_layout_and_every_resume_trains_on_the_same_global_batches(layout, steps):
    order, world, pieces = layout
    whole = global_batches(order, 1, 1, steps=steps + 6)
    numbers = [number for batch in whole for number, _ in batch]
    assert numbers == list(range(len(numbers)))
    assert len({Rows(order.lengths).place(row)[0] for _, row in whole[0]}) == 1
    seen = sum(len(batch) for batch in whole[:steps])
    anew = BucketOrder(order.lengths, order.sizes, order.seed)
    assert global_batches(anew, world, pieces, step=steps, seen=seen) == whole[steps:]


def test_numbers_go_on_after_other_batch_sizes():
    """A run whose batch size was changed has seen another number of images than the order says."""
    order = BucketOrder([10, 20], [4, 6], seed=0)
    (batch, *_) = global_batches(order, 1, 1, step=5, seen=1000)
    assert [number for number, _ in batch] == list(range(1000, 1000 + order.batch(5).size))


def test_it_has_no_length():
    with pytest.raises(TypeError):
        len(BucketBatchSampler(BucketOrder([4], [2], 0)))


def test_addresses_are_plain_integers():
    ((number, row), *_) = next(iter(BucketBatchSampler(BucketOrder([4], [2], 0))))
    assert type(number) is type(row) is int


def test_what_cannot_be():
    with pytest.raises(DataError, match="0 batches"):
        BucketOrder([], [], 0)
    with pytest.raises(DataError, match="0 batches"):
        BucketOrder([4, 0], [2, 2], 0)
    with pytest.raises(ConfigError, match=r"batches of \[4, 6\] images cannot be divided among 2 ranks x 2"):
        BucketBatchSampler(BucketOrder([4, 4], [4, 6], 0), accumulation=2, world_size=2)


def test_periods():
    assert BucketOrder([40, 20], [10, 10], 0).period == 6  # an epoch in whole batches
    assert BucketOrder([7, 5], [4, 6], 0).period == 31  # 21 batches of 4 and 10 of 6: each item 12 times


@unhurried
@given(data=st.data(), world=st.integers(1, 5))
def test_validation_visits_each_item_once_in_equally_many_batches_of_one_bucket(data, world):
    lengths = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=5))
    micros = data.draw(st.lists(st.integers(1, 6), min_size=len(lengths), max_size=len(lengths)))
    ranks = [bucket_validation_batches(lengths, micros, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    for batch in chain.from_iterable(ranks):
        (bucket,) = {Rows(lengths).place(row)[0] for _, row in batch}
        assert all(number == row for number, row in batch)
        assert 0 < len(batch) <= micros[bucket]
    rows = [row for batch in chain.from_iterable(ranks) for _, row in batch]
    assert set(rows) == set(range(sum(lengths)))
    if world == 1 or sum(lengths) % world == 0:
        assert len(rows) == sum(lengths) * (1 if sum(lengths) >= world else world)
    elif sum(lengths) >= world:
        assert len(rows) < sum(lengths) + world
