"""The data module of stage 2: latents from a cache, which it builds first if there is none."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ldm.autoencoder.codec import Codec
from ldm.data.bucketed import Bucketing
from ldm.data.buckets import Buckets
from ldm.data.datamodule import VALIDATION_SEED, ElasticDataModule, dataset_facts, of_size, split
from ldm.data.dataset import ImageDataset, require_channels
from ldm.data.drawn import Drawn
from ldm.data.transforms import EvalTransform
from ldm.diffusion.conditioners.features import Feature, meta_columns
from ldm.errors import ConfigError, DataError
from ldm.latents.bucketed import BucketedLatents, whole
from ldm.latents.columns import Column, Crop
from ldm.latents.dense import Dense
from ldm.latents.encoding import Encoding
from ldm.latents.manifest import CacheSpec, Manifest
from ldm.latents.masked import MaskedLatents
from ldm.latents.numbers import meta as number_columns
from ldm.latents.opening import Sources, opened
from ldm.latents.reader import LatentCache, LatentDataset
from ldm.latents.shards import MANIFEST
from ldm.latents.statistics import Statistics
from ldm.latents.wanted import Wanted, named
from ldm.ranges import Count, CountOrZero, Finite, Fraction, Resolution, Seed
from ldm.sizes import Size, as_resolution, as_size


class LatentDataModule(ElasticDataModule):
    """Latents for stage 2: batches of `latent` (N,c,h,w) float32, standardized; `class_label`, `draws`, conditions.

    A latent is sampled from its posterior each time it is seen, on the device. The autoencoder is loaded to build or to
    check the cache, and freed before training. Captions and features are computed once, into folders beside the
    latents' own, and which of an item's captions a sample sees depends on the sample number.

    Args:
        train: data set of images to train on.
        autoencoder: run folder or checkpoint of stage 1, or a folder of diffusers; or another first stage, made by its
            own class; None: the latents are the pixels themselves.
        batch_size: global batch size.
        seed: the run's seed.
        resolution: of the images that are encoded, pixels: the side of a square, or [height, width]; None: what the
            autoencoder was trained on.
        channels: of the images if there is no autoencoder; otherwise the autoencoder's.
        validation: data set of images to validate on.
        num_validation: without `validation`: hold out this many items of `train`, the same in every run; a tenth if
            there are no more than that.
        micro_batch_size: maximum number of latents on one device at a time, a divisor of `batch_size`; None: no limit.
        num_workers: loader processes per rank; 0 is fastest, since gathering a batch costs less than transferring it.
        transform: picture -> (C,H,W) in [-1,1], deterministic; None: `EvalTransform(resolution)`. With buckets: a
            function from a size to its transform (in a configuration `partial: true`).
        flip: mirror half of the samples in training. Without it mirror images are not encoded, and the cache is half as
            large; one that has them serves as well.
        cache: folder of this cache (with `train/`, `train-captions/`, ... in it), refused if it holds another; None:
            `cache/<fingerprint>`, so that caches of different content exist side by side.
        max_broken: the fraction of the images that may be unreadable; they are left out.
        encode_batch_size: images encoded at once while the cache is built.
        read_threads: threads that decode images while the cache is built.
        statistics: {mean: [...], std: [...]} per channel of the latents, by which they are standardized: those that a
            model which is trained further was trained with; None: the cache's own.
        features: what the cache keeps of captions or pictures, by a name, with which the columns of a batch begin
            (`text.tokens`). Their networks are in memory only while they are computed.
        numbers: what batches hold beside that: `original_size`, `crop_top_left`, `target_size`, or columns of the data
            set (ldm/latents/numbers.py).
        buckets: instead of `resolution`: several sizes, each batch of one of them, with a cache of latents for each.
        aligned: what the cache keeps of what lies on an item's picture (ldm/latents/aligned.py), by name of the column.
        drawn: columns that are drawn anew for each sample, from aligned ones (ldm/data/drawn.py), by name.
        masked: latents of the pictures with a hole in them.
    """

    def __init__(
        self,
        train: ImageDataset,
        autoencoder: str | Path | Codec | None,
        batch_size: Count,
        seed: Seed = 0,
        resolution: Resolution | None = None,
        channels: Count = 3,
        validation: ImageDataset | None = None,
        num_validation: CountOrZero = 0,
        micro_batch_size: Count | None = None,
        num_workers: CountOrZero = 0,
        transform: EvalTransform | Callable[[Resolution], EvalTransform] | None = None,
        flip: bool = True,
        cache: str | Path | None = None,
        max_broken: Fraction = 0.01,
        encode_batch_size: Count = 64,
        read_threads: Count = 4,
        statistics: Mapping[str, Sequence[Finite]] | None = None,
        features: Mapping[str, Feature] | None = None,
        numbers: Sequence[str] = (),
        buckets: Buckets | None = None,
        aligned: Mapping[str, Column] | None = None,
        drawn: Mapping[str, Drawn] | None = None,
        masked: MaskedLatents | None = None,
    ) -> None:
        super().__init__(batch_size, seed, micro_batch_size, num_workers)
        self.train_dataset, self.validation_dataset = split(train, validation, num_validation)
        if buckets is not None:
            if resolution is not None:
                raise ConfigError("data.params.resolution: leave it out where there are `buckets`, which have sizes")
            self.bucketing = Bucketing(buckets, self.train_dataset, self.validation_dataset, batch_size)
        self._own_validation = validation
        # The one that is given whole is freed with the others, and made again if it is asked for.
        self._given = autoencoder if isinstance(autoencoder, Codec) else None
        made_of = {} if self._given is None else self._given.config
        path = autoencoder if self._given is None else self._given.path
        self.autoencoder = None if autoencoder is None else (made_of, str(path))
        self.channels = channels
        self.flip = flip
        self.cache = None if cache is None else Path(cache)
        self.max_broken = max_broken
        self.encode_batch_size = encode_batch_size
        self.read_threads = read_threads
        self.features = named(features or {})
        self.numbers = tuple(numbers)
        self.dense = Dense(aligned or {}, drawn or {}, masked)
        if both := {*self.features} & {*self.dense.aligned, *self.dense.drawn}:
            raise ConfigError(f"data.params.features.{min(both)}: a column has that name, too: choose another one")
        self._rows: dict[str, LatentDataset | BucketedLatents] = {}
        self.caches: dict[str, Sequence[LatentCache]] = {}
        """Of the data sets `train` and `validation`, one for each size of the pictures."""
        self._statistics = None if statistics is None else Statistics.written(statistics)
        self._manifest: Manifest | None = None
        self._size = None if resolution is None else as_size(resolution)
        self._transform = transform
        self._codec: Codec | None = None
        self._live: Codec | None = None

    def facts(self) -> dict[str, Any]:
        """What configurations refer to as `${data:...}`, and what must not change when a run resumes.

        Needs the autoencoder's checkpoint, but no cache.
        """
        codec = self._load()
        channels, height, width = codec.latent_shape(self.image_size)
        if self.bucketing is not None:
            self.bucketing.check(codec.latent_shape)
        if self._statistics is not None:
            self._statistics.require(channels)
        return {
            "channels": channels,
            "resolution": as_resolution((height, width)),
            "batch_size": self.batch_size,
            **dataset_facts(self.train_dataset, self._own_validation),
            "down_factor": codec.down_factor,
            "image_resolution": as_resolution(self.image_size),
            "image_channels": codec.in_channels,
            # The weights at a path may have changed: a run can only resume in its own latent space.
            "autoencoder": None if self.autoencoder is None else codec.weight_hash(),
            **({} if self._statistics is None else {"statistics": asdict(self._statistics)}),
            **({"features": {name: one.describe() for name, one in self.features.items()}} if self.features else {}),
            **({} if self.bucketing is None else self.bucketing.facts()),
            **self.dense.facts(),
        }

    def meta_batch(self, rows: int = 2) -> dict[str, Any]:
        """Needs the autoencoder's checkpoint, but no cache."""
        return self._meta_batch(self.image_size, rows)

    def meta_batches(self, rows: int = 2) -> list[dict[str, Any]]:
        sizes = [self.image_size] if self.bucketing is None else self.bucketing.sizes()
        return [self._meta_batch(size, rows) for size in sizes]

    def _meta_batch(self, size: Size, rows: int) -> dict[str, Any]:
        latent = torch.empty(rows, *self._load().latent_shape(size), device="meta")
        batch = {"latent": latent, **self.meta_conditions(self.train_dataset, rows, size)}
        for name, feature in self.features.items():
            batch |= meta_columns(feature, name, rows)
        batch |= self.dense.meta(Crop(self._transform_of(size), self._load().in_channels), latent)
        return batch | number_columns(self.train_dataset, self.numbers, rows)

    @property
    def image_size(self) -> Size:
        """Of the images that are encoded, pixels; with buckets, that of most."""
        if self.bucketing is not None:
            return self.bucketing.default
        given = self._transform.size if isinstance(self._transform, EvalTransform) else None
        known = self._size or given or self._load().size
        if known is None:
            source = "an image" if self.autoencoder is None else self.autoencoder[1] or "the autoencoder"
            raise ConfigError(f"data.params.resolution: {source} does not state its resolution: set it here")
        return known

    @property
    def class_names(self) -> Sequence[str] | None:
        return self.train_dataset.class_names

    @property
    def transform(self) -> EvalTransform:
        """Of images of this `image_size`."""
        return self._transform_of(self.image_size)

    def _transform_of(self, size: Size) -> EvalTransform:
        made: EvalTransform = of_size(self._transform, EvalTransform, self.bucketing)(size)
        return made

    @property
    def manifest(self) -> Manifest:
        """Of the training cache, with the statistics that standardize all latents; DataError before `setup`.

        Where the cache was made with another decoder, it names the present one, with which samples are decoded.
        """
        self._opened("train")
        assert self._manifest is not None, "set with the cache"
        return self._manifest

    def prepare_data(self) -> None:
        """Prepare the source's files, once per machine."""
        for dataset in self._datasets().values():
            dataset.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Open the caches; build whatever is missing, together with all other ranks.

        Raises:
            DataError: a cache is damaged, or was made from another autoencoder or other images.
        """
        if self._rows:
            return
        encoding, device, sources = self._encoding(self._device()), self._device(), self._sources()
        wanted = Wanted(self.features, self.numbers, {name: sources.targets(name) for name in sources.datasets})
        for dataset in sources.datasets.values():
            wanted.demand(dataset)
            self.dense.demand(dataset)
        found = {name: opened(name, sources, encoding, self.dense) for name in sources.datasets}
        self.caches = {name: one.caches for name, one in found.items()}
        manifest = sources.joined(self.caches["train"]).decoded_by(encoding.codec.describe(encoding.weights))
        self._manifest = manifest if self._statistics is None else manifest.standardized_by(self._statistics)
        self._live = encoding.codec if self.dense.live else None
        self._codec = self._given = None  # its memory belongs to training now
        del encoding
        captions = {name: one.captions for name, one in found.items()}
        conditions = wanted.conditions({name: sources.parts(name) for name in found}, captions, device)
        drawn = {"train": (self.seed, self.flip), "validation": (VALIDATION_SEED, False)}
        self._rows = {name: one.rows(*drawn[name], conditions[name]) for name, one in found.items()}

    def _encoding(self, device: torch.device | str = "cpu") -> Encoding:
        """How the caches are made, with the autoencoder on a device."""
        codec = self._load().to(device)
        return Encoding(
            codec=codec,
            weights=codec.weight_hash(),
            transform_of=self._transform_of,
            cache=self.cache,
            encode_batch_size=self.encode_batch_size,
            read_threads=self.read_threads,
            trust=self.trust,
        )

    def _sources(self) -> Sources:
        return Sources(
            self._datasets(),
            self.image_size,
            self.bucketing,
            self.cache,
            self.max_broken,
            self.read_threads,
            self.flip,
        )

    def keep_scale(self, trained: Manifest) -> None:
        """Standardize latents as a run did that goes on with a cache made anew.

        On another device, or without mirror images that it had formerly, that has the same latents and, in the last
        digits, other statistics.

        Args:
            trained: of the run's checkpoint; nothing changes where it is of other latents.
        """
        own = self.manifest
        seen = replace(own.plan, mirrored=False)
        if own.statistics != trained.statistics and not seen.differences(trained.plan):
            self._manifest = own.standardized_by(trained.statistics)

    def described(self) -> list[str]:
        """A line for each folder of the open cache: what it holds, and its size."""
        parts = [part for name, rows in self._rows.items() for part in (*self.caches[name], *rows.parts())]
        return [str(part) for part in parts]

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        rows = self._opened("train")
        return self.training_loader(rows, rows.lengths, _as_gathered)

    def val_dataloader(self) -> DataLoader[dict[str, Any]] | list[Any]:
        if self.validation_dataset is None:
            return []
        rows = self._opened("validation")
        return self.validation_loader(rows, rows.lengths, _as_gathered)

    def _opened(self, name: str) -> LatentDataset | BucketedLatents:
        if name not in self._rows:
            raise DataError("the latent cache is not open yet: call setup() of the data module first")
        return self._rows[name]

    def source(self, item: int) -> str:
        # A row of the loader, in which broken images have none.
        return self.train_dataset.path(int(self._opened("train").items([item])[0]))

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Sample the latents: z = mean + std * noise, standardized."""
        mean, std = batch.pop("moments").float().unbind(1)  # each (N,c,h,w)
        draws = self.attach_draws(batch, mean.device)
        batch["latent"] = self.manifest.standardize(mean + std * draws.normal("posterior", mean.shape[1:]))
        self.dense.place(batch, self.manifest, self._live)
        return batch

    def expected(self) -> tuple[CacheSpec, Statistics | None]:
        """The plan of the training cache, and what will standardize it; None: the statistics of a cache to be built."""
        encoding, sources = self._encoding(), self._sources()
        placed = [encoding.place(part) for part in sources.sized("train")]
        plan = placed[0][1]
        if self.bucketing is not None:
            plan = whole(placed[self.bucketing.train.default][1], self.train_dataset)
        if self._statistics is None and all((folder / MANIFEST).is_file() for folder, _ in placed):
            return plan, sources.joined([LatentCache(folder) for folder, _ in placed]).statistics
        return plan, self._statistics

    def _load(self) -> Codec:
        if self._codec is None:
            if self.autoencoder is None:
                self._codec = Codec.pixels(self.channels)
            else:
                self._codec = self._given or Codec.of(*self.autoencoder, self.trust)
            for dataset in self._datasets().values():
                key = f"data.params.{'channels' if self.autoencoder is None else 'autoencoder'}"
                require_channels(dataset, self._codec.in_channels, key)
        return self._codec

    def _datasets(self) -> dict[str, ImageDataset]:
        both = {"train": self.train_dataset, "validation": self.validation_dataset}
        return {name: dataset for name, dataset in both.items() if dataset is not None}

    def _device(self) -> torch.device:
        if self.trainer is not None:
            return self.trainer.strategy.root_device
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cpu")


def _as_gathered(batch: dict[str, Any]) -> dict[str, Any]:
    """The collate function of a data set that returns whole batches."""
    return batch
