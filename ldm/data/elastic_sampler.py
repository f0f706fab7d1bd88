"""Which images come next: infinite, elastic and resumable, because the order is computed and never stored.

Vocabulary: n items, global batch B, world size W, accumulation A, rank r, micro-batch m = B / (W A).
Sample number p counts the images the run has seen over all ranks; epoch p // n visits the items in an order that is a
function of (seed, epoch), by a `randomness.Order`. The step that starts at p trains on the numbers [p, p + B), whatever
W and A are: micro-batch a of rank r holds p + (a W + r) m + [0, m).
"""

from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
from torch.utils.data import Sampler

from ldm.errors import ConfigError, DataError
from ldm.randomness import STANDARD, Order, permutation
from ldm.ranges import Count, CountOrZero, Seed

Address = tuple[int, int]
"""(sample number, item of the data set): all that `TransformedDataset` needs to make one row of a batch."""


def divisors(number: int) -> list[int]:
    """All positive divisors, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def accumulation(batch_size: int, micro_batch_size: int | None, world_size: int) -> int:
    """The number of micro-batches per step, so that a device holds at most `micro_batch_size` images at once.

    Args:
        batch_size: images of one step over all ranks.
        micro_batch_size: maximum number of images on one device at a time, a divisor of `batch_size`; None: no limit.
        world_size: number of ranks.

    Raises:
        ConfigError: the batch cannot be divided evenly; names the sizes that can.
    """
    for key, value in (("batch_size", batch_size), ("micro_batch_size", micro_batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"data.params.{key}: expected a positive number, found {value}")
    if batch_size % world_size:
        nearest = batch_size // world_size * world_size
        sizes = " or ".join(str(size) for size in (nearest, nearest + world_size) if size)
        raise ConfigError(
            f"data.params.batch_size: the global batch of {batch_size} cannot be divided among {world_size} ranks. "
            f"Use batch_size {sizes}, or one of these numbers of ranks: {_listed(divisors(batch_size))}"
        )
    if micro_batch_size is None:
        return 1
    if batch_size % micro_batch_size:
        raise ConfigError(
            f"data.params.micro_batch_size: {micro_batch_size} does not divide the global batch of {batch_size}. "
            f"Use one of {_listed(divisors(batch_size))}"
        )
    share = batch_size // world_size
    return next(pieces for pieces in divisors(share) if share // pieces <= micro_batch_size)


class ElasticBatchSampler(Sampler[list[Address]]):
    """Infinite micro-batches of (sample number, item) for one rank; it has no length.

    Args:
        length: number of items n.
        batch_size: global batch B.
        seed: the run's seed.
        position: how many images the run has seen; called whenever an iteration starts, so that a resumed run, or one
            whose trainer starts a new pass over the loader, continues where it was.
        accumulation: micro-batches per step, A.
        rank: this process, 0 <= rank < world_size.
        world_size: W.
        order: of the items.

    Raises:
        ConfigError: B is not divisible by W A.
        DataError: there are no items.
    """

    def __init__(
        self,
        length: Count,
        batch_size: Count,
        seed: Seed,
        position: Callable[[], int] = lambda: 0,
        accumulation: Count = 1,
        rank: CountOrZero = 0,
        world_size: Count = 1,
        order: Order = STANDARD.order,
    ) -> None:
        if length < 1:
            raise DataError(f"0 batches: the data set holds {length} items (batch {batch_size}, {world_size} ranks)")
        if batch_size < 1 or batch_size % (world_size * accumulation):
            raise ConfigError(
                f"data.params.batch_size: {batch_size} is not divisible by {world_size} ranks x {accumulation} "
                f"micro-batches; ranks x micro-batches may be {_listed(divisors(batch_size))}"
            )
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.position = position
        self.accumulation = accumulation
        self.rank = rank
        self.world_size = world_size
        self.order = order

    @property
    def micro_batch_size(self) -> int:
        """Number of images in each list that the iteration yields."""
        return self.batch_size // (self.world_size * self.accumulation)

    def __iter__(self) -> Iterator[list[Address]]:
        items = self.order(self.seed, self.length)
        micro = self.micro_batch_size
        for step in count(self.position(), self.batch_size):
            for piece in range(self.accumulation):
                first = step + (piece * self.world_size + self.rank) * micro
                numbers = range(first, first + micro)
                yield list(zip(numbers, items(numbers), strict=True))


def validation_batches(length: int, micro_batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[Address]]:
    """This rank's share of the validation items, each item once over all ranks, in equally many batches on every rank.

    An item's sample number is its index, so its draws are the same in every validation of every run. (The number of
    batches is equal because a rank with one batch less would leave the others waiting in a collective. With fewer items
    than ranks every rank validates all of them.) Batches hold at most `micro_batch_size` items unless that makes some
    empty. Their order is shuffled, always in the same way, since data sets are sorted by class and the images shown
    come from the first batch.
    """
    numbers = permutation(0, 0, length)
    if length < world_size:
        return [[(int(i), int(i)) for i in numbers]]
    rounds = min(-(-length // (world_size * micro_batch_size)), length // world_size)
    parts = np.array_split(numbers, rounds * world_size)
    return [[(int(i), int(i)) for i in part] for part in parts[rank::world_size]]


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))
