"""The data sets of a data module in buckets: which items, which batches, and how images are read."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from torch.utils.data import Dataset

from ldm.data.bucket_order import Rows
from ldm.data.buckets import Assigned, Buckets, assigned, picture_sizes
from ldm.data.dataset import ImageDataset, Subset
from ldm.data.elastic_sampler import Address
from ldm.data.loading import TransformedDataset
from ldm.errors import ConfigError
from ldm.ranges import Count
from ldm.sizes import Size, SizeError, as_resolution, spell


class Bucketing:
    """Reads the sizes of pictures when it is first asked.

    Args:
        buckets: the sizes to choose from.
        train: data set to train on.
        validation: data set to validate on, in the sizes that are trained on.
        batch_size: global batch size of the largest pictures.
    """

    def __init__(
        self, buckets: Buckets, train: ImageDataset, validation: ImageDataset | None, batch_size: Count
    ) -> None:
        self.buckets = buckets
        self._datasets = {"train": train, "validation": validation}
        self._batch_size = batch_size

    @cached_property
    def train(self) -> Assigned:
        sizes = picture_sizes(_there(self._datasets["train"]))
        return assigned(self.buckets, sizes, self.buckets.min_items or self._batch_size)

    @cached_property
    def validation(self) -> Assigned:
        sizes = picture_sizes(_there(self._datasets["validation"]))
        return assigned(self.buckets, sizes, among=self.train.sizes)

    def of(self, name: str) -> Assigned:
        """`train` or `validation`."""
        return self.train if name == "train" else self.validation

    def parts(self, name: str) -> list[tuple[Size, Subset]]:
        """The size and the items of each bucket of a data set, `train` or `validation`."""
        found, dataset = self.of(name), _there(self._datasets[name])
        return [(size, Subset(dataset, few.tolist())) for size, few in zip(found.sizes, found.items, strict=True)]

    def sizes(self) -> list[Size]:
        """Of the buckets that are trained on, the default first."""
        return [self.default, *(size for size in self.train.sizes if size != self.default)]

    @property
    def default(self) -> Size:
        """The size that most pictures are trained in."""
        return self.train.sizes[self.train.default]

    def batch_sizes(self, name: str = "train") -> list[int]:
        """Images of a global batch of each bucket."""
        return [self.buckets.batch_size(size, self._batch_size) for size in self.of(name).sizes]

    def check(self, shape: Callable[[Size], Any]) -> None:
        """ConfigError, naming the size, if `shape` (of an autoencoder's latent) raises SizeError for one."""
        for size in self.buckets.sizes:
            try:
                shape(size)
            except SizeError as error:
                raise ConfigError(
                    f"data.params.buckets: the size {spell(size)}: expected multiples of {error.factor}; use a `step` "
                    "that is one, or other `sizes`"
                ) from error

    def facts(self) -> dict[str, Any]:
        """What must not change when a run resumes: sizes, items and global batches of the buckets."""
        rows = zip(self.train.sizes, self.train.items, self.batch_sizes(), strict=True)
        return {"buckets": [[as_resolution(size), len(items), batch] for size, items, batch in rows]}

    def table(self) -> str:
        """A line for each bucket of the training data."""
        return self.train.table(self.batch_sizes())


class BucketedImages(Dataset[dict[str, Any]]):
    """Images of all buckets, addressed by (sample number, row); a row holds what one of `TransformedDataset` does.

    Args:
        views: of the items of each bucket, in its size; their data sets are parts of one data set, whose item numbers
            `broken` has.
    """

    def __init__(self, views: Sequence[TransformedDataset]) -> None:
        self.views = views
        self._rows = Rows([len(view) for view in views])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, address: Address) -> dict[str, Any]:
        number, row = address
        bucket, item = self._rows.place(row)
        view = self.views[bucket]
        assert isinstance(view.dataset, Subset), "a bucket is one"
        found = view[number, item]
        return {**found, "broken": {view.dataset.indices[index]: text for index, text in found["broken"].items()}}


def _there(dataset: ImageDataset | None) -> ImageDataset:
    assert dataset is not None, "asked for only where there is one"
    return dataset
