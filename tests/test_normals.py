"""Normals against closed forms; their bits against published ones, and against those of other ways to compute them.

Every number here is a function of constants, so the statistical bounds either always hold or never.
"""

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from ldm.normals import CounterBased, GeneratorPerRow, _negative_log, _sqrt, mix, words
from ldm.randomness import _mix, keys
from ldm.runtime.float64 import double

CPU = torch.device("cpu")
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
BOTH = pytest.mark.parametrize("normals", [CounterBased(), GeneratorPerRow()], ids=["counter", "generators"])


def noise(rows: int, *shape: int, normals=CounterBased(), seed: int = 0) -> np.ndarray:  # noqa: B008
    return normals(keys(seed, "noise", range(rows)), shape, CPU).numpy()


def sigmas(values: np.ndarray, mean: float, deviation: float) -> float:
    """How many standard errors the average of `values` lies from `mean`."""
    return abs(float(np.mean(values, dtype=np.float64)) - mean) / deviation * math.sqrt(np.size(values))


def unsigned(values: torch.Tensor) -> list[int]:
    return values.numpy().view(np.uint64).tolist()


class TestWords:
    def test_published_ones(self):
        # Of SplitMix64 with the seed 1234567: Vigna's splitmix64.c.
        found = words(torch.tensor([1234567]), torch.tensor([GOLDEN]), 5)
        assert unsigned(found[0]) == [
            *(6457827717110365317, 3203168211198807973, 9817491932198370423),
            *(4593380528125082431, 16408922859458223821),
        ]

    def test_the_same_finalizer_as_that_of_keys(self):
        counted = torch.arange(-500, 500)
        stream = (counted + 1) * GOLDEN
        with np.errstate(over="ignore"):
            assert unsigned(mix(stream)) == _mix(stream.numpy().view(np.uint64)).tolist()

    def test_every_bit_is_fair_and_independent_of_the_others(self):
        starts = torch.from_numpy(keys(0, "noise", range(500)).view(np.int64))
        found = words(starts, mix(~starts) | 1, 200).numpy().view(np.uint8).reshape(-1, 8)
        bits = np.unpackbits(found, axis=1).astype(float)
        assert max(sigmas(column, 0.5, 0.5) for column in bits.T) < 4.5
        assert np.abs(np.corrcoef(bits.T) - np.eye(64)).max() * math.sqrt(len(bits)) < 5


class TestDistribution:
    @BOTH
    def test_moments(self, normals):
        values = noise(2_000, 4, 16, 16, normals=normals).astype(np.float64)
        # E x^k and its variance E x^2k - (E x^k)^2, with E x^2k = (2k - 1)!!
        for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (5, 0, 945), (6, 15, 10_170)):
            assert sigmas(values**power, mean, math.sqrt(variance)) < 4

    @BOTH
    def test_the_whole_of_it(self, normals):
        """Kolmogorov-Smirnov: 1.95 is exceeded once in a thousand."""
        values = noise(1_000, 1_000, normals=normals).ravel()
        assert stats.kstest(values, "norm").statistic * math.sqrt(values.size) < 1.95

    def test_places_and_pairs_of_a_row(self):
        """Each place, each distance between two, and the two of one point of the circle."""
        values = noise(20_000, 16).astype(np.float64)
        statistics = [stats.kstest(place, "norm").statistic * math.sqrt(len(place)) for place in values.T]
        assert max(statistics) < 2.2
        for lag in range(1, 16):
            a, b = values[:, lag:], values[:, :-lag]
            assert sigmas(a * b, 0, 1) < 4
            assert sigmas((a**2 - 1) * (b**2 - 1), 0, 2) < 4
        angles = np.arctan2(values[:, 8:], values[:, :8]).ravel() / (2 * np.pi) + 0.5
        assert stats.kstest(angles, "uniform").statistic * math.sqrt(angles.size) < 1.95

    def test_no_frequency_stands_out(self):
        power = np.abs(np.fft.rfft(noise(200, 2_048), axis=1)[:, 1:-1]) ** 2 / 2_048
        assert stats.kstest(power.ravel(), "expon").statistic * math.sqrt(power.size) < 1.95
        assert sigmas(power.mean(0) - 1, 0, math.sqrt(1 / 200)) < 4

    def test_rows_are_independent(self):
        values = noise(300, 4_000)
        correlation = np.corrcoef(values) - np.eye(300)
        assert np.abs(correlation).max() * math.sqrt(4_000) < 5.5  # of 44,850 pairs
        assert sigmas(correlation[np.triu_indices(300, 1)], 0, 1 / math.sqrt(4_000)) < 4

    def test_tails(self):
        values = np.abs(noise(5_000, 1_000).ravel())
        for bound in (3.0, 4.0, 4.75):
            chance = math.erfc(bound / math.sqrt(2))
            assert sigmas(values > bound, chance, math.sqrt(chance)) < 4


