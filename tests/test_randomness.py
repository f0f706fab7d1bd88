"""Addressable randomness: right distributions, independence of everything but the address, and bit-exactness.

Every number here is a function of constants, so the statistical bounds either always hold or never.
"""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.normals import GeneratorPerRow
from ldm.randomness import Draws, KeyedBijection, StoredPermutation, ambient, bijected, keys, permutation

SEEDS = st.integers(-(2**70), 2**70)
unhurried = settings(deadline=None, max_examples=50)  # other work on the machine is no failure


def sigmas(values: np.ndarray, mean: float, deviation: float) -> float:
    """How many standard errors the average of `values` lies from `mean`."""
    return abs(float(np.mean(values)) - mean) / deviation * math.sqrt(np.size(values))


class TestKeys:
    def test_every_bit_is_fair_and_independent_of_the_others(self):
        bits = np.unpackbits(keys(0, "test", np.arange(40_000)).view(np.uint8).reshape(-1, 8), axis=1).astype(float)
        assert bits.shape == (40_000, 64)
        assert max(sigmas(column, 0.5, 0.5) for column in bits.T) < 4.5
        correlation = np.corrcoef(bits.T) - np.eye(64)
        assert np.abs(correlation).max() * math.sqrt(40_000) < 5

    @pytest.mark.parametrize("change", ["number", "seed", "purpose"])
    def test_the_smallest_change_flips_half_of_the_bits(self, change):
        numbers = np.arange(10_000)
        before = keys(5, "noise", numbers)
        after = {
            "number": lambda: keys(5, "noise", numbers + 1),
            "seed": lambda: keys(6, "noise", numbers),
            "purpose": lambda: keys(5, "noisf", numbers),
        }[change]()
        flipped = np.unpackbits((before ^ after).view(np.uint8))
        assert sigmas(flipped, 0.5, 0.5) < 4
        assert not np.any(before == after)

    def test_no_collisions(self):
        purposes = ("noise", "timestep", "posterior", "order", "augment")
        all_keys = [keys(seed, purpose, np.arange(5_000)) for seed in range(5) for purpose in purposes]
        assert len(np.unique(np.concatenate(all_keys))) == 5 * 5 * 5_000

    def test_seeds_are_no_shifted_numbers(self):
        # The stream of seed s + 1 must not be that of seed s some places later.
        stream = set(keys(1, "noise", np.arange(20_000)).tolist())
        assert not stream & set(keys(2, "noise", np.arange(20_000)).tolist())

    @unhurried
    @given(seed=SEEDS, numbers=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=8))
    def test_elementwise(self, seed, numbers):
        together = keys(seed, "noise", numbers)
        assert together.dtype == np.uint64
        assert together.shape == (len(numbers),)
        assert together.tolist() == [int(keys(seed, "noise", number)[0]) for number in numbers]

    def test_these_keys_for_ever(self):
        # A run resumed by a later version is the same run only while this holds.
        assert keys(0, "noise", 0).tolist() == [0xFA17DF9A91F9DE29]
        assert keys(42, "timestep", 123_456_789).tolist() == [0xBE3A0CEC5ABBBC04]


class TestPermutation:
    @unhurried
    @given(seed=SEEDS, epoch=st.integers(0, 1000), length=st.integers(1, 300))
    def test_visits_each_item_once(self, seed, epoch, length):
        order = permutation(seed, epoch, length)
        assert order.dtype == np.int64
        assert sorted(order) == list(range(length))
        assert (order == permutation(seed, epoch, length)).all()

    def test_all_orders_are_equally_likely(self):
        counts = dict.fromkeys(itertools.permutations(range(4)), 0)
        for epoch in range(4_800):
            counts[tuple(permutation(7, epoch, 4).tolist())] += 1
        chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
        assert 8 < chi_square < 45  # 23 degrees of freedom: mean 23, deviation 6.8

    def test_seeds_and_epochs_give_unrelated_orders(self):
        orders = np.stack([permutation(seed, epoch, 2_000) for seed in range(3) for epoch in range(3)])
        correlation = np.corrcoef(orders) - np.eye(9)
        assert np.abs(correlation).max() * math.sqrt(2_000) < 4


