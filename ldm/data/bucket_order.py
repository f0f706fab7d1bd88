"""Which batch comes next where items lie in buckets, each with pictures of one size: computed, never stored.

The order is a function of (seed, step): any step can be asked for, on any number of ranks. All of it is integer
arithmetic, so that it is the same on every machine and after any number of steps.

Vocabulary: bucket b has n_b items, and its global batches hold B_b images. A *step* is one global batch, of one bucket.
The share of the steps that are of bucket b is f_b, proportional to n_b / B_b, so that all items are visited equally
often, whatever bucket they are in. *Rows* number the items bucket by bucket: those of the second bucket follow on those
of the first. *Sample numbers* count the images of all steps, as in elastic_sampler.py.

When: the j-th batch of bucket b has a time that is uniform in [j, j + 1) / f_b, and batches come in the order of their
times. Up to any time t there are thus f_b t batches of bucket b, give or take less than one; yet no pattern repeats,
for each batch's place in its interval is drawn anew (stratified sampling, with jitter). Because the total up to time t
is t, give or take the number of buckets, any step is found by sorting a few batches around it.

What: the images of bucket b, one batch after the other, visit its items in an order that is a function of (seed, b,
epoch of the bucket), and so without end.
"""

import bisect
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from ldm.data.elastic_sampler import Address, accumulation, divisors
from ldm.errors import ConfigError, DataError
from ldm.randomness import STANDARD, Order, keys, permutation
from ldm.ranges import Count, CountOrZero, Seed

_STRETCH = 256  # steps that are sorted at once
_BITS = 32  # of a batch's place in its interval


class Batch(NamedTuple):
    """A global batch.

    Attributes:
        bucket: that it is of.
        place: images of this bucket in all earlier steps.
        size: images in it.
        first: images of all buckets in all earlier steps.
    """

    bucket: int
    place: int
    size: int
    first: int


class Rows:
    """Numbers the items of all buckets, those of the second after those of the first.

    Args:
        lengths: items of each bucket.
    """

    def __init__(self, lengths: Sequence[CountOrZero]) -> None:
        self.starts: list[int] = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).tolist()

    def __len__(self) -> int:
        return self.starts[-1]

    def place(self, row: int) -> tuple[int, int]:
        """(bucket, item of the bucket) of a row."""
        bucket = bisect.bisect_right(self.starts, row) - 1
        return bucket, row - self.starts[bucket]