class TestRows:
    def test_no_two_of_100_000_are_equal(self):
        """As are two of torch's own, which reads 32 bits of a seed."""
        every = keys(0, "noise", range(100_000))
        rows = CounterBased()(every, (4,), CPU).numpy()
        assert len(np.unique(rows, axis=0)) == 100_000
        low = (every & np.uint64(2**32 - 1)).tolist()
        first = {bits: place for place, bits in reversed([*enumerate(low)])}
        pairs = [(first[bits], place) for place, bits in enumerate(low) if first[bits] != place]
        assert pairs
        for pair in pairs:
            alike = every[[*pair]]
            a, b = GeneratorPerRow()(alike, (64,), CPU)
            assert a.equal(b)
            a, b = CounterBased()(alike, (64,), CPU).numpy()
            assert not np.any(a == b)

    def test_no_two_are_parts_of_one_sequence(self):
        """Even where one row's key is the state that another is in after a few words."""
        start = keys(0, "noise", 0).view(np.int64)
        stride = (mix(~torch.from_numpy(start)) | 1).numpy()
        later = np.concatenate([start + place * stride for place in range(4)]).view(np.uint64)
        rows = CounterBased()(later, (512,), CPU).numpy()
        assert len(np.unique(rows)) > 4 * 512 - 4

    @BOTH
    @pytest.mark.parametrize("shape", [(), (1,), (3, 5), (4, 16, 16)])
    def test_a_row_does_not_depend_on_its_batch(self, normals, shape):
        every = keys(3, "noise", range(50))
        whole = normals(every, shape, CPU)
        assert whole.shape == (50, *shape)
        assert whole.is_contiguous()
        for cuts in ([1], [20, 21, 45], range(1, 50)):
            assert torch.cat([normals(part, shape, CPU) for part in np.split(every, cuts)]).equal(whole)

    @BOTH
    def test_none(self, normals):
        assert normals(keys(0, "noise", range(0)), (4, 2), CPU).shape == (0, 4, 2)
        assert normals(keys(0, "noise", range(3)), (0,), CPU).shape == (3, 0)

    def test_other_dtypes_are_the_same_rounded(self):
        every = keys(0, "noise", range(8))
        single = CounterBased()(every, (7, 3), CPU)
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            assert CounterBased()(every, (7, 3), CPU, dtype).equal(single.to(dtype))


class TestArithmetic:
    def test_the_logarithm(self):
        u = torch.cat([torch.linspace(0, 1, 100_001)[1:], torch.logspace(-32, 0, 100_001, base=2)])
        found, expected = double(_negative_log(u)), -double(u).log()
        assert ((found - expected) / expected).abs()[expected > 0].max() < 4e-7
        assert (found >= 0).all()
        assert _negative_log(torch.ones(1)).item() == 0

    def test_the_root(self):
        x = torch.logspace(-20, 2, 200_001)
        assert ((double(_sqrt(x)) - double(x).sqrt()) / double(x).sqrt()).abs().max() < 6e-7
        assert 0 <= _sqrt(torch.zeros(1)).item() < 1e-19

    def test_the_extremes_are_finite(self, monkeypatch):
        """The bits of the smallest and largest radius, of each sign, at the ends of the quarter."""
        ends = torch.tensor([0, -1, 2**31 - 1, -(2**31), 2**30, -(2**30)], dtype=torch.int32)
        pairs = torch.cartesian_prod(ends, ends).view(torch.int64).flatten()
        monkeypatch.setattr("ldm.normals.words", lambda starts, strides, count: pairs[None])
        found = CounterBased()(keys(0, "noise", 0), (2 * len(pairs),), CPU)
        assert found.isfinite().all()
        assert found.abs().max() == pytest.approx(math.sqrt(2 * 32 * math.log(2)), rel=1e-6)