class TestOrders:
    def test_a_stored_one_is_the_permutations_one_after_the_other(self):
        expected = np.concatenate([permutation(5, epoch, 7) for epoch in range(9)]).tolist()
        assert StoredPermutation()(5, 7)(range(63)) == expected
        assert StoredPermutation()(5, 7)([62, 0, 20]) == [expected[place] for place in (62, 0, 20)]

    @pytest.mark.parametrize("length", range(1, 301))
    def test_a_bijection_of_each_length(self, length):
        found = bijected(7, length, np.arange(3 * length)).reshape(3, length)
        assert found.dtype == np.int64
        assert (np.sort(found) == np.arange(length)).all()

    @unhurried
    @given(
        seed=SEEDS,
        length=st.one_of(st.integers(1, 300), st.integers(1, 2**40)),
        places=st.lists(st.integers(0, 2**50), min_size=1, max_size=20),
    )
    def test_each_place_by_itself(self, seed, length, places):
        items = KeyedBijection()(seed, length)
        together = items(places)
        assert all(type(item) is int and 0 <= item < length for item in together)
        assert together == [item for place in places for item in items([place])]

    @pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 7])
    def test_all_orders_are_equally_likely(self, length):
        every = math.factorial(length)
        # Few places at a time, whose keys fit the processor's cache: 3 s for 20.
        parts = np.array_split(np.arange(200 * every * length), 1 + every * length // 20)
        found = np.concatenate([bijected(1, length, part) for part in parts]).reshape(-1, length)
        _, counts = np.unique(found @ length ** np.arange(length), return_counts=True)
        assert len(counts) == every
        chi_square = ((counts - 200) ** 2 / 200).sum()
        assert abs(chi_square - (every - 1)) / math.sqrt(2 * (every - 1)) < 4

    @pytest.mark.parametrize("length", [50, 101, 256])
    def test_each_item_is_as_often_in_each_place(self, length):
        epochs = 4_000
        found = bijected(2, length, np.arange(epochs * length)).reshape(epochs, length)
        counts = np.stack([np.bincount(place, minlength=length) for place in found.T])
        freedom, mean = (length - 1) ** 2, epochs / length
        assert abs(((counts - mean) ** 2 / mean).sum() - freedom) / math.sqrt(2 * freedom) < 4
        follows = np.bincount(((found[:, 1:] - found[:, :-1]) % length).ravel(), minlength=length)[1:]
        expected = follows.sum() / (length - 1)
        assert abs(((follows - expected) ** 2 / expected).sum() - (length - 2)) / math.sqrt(2 * (length - 2)) < 4

    def test_seeds_and_epochs_give_unrelated_orders(self):
        orders = np.concatenate([bijected(seed, 2_000, range(6_000)).reshape(3, -1) for seed in range(3)])
        correlation = np.corrcoef(orders) - np.eye(9)
        assert np.abs(correlation).max() * math.sqrt(2_000) < 4

    def test_any_stretch_of_a_billion_items_is_spread_evenly_over_them(self):
        for start in (0, 123_456_789, 10**9 - 5_000, 7 * 10**12):
            found = np.sort(bijected(3, 10**9, np.arange(start, start + 10_000))) / 1e9
            ranks = np.arange(1, 10_001) / 10_000
            assert np.abs(found - ranks).max() * math.sqrt(10_000) < 1.95

    def test_a_billion_items_need_no_memory(self):
        tracemalloc.start()
        try:
            items = KeyedBijection()(0, 10**9)
            for place in (0, 10**9 - 500, 3 * 10**15):
                assert len(set(items(range(place, place + 1_024)))) >= 1_023  # two epochs may meet in it
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 2**20

    def test_these_for_ever(self):
        # A run resumed by a later version is the same run only while this holds.
        assert bijected(0, 10, range(12)).tolist() == [7, 9, 2, 6, 3, 0, 1, 5, 4, 8, 0, 9]
        far = [0, 1, 10**9, 7 * 10**12]
        assert bijected(42, 10**9, far).tolist() == [206930472, 57530276, 424486973, 224780375]
        assert permutation(0, 0, 10).tolist() == [9, 3, 5, 4, 2, 6, 7, 8, 0, 1]
        assert permutation(42, 3, 10).tolist() == [3, 1, 6, 9, 8, 7, 5, 4, 2, 0]


class TestAmbient:
    def test_a_function_of_its_arguments(self):
        def drawn(*address) -> list[float]:
            with ambient(*address):
                return torch.rand(3).tolist()

        assert drawn(1, "augment", 5) == drawn(1, "augment", 5)
        different = [drawn(1, "augment", 5), drawn(2, "augment", 5), drawn(1, "other", 5), drawn(1, "augment", 6)]
        assert len({tuple(values) for values in different}) == 4

    def test_leaves_the_global_generator_alone_even_after_an_error(self):
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)

        def fail() -> None:
            with ambient(0, "augment", 0):
                torch.rand(100)
                raise ValueError("inside")

        with pytest.raises(ValueError, match="inside"):
            fail()
        assert torch.rand(4).equal(expected)


