"""Addressable randomness: every random number of a run is a function of (seed, purpose, sample number).

The sample number counts the images the run has seen, over all ranks. It determines which image comes next (a
function of (seed, epoch)), its crop and flip, the posterior draw, the timestep, the noise and the dropped
labels. No random state is restored from a checkpoint, because everything can be recomputed; nothing
depends on the world size, on accumulation or on worker processes, because none of them is part of the address.

Devices agree bit for bit where their float32 rounds as IEEE 754 says. Runs from before a configuration named what makes
noise and order go on as they were: by `GeneratorPerRow`, whose noise on a GPU is not that on the CPU, and
`StoredPermutation`.
"""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from ldm.normals import CounterBased, Normals
from ldm.ranges import Count, CountOrZero, Seed

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014) on uint64, elementwise; wraps around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keys(seed: int, purpose: str, numbers: np.ndarray | Sequence[int] | int) -> np.ndarray:
    """64 well-mixed bits for each sample number: uint64 of the shape of `numbers` (at least 1-D).

    Args:
        seed: the run's seed, any integer.
        purpose: what the draw is for ("noise", "timestep", ...): different purposes are independent.
        numbers: sample numbers, integers of 64 bits.
    """
    counted = np.atleast_1d(np.asarray(numbers, dtype=np.int64)).astype(np.uint64)
    name = np.atleast_1d(np.uint64(zlib.crc32(purpose.encode())))
    start = np.atleast_1d(np.uint64(seed % 2**64))
    with np.errstate(over="ignore"):
        stream = _mix(_mix(start + _GOLDEN) ^ (name * _GOLDEN))
        return _mix(stream + (counted + np.uint64(1)) * _GOLDEN)


def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order in which epoch `epoch` visits `length` items: int64 (length,)."""
    return np.random.Generator(np.random.Philox(key=int(keys(seed, "order", epoch)[0]))).permutation(length)


Visits = Callable[[Sequence[int]], list[int]]
"""Places of epochs that follow on one another -> the items there; place p lies in epoch p // length."""


class Order(ABC):
    """In which order items are visited: each once an epoch, and each epoch in an order of its own."""

    @abstractmethod
    def __call__(self, seed: int, length: int) -> Visits:
        """Of so many items; a function of the arguments."""


