"""Addressable randomness: every random number of a run is a function of (seed, purpose, sample number).

The sample number counts the images the run has seen, over all ranks. It determines which image comes next (a
permutation of (seed, epoch)), its crop and flip, the posterior draw, the timestep, the noise and the dropped
labels. No random state is restored from a checkpoint, because everything can be recomputed; nothing
depends on the world size, on accumulation or on worker processes, because none of them is part of the address.

Two devices of one type agree bit for bit; a GPU's normal draws differ from the CPU's (another generator).
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

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
    """

    def __init__(
        self,
        seed: Seed,
        numbers: np.ndarray | Sequence[CountOrZero],
        batch_size: Count,
        device: torch.device | str = "cpu",
        first: CountOrZero | None = None,
    ) -> None:
        self.seed = seed
        self.numbers = np.atleast_1d(np.asarray(numbers, dtype=np.int64))
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.first = first

    def __getitem__(self, rows: slice) -> "Draws":
        """Those of some rows of the batch."""
        return Draws(self.seed, self.numbers[rows], self.batch_size, self.device, self.first)

    def __len__(self) -> int:
        return len(self.numbers)

    def normal(self, purpose: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal noise: (N, *shape), one generator per row."""
        out = torch.empty(len(self), *shape, dtype=dtype, device=self.device)
        if self.device.type == "meta":
            return out
        generator = torch.Generator(self.device)
        for row, key in zip(out, keys(self.seed, purpose, self.numbers).tolist(), strict=True):
            row.normal_(generator=generator.manual_seed(key))
        return out

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