class BucketOrder:
    """The batch of every step.

    Args:
        lengths: items of each bucket, none empty.
        sizes: images of a global batch of each bucket.
        seed: the run's seed.
        order: of the items of a bucket.

    Raises:
        DataError: there are no items, or a bucket has none.
    """

    def __init__(
        self, lengths: Sequence[Count], sizes: Sequence[Count], seed: Seed, order: Order = STANDARD.order
    ) -> None:
        if not lengths or min(lengths) < 1:
            raise DataError(f"0 batches: expected items in every bucket, found {list(lengths)}")
        self.lengths = [int(length) for length in lengths]
        self.sizes = [int(size) for size in sizes]
        self.seed = seed
        common = math.lcm(*self.sizes)
        weights = [n * (common // size) for n, size in zip(self.lengths, self.sizes, strict=True)]
        divisor = math.gcd(*weights)
        self._weights = [weight // divisor for weight in weights]
        self._cycle = sum(self._weights)
        self._epochs = divisor // math.gcd(common, divisor)
        self._seeds = [int(key) for key in keys(seed, "bucket", range(len(weights)))]
        self._items = [order(*pair) for pair in zip(self._seeds, self.lengths, strict=True)]
        self._starts = Rows(self.lengths).starts
        self._stretch = lru_cache(maxsize=8)(self._sorted)

    @property
    def period(self) -> int:
        """After so many steps, and each multiple of it, every item has been visited exactly equally often."""
        return self._cycle * self._epochs

    def batch(self, step: int) -> Batch:
        """The batch of a step, from 0."""
        return self._stretch(step // _STRETCH)[step % _STRETCH]

    def step_of(self, number: int) -> int:
        """The step that a sample number is in."""
        # The images of so many steps differ from their expected number by less than this.
        mean = sum(w * size for w, size in zip(self._weights, self.sizes, strict=True)) / self._cycle
        spread = sum(self.sizes) + (len(self.sizes) + 1) * mean
        low = max(0, int((number - spread) / mean))
        steps = range(low, int((number + spread) / mean) + 2)
        return low + bisect.bisect_right(steps, number, key=lambda step: self.batch(step).first) - 1

    def rows(self, batch: Batch, first: int, number: int) -> list[int]:
        """The rows of `number` images of a batch from its image `first` on."""
        places = range(batch.place + first, batch.place + first + number)
        start = self._starts[batch.bucket]
        return [start + item for item in self._items[batch.bucket](places)]

    def rows_of(self, numbers: Sequence[int]) -> list[int]:
        """The rows that sample numbers refer to."""
        batches = [(number, self.batch(self.step_of(number))) for number in numbers]
        return [row for number, batch in batches for row in self.rows(batch, number - batch.first, 1)]

    def _sorted(self, stretch: int) -> list[Batch]:
        """The batches of the steps from stretch * _STRETCH on."""
        buckets, start = len(self.sizes), stretch * _STRETCH
        since, until = max(0, start - buckets), start + _STRETCH + buckets
        done = [self._batches_before(bucket, since) for bucket in range(buckets)]
        events: list[tuple[int, int]] = []
        for bucket in range(buckets):
            few = range(done[bucket], self._batches_before(bucket, until))
            events += [(time, bucket) for time in self._times(bucket, few)]
        events.sort()
        skipped = start - sum(done)
        for _, bucket in events[:skipped]:
            done[bucket] += 1
        found, first = [], sum(number * size for number, size in zip(done, self.sizes, strict=True))
        for _, bucket in events[skipped : skipped + _STRETCH]:
            size = self.sizes[bucket]
            found.append(Batch(bucket, done[bucket] * size, size, first))
            done[bucket] += 1
            first += size
        return found

    def _batches_before(self, bucket: int, time: int) -> int:
        """How many batches of a bucket come before a whole time."""
        full = time * self._weights[bucket] // self._cycle
        (last,) = self._times(bucket, range(full, full + 1))
        return full + (last < time << _BITS)

    def _times(self, bucket: int, batches: range) -> list[int]:
        """When batches of a bucket come, in units of 2^-32 steps: increasing."""
        places = keys(self._seeds[bucket], "time", batches) >> np.uint64(64 - _BITS)
        weight, cycle = self._weights[bucket], self._cycle
        return [((j << _BITS) + v) * cycle // weight for j, v in zip(batches, places.tolist(), strict=True)]


def bucket_accumulation(sizes: Sequence[int], batch_size: int, micro_batch_size: int | None, world_size: int) -> int:
    """The number of micro-batches per step, the same for the batches of all buckets.

    Args:
        sizes: images of a global batch of each bucket.
        batch_size: of the largest pictures.
        micro_batch_size: of the largest pictures, the maximum on one device at a time; None: no limit.
        world_size: number of ranks.

    Raises:
        ConfigError: a batch cannot be divided evenly.
    """
    fewest = accumulation(batch_size, micro_batch_size, world_size)
    common = math.gcd(batch_size, *sizes)
    fitting = [n for n in divisors(common) if common % (world_size * n) == 0 and n >= fewest]
    if not fitting:
        raise ConfigError(
            f"data.params.buckets.params.batch_multiple: batches of {', '.join(map(str, sorted({*sizes})))} images "
            f"cannot be divided among {world_size} ranks x {fewest} micro-batches: use a multiple of "
            f"{world_size * fewest}, or another data.params.micro_batch_size"
        )
    return fitting[0]


def bucket_validation_batches(
    lengths: Sequence[int], micro_batch_sizes: Sequence[int], rank: int = 0, world_size: int = 1
) -> list[list[Address]]:
    """This rank's share of the validation items, each batch of one bucket; otherwise as `validation_batches`.

    Each item once over all ranks, in equally many batches on every rank: batches are cut in two until their number can
    be shared. (Where even single items cannot be, the last of them are repeated.)

    Args:
        lengths: items of each bucket; some may have none.
        micro_batch_sizes: the most that a batch of each bucket holds.
        rank, world_size: which share.
    """
    starts, pieces = Rows(lengths).starts, []
    for start, length, micro in zip(starts, lengths, micro_batch_sizes, strict=False):
        if length:
            pieces += np.array_split(start + permutation(0, 0, length), -(-length // micro))
    while len(pieces) % world_size and max(map(len, pieces)) > 1:
        longest = max(range(len(pieces)), key=lambda index: len(pieces[index]))
        pieces[longest : longest + 1] = np.array_split(pieces[longest], 2)
    if sum(lengths) < world_size:
        return [[(int(row), int(row)) for row in piece] for piece in pieces]
    pieces += pieces[len(pieces) - -len(pieces) % world_size :]
    mixed = [pieces[index] for index in permutation(0, 1, len(pieces))]
    return [[(int(row), int(row)) for row in piece] for piece in mixed[rank::world_size]]


class BucketBatchSampler(Sampler[list[Address]]):
    """Infinite micro-batches of (sample number, row) for one rank, each of one bucket; it has no length.

    Micro-batch a of rank r holds the images (a W + r) m + [0, m) of its step's global batch of B = W A m images.

    Args:
        order: of the batches.
        position: the step that comes next, and how many images the run has seen; called whenever an iteration starts.
        accumulation: micro-batches per step, A.
        rank: this process, 0 <= rank < world_size.
        world_size: W.

    Raises:
        ConfigError: a bucket's batch is not divisible by W A.
    """

    def __init__(
        self,
        order: BucketOrder,
        position: Callable[[], tuple[int, int]] = lambda: (0, 0),
        accumulation: Count = 1,
        rank: CountOrZero = 0,
        world_size: Count = 1,
    ) -> None:
        if any(size % (world_size * accumulation) for size in order.sizes):
            raise ConfigError(
                f"data.params.buckets: batches of {order.sizes} images cannot be divided among {world_size} ranks x "
                f"{accumulation} micro-batches"
            )
        self.order = order
        self.position = position
        self.accumulation = accumulation
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[Address]]:
        start, seen = self.position()
        ahead = seen - self.order.batch(start).first
        for step in count(start):
            batch = self.order.batch(step)
            micro = batch.size // (self.world_size * self.accumulation)
            for piece in range(self.accumulation):
                first = (piece * self.world_size + self.rank) * micro
                number = ahead + batch.first + first
                rows = self.order.rows(batch, first, micro)
                yield list(zip(range(number, number + micro), rows, strict=True))