class StoredPermutation(Order):
    """`permutation`, of which the last two are kept, since both are in use where they meet: 8 bytes an item each."""

    def __call__(self, seed: int, length: int) -> Visits:
        of_epoch = lru_cache(maxsize=2)(lambda epoch: permutation(seed, epoch, length))
        return lambda places: [int(of_epoch(place // length)[place % length]) for place in places]


class KeyedBijection(Order):
    """Each place by itself, whatever the number of items: `bijected`."""

    def __call__(self, seed: int, length: int) -> Visits:
        return lambda places: bijected(seed, length, places).tolist()


_ROUNDS = 20  # with 16 the orders of six to eight items are not yet equally likely


def bijected(seed: int, length: int, places: np.ndarray | Sequence[int]) -> np.ndarray:
    """The items at places of epochs of `length` items: int64 (N,). Needs no memory but that of its result.

    A Feistel network on pairs (x, y), which number at least `length`; what it leads out of the items is led on until it
    is back (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    epochs, numbers = np.divmod(np.asarray(places, dtype=np.int64), length)
    rounds = keys(seed, "place", epochs[:, None] * _ROUNDS + np.arange(_ROUNDS))  # (N, rounds)
    width = math.isqrt(length - 1) + 1
    width += width % 2  # with two odd sides only even permutations could be reached
    shuffled = partial(_feistel, width=np.uint64(width), height=np.uint64(-(-length // width)))
    found = shuffled(numbers.astype(np.uint64), rounds)
    while len(outside := np.flatnonzero(found >= length)):
        found[outside] = shuffled(found[outside], rounds[outside])
    return found.astype(np.int64)


def _feistel(numbers: np.ndarray, rounds: np.ndarray, width: np.uint64, height: np.uint64) -> np.ndarray:
    """A bijection of 0 .. width * height - 1 for each of the keys: uint64 (N,), (N, rounds) -> (N,)."""
    y, x = np.divmod(numbers, width)
    with np.errstate(over="ignore"):
        for across, down in zip(rounds.T[::2], rounds.T[1::2], strict=True):
            x = (x + (_mix(across + y * _GOLDEN) >> np.uint64(1))) % width  # 63 bits, so that the sum is exact
            y = (y + (_mix(down + x * _GOLDEN) >> np.uint64(1))) % height
    return y * width + x


@dataclass(frozen=True)
class Randomness:
    """What makes a run's noise and order: the section `randomness` of its configuration."""

    normals: Normals = field(default_factory=CounterBased)
    order: Order = field(default_factory=KeyedBijection)


STANDARD = Randomness()


@contextmanager
def ambient(seed: int, purpose: str, number: int) -> Iterator[None]:
    """Within the block torch's global CPU generator is a function of the arguments; restored afterwards.

    For library code that draws from the global generator, such as torchvision's random transforms.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(keys(seed, purpose, number)[0]))
        yield


class Draws:
    """The randomness of one batch; each row depends on its own sample number alone.

    A datamodule puts one into every batch under the key `draws`; all code that needs noise takes it from there.

    Args:
        seed: the run's seed.
        numbers: (N,) sample numbers of the rows, kept on the host: reading them never waits for the device.
        batch_size: the *global* batch size, the block over which `stratified` spreads.
        device: where the draws are made.
        first: the first sample number of the global batch; None: a multiple of `batch_size`.
        normals: what makes noise.
    """

    def __init__(
        self,
        seed: Seed,
        numbers: np.ndarray | Sequence[CountOrZero],
        batch_size: Count,
        device: torch.device | str = "cpu",
        first: CountOrZero | None = None,
        normals: Normals = STANDARD.normals,
    ) -> None:
        self.seed = seed
        self.numbers = np.atleast_1d(np.asarray(numbers, dtype=np.int64))
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.first = first
        self.normals = normals

    def __getitem__(self, rows: slice) -> "Draws":
        """Those of some rows of the batch."""
        return Draws(self.seed, self.numbers[rows], self.batch_size, self.device, self.first, self.normals)

    def __len__(self) -> int:
        return len(self.numbers)

    def normal(self, purpose: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal noise: (N, *shape)."""
        if self.device.type == "meta":
            return torch.empty(len(self), *shape, dtype=dtype, device=self.device)
        return self.normals(keys(self.seed, purpose, self.numbers), shape, self.device, dtype)

    def uniform(self, purpose: str) -> Tensor:
        """Independent uniforms in [0, 1): (N,) float32."""
        return self._to_device(_unit(keys(self.seed, purpose, self.numbers)))

    def stratified(self, purpose: str) -> Tensor:
        """Uniforms in [0, 1) spread evenly over the global batch: (N,) float32.

        Each is uniform; the `batch_size` of one global batch lie one in each interval of length 1/batch_size after
        a common shift (the low-discrepancy sampler of Kingma et al. 2021, "Variational Diffusion Models", app. I.1).
        """
        block, place = np.divmod(self.numbers, self.batch_size)
        if self.first is not None:
            block, place = np.full(len(self), self.first), self.numbers - self.first
        shift = _unit(keys(self.seed, purpose, block))
        return self._to_device((shift + place / self.batch_size) % 1.0)

    def seed_ambient(self) -> None:
        """Make the global generators (dropout inside a network) a function of this batch's first number."""
        torch.manual_seed(int(keys(self.seed, "ambient", self.numbers[:1])[0]))

    def _to_device(self, values: np.ndarray) -> Tensor:
        # Rounding to float32 can carry a value just under 1 up to 1.
        below_one = np.minimum(values.astype(np.float32), np.nextafter(np.float32(1), np.float32(0)))
        return torch.from_numpy(below_one).to(self.device, non_blocking=True)


def _unit(bits: np.ndarray) -> np.ndarray:
    """uint64 -> float64 in [0, 1), using the upper 53 bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
