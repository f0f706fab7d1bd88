"""Lightning data modules: global batches in elastic order, each with its randomness attached."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from ldm.data.bucket_order import BucketBatchSampler, BucketOrder, bucket_accumulation, bucket_validation_batches
from ldm.data.bucketed import BucketedImages, Bucketing
from ldm.data.buckets import Buckets
from ldm.data.dataset import ImageDataset, box_classes, has_captions, map_classes, require_channels
from ldm.data.elastic_sampler import ElasticBatchSampler, accumulation, validation_batches
from ldm.data.held_out import hold_out
from ldm.data.loading import BrokenImages, TransformedDataset, collate
from ldm.data.transforms import EvalTransform, TrainTransform, Transform, TransformOfSize
from ldm.errors import ConfigError, DataError
from ldm.randomness import STANDARD, Draws, Randomness, Visits
from ldm.ranges import Count, CountOrZero, Fraction, Resolution, Seed
from ldm.runtime import distributed
from ldm.runtime.signals import held_back, ignore_in_worker
from ldm.sizes import Size, as_resolution, as_size

VALIDATION_SEED = 0x76616C6964
"""Validation uses the same draws in every run, whatever its seed, so that runs can be compared."""


class ElasticDataModule(LightningDataModule):
    """The base of every data module of ldm: the clock (images seen), the order of the loaders, the draws.

    Args:
        batch_size: *global* batch size: images of one optimizer step over all ranks and micro-batches.
        seed: the run's seed.
        micro_batch_size: maximum number of images on one device at a time, a divisor of `batch_size`; None: no limit.
        num_workers: loader processes per rank; 0: load in the main process.
    """

    def __init__(
        self, batch_size: Count, seed: Seed, micro_batch_size: Count | None = None, num_workers: CountOrZero = 0
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed
        self.micro_batch_size = micro_batch_size
        self.num_workers = num_workers
        self.trust: Sequence[str] = ()
        """Packages besides ldm's own that the configuration inside a checkpoint may name (`--trust`)."""
        self.randomness: Randomness = STANDARD
        """What the run's noise and order are made by."""
        self.bucketing: Bucketing | None = None
        """Of data sets with pictures of several sizes; set by the module that has them."""
        self._resumed = {"images_seen": 0, "step": 0}
        self._items: Visits | None = None
        self._order: BucketOrder | None = None
        self.accumulation(1)

    def meta_batch(self, rows: int = 2) -> dict[str, Any]:
        """A batch without values: every key of a real one, its tensors on torch's meta device.

        Args:
            rows: of the batch. Batch normalization refuses a single value a channel, so one row is not enough.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its batches hold: give it a meta_batch")

    def meta_batches(self, rows: int = 2) -> list[dict[str, Any]]:
        """Such a batch of each shape that batches have; the first is `meta_batch(rows)`."""
        return [self.meta_batch(rows)]

    @property
    def class_names(self) -> Sequence[str] | None:
        """The names of the classes of the training data, if it has some."""
        return None

    def meta_conditions(self, dataset: ImageDataset, rows: int, size: Size | None = None) -> dict[str, Any]:
        """What a batch of `dataset` holds beside its pictures or latents, without values; `size` is its bucket's."""
        images = self.batch_size
        if self.bucketing is not None and size is not None:
            images = self.bucketing.buckets.batch_size(size, images)
        batch: dict[str, Any] = {"draws": Draws(0, range(rows), images, "meta")}
        if dataset.num_classes is not None:
            batch["class_label"] = torch.zeros(rows, dtype=torch.int64, device="meta")
        if has_captions(dataset):
            batch["caption"] = [""] * rows
        return batch

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per step. Raises ConfigError if the batch cannot be divided evenly."""
        if self.bucketing is not None:
            sizes = self.bucketing.batch_sizes()
            return bucket_accumulation(sizes, self.batch_size, self.micro_batch_size, world_size)
        return accumulation(self.batch_size, self.micro_batch_size, world_size)

    @property
    def images_seen(self) -> int:
        """Training images of all finished optimizer steps, over all ranks and all resumed parts of the run."""
        # Counted from the trainer's steps, not from the batches loaded, which are ahead by the prefetched ones.
        if self._order is not None:
            return self._ahead + self._order.batch(self._step).first
        return self._resumed["images_seen"] + (self._step - self._resumed["step"]) * self.batch_size

    @property
    def _ahead(self) -> int:
        """Images seen beyond those that the buckets' order counts: none, unless a resume has changed batch sizes."""
        assert self._order is not None, "asked for only with buckets"
        return self._resumed["images_seen"] - self._order.batch(self._resumed["step"]).first

    @property
    def _step(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: the clock."""
        return {"images_seen": self.images_seen, "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint; the trainer restores its step itself."""
        self._resumed = {"images_seen": int(state_dict["images_seen"]), "step": int(state_dict["step"])}

    def training_loader(
        self, dataset: Dataset[Any], length: int | Sequence[int], collate_fn: Callable[..., dict[str, Any]]
    ) -> DataLoader[dict[str, Any]]:
        """Infinite micro-batches of this rank, from the run's current position.

        Args:
            dataset: indexed with (sample number, item), or with a list of them if it has `__getitems__`.
            length: number of items; with buckets, that of each one.
            collate_fn: rows, or the result of `__getitems__` -> batch with `sample_number` (N,) int64 on the host.
        """
        world = distributed.world_size()
        layout = {"accumulation": self.accumulation(world), "rank": distributed.rank(), "world_size": world}
        order = self.randomness.order
        if isinstance(length, int):
            self._items = order(self.seed, length)
            sampler = ElasticBatchSampler(
                length, self.batch_size, self.seed, lambda: self.images_seen, **layout, order=order
            )
            return self._loader(dataset, sampler, collate_fn)
        assert self.bucketing is not None, "lengths are those of its buckets"
        self._order = BucketOrder(length, self.bucketing.batch_sizes(), self.seed, order)
        rank_zero_info(f"buckets\n{self.bucketing.table()}")
        position = lambda: (self._step, self.images_seen)  # noqa: E731
        return self._loader(dataset, BucketBatchSampler(self._order, position, **layout), collate_fn)

    def validation_loader(
        self, dataset: Dataset[Any], length: int | Sequence[int], collate_fn: Callable[..., dict[str, Any]]
    ) -> DataLoader[dict[str, Any]]:
        """This rank's share of the validation items; arguments as for `training_loader`."""
        if not length:
            raise DataError("the validation data set is empty: leave it out, or add items to it")
        world, rank = distributed.world_size(), distributed.rank()
        shares = world * self.accumulation(world)
        if isinstance(length, int):
            batches = validation_batches(length, self.batch_size // shares, rank, world)
        else:
            assert self.bucketing is not None, "lengths are those of its buckets"
            sizes = [size // shares for size in self.bucketing.batch_sizes("validation")]
            batches = bucket_validation_batches(length, sizes, rank, world)
        return self._loader(dataset, batches, collate_fn)

    def _loader(
        self, dataset: Dataset[Any], batches: Any, collate_fn: Callable[..., Any]
    ) -> DataLoader[dict[str, Any]]:
        return _Loader(
            dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=collate_fn,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=ignore_in_worker,
        )

    def sources(self, numbers: Sequence[int]) -> list[str]:
        """The sources of the training images with these sample numbers, each once, for messages."""
        if self._order is not None:
            found = self._order.rows_of([number - self._ahead for number in numbers])
        else:
            found = [] if self._items is None else self._items(numbers)
        return list(dict.fromkeys(self.source(item) for item in found))

    def source(self, item: int) -> str:
        """The name of an item of the training data set in messages; its path, if it has one."""
        return f"item {item}"

    def attach_draws(self, batch: dict[str, Any], device: torch.device) -> Draws:
        """Replace a batch's `sample_number` by `draws`; in training also seed the ambient generators."""
        training = self.trainer is not None and bool(self.trainer.training)
        numbers, normals = batch.pop("sample_number"), self.randomness.normals
        if not training:
            draws = Draws(VALIDATION_SEED, numbers, self.batch_size, device, normals=normals)
        elif self._order is None:
            draws = Draws(self.seed, numbers, self.batch_size, device, normals=normals)
        else:
            found = self._order.batch(self._order.step_of(int(numbers[0]) - self._ahead))
            draws = Draws(self.seed, numbers, found.size, device, self._ahead + found.first, normals)
        batch["draws"] = draws
        if training:
            draws.seed_ambient()
        return draws


class _Loader(DataLoader[dict[str, Any]]):
    """Blocks SIGTERM in its workers until they have set their own handler; torch's would kill them."""

    def __iter__(self) -> Any:
        with held_back():
            return super().__iter__()


class ImageDataModule(ElasticDataModule):
    """Images for stage 1: batches of `image` (N,C,H,W) in [-1,1], `class_label`, `caption`, `draws`.

    Args:
        train: data set to train on.
        batch_size: global batch size.
        resolution: of the images, pixels: the side of a square, or [height, width].
        seed: the run's seed.
        channels: of the images: 1 (gray), 3 (RGB), 4 (RGBA, of files), or as many as the data set's arrays have.
        validation: data set to validate on.
        num_validation: without `validation`: hold out this many items of `train`, the same in every run; a tenth if
            there are no more than that.
        micro_batch_size: maximum number of images on one device at a time, a divisor of `batch_size`; None: no limit.
        num_workers: loader processes per rank.
        transform: random transform for training, picture -> (C,H,W) in [-1,1]; None: `TrainTransform(resolution)`.
            With buckets: a function from a size to its transform (in a configuration `partial: true`).
        eval_transform: deterministic transform for validation; None: `EvalTransform(resolution)`; with
            buckets as above.
        max_broken: the fraction of the images that may be unreadable before the run stops.
        buckets: instead of `resolution`: several sizes, each batch of one of them.

    Raises:
        ConfigError, DataError: sizes or data sets that do not fit together.
    """

    def __init__(
        self,
        train: ImageDataset,
        batch_size: Count,
        resolution: Resolution | None = None,
        seed: Seed = 0,
        channels: Count = 3,
        validation: ImageDataset | None = None,
        num_validation: CountOrZero = 0,
        micro_batch_size: Count | None = None,
        num_workers: CountOrZero = 0,
        transform: Transform | TransformOfSize | None = None,
        eval_transform: Transform | TransformOfSize | None = None,
        max_broken: Fraction = 0.01,
        buckets: Buckets | None = None,
    ) -> None:
        super().__init__(batch_size, seed, micro_batch_size, num_workers)
        for dataset in (train, validation):
            require_channels(dataset, channels, "data.params.channels")
        self.train_dataset, self.validation_dataset = split(train, validation, num_validation)
        self._own_validation = validation
        if (resolution is None) == (buckets is None):
            raise ConfigError("data.params: expected either `resolution` or `buckets`")
        if buckets is not None:
            self.bucketing = Bucketing(buckets, self.train_dataset, self.validation_dataset, batch_size)
        self._size = None if resolution is None else as_size(resolution)
        self.channels = channels
        self._transform_of = of_size(transform, TrainTransform, self.bucketing)
        self._eval_transform_of = of_size(eval_transform, EvalTransform, self.bucketing)
        self._broken = BrokenImages(len(self.train_dataset), max_broken, self.train_dataset)
        self._broken_validation = BrokenImages(len(self.validation_dataset or ()), max_broken, self.validation_dataset)

    def facts(self) -> dict[str, Any]:
        """What configurations refer to as `${data:...}`, and what must not change when a run resumes."""
        return {
            "channels": self.channels,
            "resolution": as_resolution(self.size),
            "batch_size": self.batch_size,
            **dataset_facts(self.train_dataset, self._own_validation),
            **({} if self.bucketing is None else self.bucketing.facts()),
        }

    @property
    def size(self) -> Size:
        """Of the images, pixels; with buckets, that of most."""
        return self._size or self.bucketing.default  # type: ignore[union-attr]  # one of both is given

    @property
    def transform(self) -> Transform:
        """Of training images of this `size`."""
        return self._transform_of(self.size)

    @property
    def eval_transform(self) -> Transform:
        """Of validation images of this `size`."""
        return self._eval_transform_of(self.size)

    def meta_batch(self, rows: int = 2) -> dict[str, Any]:
        return self._meta_batch(self.size, rows)

    def meta_batches(self, rows: int = 2) -> list[dict[str, Any]]:
        sizes = [self.size] if self.bucketing is None else self.bucketing.sizes()
        return [self._meta_batch(size, rows) for size in sizes]

    def _meta_batch(self, size: Size, rows: int) -> dict[str, Any]:
        image = torch.empty(rows, self.channels, *size, device="meta")
        return {"image": image, **self.meta_conditions(self.train_dataset, rows, size)}

    @property
    def class_names(self) -> Sequence[str] | None:
        return self.train_dataset.class_names

    def source(self, item: int) -> str:
        if self.bucketing is not None:
            item = self.bucketing.train.item(item)
        return self.train_dataset.path(item)

    def prepare_data(self) -> None:
        """Prepare the files, once per machine."""
        self.train_dataset.prepare()
        if self.validation_dataset is not None:
            self.validation_dataset.prepare()

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self.training_loader(*self._view("train", self._transform_of, self.seed), collate)

    def val_dataloader(self) -> DataLoader[dict[str, Any]] | list[Any]:
        if self.validation_dataset is None:
            return []
        return self.validation_loader(*self._view("validation", self._eval_transform_of, VALIDATION_SEED), collate)

    def _view(
        self, name: str, transform_of: TransformOfSize, seed: int
    ) -> tuple[Dataset[dict[str, Any]], int | list[int]]:
        """What a loader reads, and its length; `name` is `train` or `validation`."""
        dataset = self.train_dataset if name == "train" else self.validation_dataset
        assert dataset is not None, "checked by the caller"
        if self.bucketing is None:
            view = TransformedDataset(dataset, transform_of(self.size), self.channels, self.size, seed)
            return view, len(view)
        views = [
            TransformedDataset(part, transform_of(size), self.channels, size, seed)
            for size, part in self.bucketing.parts(name)
        ]
        return BucketedImages(views), [len(view) for view in views]

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Report and count unreadable images."""
        training = self.trainer is not None and bool(self.trainer.training)
        (self._broken if training else self._broken_validation).check(batch)
        return batch

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        self.attach_draws(batch, batch["image"].device)
        return batch


def of_size(given: Any, standard: Callable[..., Any], bucketing: Bucketing | None) -> Callable[..., Any]:
    """What makes the transform of a size: with buckets, what is given is that itself, otherwise a transform."""
    if given is None:
        return standard
    return given if bucketing is not None else lambda size: given


def class_facts(train: ImageDataset) -> dict[str, Any]:
    """How many classes the maps and boxes of a data set have, and their names; nothing where there are none."""
    found: dict[str, Any] = {}
    for kind, names in (("map", map_classes(train)), ("box", box_classes(train))):
        if names is not None:
            found |= {f"{kind}_classes": len(names), f"{kind}_class_names": names}
    return found


def dataset_facts(train: ImageDataset, validation: ImageDataset | None) -> dict[str, Any]:
    """The part of a data module's `facts` that describes its data sets.

    Of maps and boxes how many classes they have, `map_classes` and `box_classes`, and their names.

    Args:
        train: the data set to train on.
        validation: a separate data set to validate on; None: there is none, or a part of `train` is held out, whose
            images `source` covers as well.
    """
    facts: dict[str, Any] = {"num_classes": train.num_classes, "num_items": len(train), "source": train.fingerprint()}
    facts |= class_facts(train)
    return facts if validation is None else {**facts, "validation_source": validation.fingerprint()}


def split(
    train: ImageDataset, validation: ImageDataset | None, num_validation: int
) -> tuple[ImageDataset, ImageDataset | None]:
    """The data sets to train on and to validate on, from a data module's three parameters; see `ImageDataModule`."""
    if validation is None:
        return hold_out(train, num_validation) if num_validation else (train, None)
    if num_validation:
        raise ConfigError("data.params: give either `validation` or `num_validation`, not both")
    if train.class_names != validation.class_names:
        raise DataError(
            f"the classes of the validation data set differ from those of the training data set: "
            f"{validation.class_names} and {train.class_names}. Use the same class folders in both, or hold out "
            f"a part of the training data: data.params.validation=null data.params.num_validation=100"
        )
    return train, validation