DIGEST = """
import hashlib
import torch
from ldm.normals import CounterBased
from ldm.randomness import keys
torch.set_num_threads({threads})
found = CounterBased()(keys(5, "noise", range({rows})), (4, 33, 31), torch.device("cpu"))
print(hashlib.sha256(found.numpy().tobytes()).hexdigest(), torch.backends.cpu.get_cpu_capability())
"""


class TestBits:
    def test_these_for_ever(self):
        # A run resumed by a later version is the same run only while this holds.
        found = noise(2, 3).view(np.uint32).tolist()
        assert found == [[3188068450, 1021373041, 3215880219], [3209390658, 1046127647, 3205490858]]
        assert hashlib.sha256(noise(100, 4, 16, 16).tobytes()).hexdigest()[:16] == "cefcb054b0fd790d"

    @pytest.mark.parametrize("capability", ["avx2", "default"])
    def test_the_same_by_other_instructions(self, capability):
        """Other kernels of torch, in other widths, on another number of threads, and with another MKL."""
        script, rows = DIGEST.format(threads=2, rows=20), 20
        limits = {"ATEN_CPU_CAPABILITY": capability, "MKL_CBWR": "COMPATIBLE"}
        environment = {**os.environ, **limits, "PYTHONPATH": str(Path(__file__).parents[1])}
        found = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        ).stdout.split()
        expected = CounterBased()(keys(5, "noise", range(rows)), (4, 33, 31), CPU).numpy().tobytes()
        assert found == [hashlib.sha256(expected).hexdigest(), capability.upper()]

    def test_the_same_computed_in_numpy(self):
        """The whole of it again with another library, whose float32 rounds as IEEE 754 says."""
        assert np.array_equal(noise(6, 4, 9), _in_numpy(keys(0, "noise", range(6)), 36).reshape(6, 4, 9))

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_the_same_on_a_gpu(self):
        every = keys(5, "noise", range(1_000))
        found = CounterBased()(every, (4, 32, 32), torch.device("cuda"))
        assert found.cpu().equal(CounterBased()(every, (4, 32, 32), CPU))


def _in_numpy(every: np.ndarray, count: int) -> np.ndarray:
    """What `CounterBased` computes, written down once more: (N,) uint64 -> (N, count) float32."""
    f = np.float32

    def mixed(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    def polynomial(x: np.ndarray, *coefficients: float) -> np.ndarray:
        out = np.full_like(x, coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            out = out * x + f(coefficient)
        return out

    with np.errstate(over="ignore"):
        places = np.arange(1, -(-count // 2) + 1, dtype=np.uint64)
        drawn = mixed(every[:, None] + (mixed(~every) | np.uint64(1))[:, None] * places)
    low, high = (drawn & np.uint64(2**32 - 1)).astype(np.uint32), (drawn >> np.uint64(32)).astype(np.uint32)
    u = (low & np.uint32(2**31 - 1)).astype(f) * f(2.0**-31) + f(2.0**-32)
    bits = u.view(np.int32)
    exponent = (bits - np.int32(0x3F3504F3)) >> 23
    m = (bits - (exponent << 23)).view(f)
    ratio = (f(1) - m) / (m + f(1))
    log = polynomial(ratio * ratio, 2.00000024, 0.66652192, 0.41297467) * ratio + exponent.astype(f) * f(-math.log(2))
    r = ((log.view(np.int32) >> 1) + np.int32(0x1FBD1DF5)).view(f)
    for _ in range(2):
        r = (log / r + r) * f(0.5)
    t = (high << np.uint32(1)).view(np.int32).astype(f) * f(2.0**-32)
    sine = polynomial(t * t, 1.57079632, -0.64596348, 0.07968023, -0.00460218) * t
    cosine = polynomial(t * t, 0.99999997, -1.23369701, 0.25359864, -0.02040835)
    one = np.where(low >> np.uint32(31), -(cosine - sine) * r, (cosine - sine) * r)
    other = np.where(high >> np.uint32(31), -(cosine + sine) * r, (cosine + sine) * r)
    return np.concatenate([one, other], axis=1)[:, :count]