class TestNormal:
    def test_moments(self):
        noise = Draws(1, range(2_000), 64).normal("noise", (5, 10)).numpy().astype(np.float64)
        for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            assert sigmas(noise**power, mean, math.sqrt(variance)) < 4
        assert noise.max() > 4
        assert noise.min() < -4

    def test_rows_purposes_and_seeds_are_independent(self):
        size = 4_000
        rows = torch.cat([Draws(1, range(4), 4).normal(purpose, (size,)) for purpose in ("noise", "posterior")])
        rows = torch.cat([rows, Draws(2, range(4), 4).normal("noise", (size,))]).numpy()
        correlation = np.corrcoef(rows) - np.eye(12)
        assert np.abs(correlation).max() * math.sqrt(size) < 4

    def test_consecutive_numbers_are_independent(self):
        first = Draws(0, range(20_000), 64).normal("noise", (1,)).squeeze(1).numpy()
        for lag in (1, 2, 64):
            assert sigmas(first[lag:] * first[:-lag], 0, 1) < 4

    @unhurried
    @given(
        seed=SEEDS,
        numbers=st.lists(st.integers(0, 2**40), min_size=1, max_size=12),
        cut=st.integers(0, 12),
        odd=st.integers(1, 17),
    )
    def test_a_row_does_not_depend_on_its_batch(self, seed, numbers, cut, odd):
        whole = Draws(seed, numbers, 4)
        parts = [Draws(seed, part, 4) for part in (numbers[:cut], numbers[cut:]) if part]
        for draw in (
            lambda draws: draws.normal("noise", (2, odd)),
            lambda draws: draws.uniform("timestep"),
            lambda draws: draws.stratified("timestep"),
        ):
            assert torch.cat([draw(part) for part in parts]).equal(draw(whole))

    def test_is_made_by_what_it_is_given_also_in_a_part(self):
        draws = Draws(2, range(6), 6, normals=GeneratorPerRow())
        expected = GeneratorPerRow()(keys(2, "noise", range(6)), (3,), torch.device("cpu"))
        assert draws.normal("noise", (3,)).equal(expected)
        assert draws[2:4].normal("noise", (3,)).equal(expected[2:4])
        assert not Draws(2, range(6), 6).normal("noise", (3,)).equal(expected)

    def test_dtype_and_empty_shape(self):
        draws = Draws(0, [3, 4], 2)
        assert draws.normal("noise", ()).shape == (2,)
        assert draws.normal("noise", (2,), torch.float64).dtype == torch.float64
        assert Draws(0, [3, 4], 2, "meta").normal("noise", (2, 3)).shape == (2, 2, 3)

    def test_the_global_generator_is_not_used(self):
        state = torch.random.get_rng_state()
        draws = Draws(0, range(4), 4)
        draws.normal("noise", (8,)), draws.uniform("timestep"), draws.stratified("timestep")
        assert torch.random.get_rng_state().equal(state)


class TestUniform:
    def test_distribution(self):
        values = np.sort(Draws(3, range(50_000), 64).uniform("timestep").numpy().astype(np.float64))
        assert values[0] >= 0
        assert values[-1] < 1
        # Kolmogorov-Smirnov: 1.95 is exceeded once in a thousand.
        ranks = np.arange(50_001) / 50_000
        distance = max(np.abs(values - ranks[1:]).max(), np.abs(values - ranks[:-1]).max())
        assert distance * math.sqrt(50_000) < 1.95

    def test_purposes_seeds_and_neighbours_are_independent(self):
        rows = [Draws(seed, range(20_000), 64).uniform(purpose).numpy() for seed in (1, 2) for purpose in ("a", "b")]
        rows.append(Draws(1, range(1, 20_001), 64).uniform("a").numpy())
        correlation = np.corrcoef(rows) - np.eye(5)
        assert np.abs(correlation).max() * math.sqrt(20_000) < 4

    def test_stays_below_one(self, monkeypatch):
        highest = np.full(2, 2**64 - 1, dtype=np.uint64)
        monkeypatch.setattr("ldm.randomness.keys", lambda *address: highest)
        assert Draws(0, [0, 1], 2).uniform("timestep").max() < 1


class TestStratified:
    @unhurried
    @given(seed=SEEDS, batch_size=st.integers(1, 300), step=st.integers(0, 2**30))
    def test_a_global_batch_has_one_in_each_interval(self, seed, batch_size, step):
        numbers = step * batch_size + np.arange(batch_size)
        values = Draws(seed, numbers, batch_size).stratified("timestep").double().numpy()
        assert values.min() >= 0
        assert values.max() < 1
        gaps = np.diff(np.sort(values))
        # Equal gaps, within float32, and all the way round.
        assert np.abs(gaps - 1 / batch_size).max(initial=0) < 1e-6
        assert abs(values.min() + 1 - values.max() - 1 / batch_size) < 1e-6

    def test_each_place_of_the_batch_is_uniform_over_the_steps(self):
        values = Draws(2, range(8 * 5_000), 8).stratified("timestep").double().numpy().reshape(5_000, 8)
        for place in values.T:
            ranks = np.arange(1, 5_001) / 5_000
            assert np.abs(np.sort(place) - ranks).max() * math.sqrt(5_000) < 1.95
            assert sigmas(place[1:] * place[:-1], 0.25, math.sqrt(7 / 144)) < 4

    def test_the_mean_over_a_batch_varies_less_than_with_independent_draws(self):
        draws = Draws(0, range(64 * 500), 64)
        spread, independent = (
            (values.view(500, 64) ** 2).mean(1).std() for values in (draws.stratified("t"), draws.uniform("t"))
        )
        assert spread < independent / 4


class TestSeedAmbient:
    def test_depends_on_the_first_number_and_the_seed(self):
        def drawn(seed: int, numbers: list[int]) -> float:
            Draws(seed, numbers, 4).seed_ambient()
            return torch.rand(()).item()

        assert drawn(1, [4, 5]) == drawn(1, [4, 9])
        assert len({drawn(1, [4]), drawn(1, [5]), drawn(2, [4])}) == 3
