"""Dense conditions in the batches of stage 2: what lies on the pictures, kept, drawn anew, or encoded behind masks.

    aligned    kept in a part of the cache each (aligned.py), mirrored when a batch is gathered
    drawn      made of these for each sample, with random numbers of its own (ldm/data/drawn.py)
    masked     latents of pictures with a hole (masked.py)

Pixels are uint8 until they are on the device.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.autoencoder.codec import Codec
from ldm.data.dataset import ImageDataset
from ldm.data.drawn import Drawn, draw_rows, meta_column
from ldm.data.transforms import EvalTransform
from ldm.errors import ConfigError, DataError
from ldm.latents.aligned import Pixels
from ldm.latents.columns import VALUE, AlignedRows, Column, Crop, hole, pixels
from ldm.latents.dataset_parts import CAPTIONS_NAME, DatasetParts
from ldm.latents.manifest import Manifest
from ldm.latents.masked import KEY, LATENT, MASK, NAME, MaskedLatents, MaskedRows, live
from ldm.latents.part_reader import PartReader

_TAKEN = ("latent", "moments", "sample_number", "draws", "class_label", "caption", LATENT, NAME, CAPTIONS_NAME)
_TOO_MANY = "data.params.aligned.{name}: {cut} of {rows} items have more of them than are kept; the largest are"


@dataclass(frozen=True)
class Dense:
    """What a configuration wants of them.

    Args:
        aligned: by name of the column.
        drawn: by name of the column.
        masked: None: no latents of masked pictures.

    Raises:
        ConfigError: two of one name, or a name that a batch has otherwise.
    """

    aligned: Mapping[str, Column] = field(default_factory=dict)
    drawn: Mapping[str, Drawn] = field(default_factory=dict)
    masked: MaskedLatents | None = None

    def __post_init__(self) -> None:
        for group, kind, hint in (("aligned", Column, "ldm/latents/aligned.py"), ("drawn", Drawn, "ldm/data/drawn.py")):
            for name, one in getattr(self, group).items():
                key = f"data.params.{group}.{name}"
                if not name.isidentifier() or name in _TAKEN or name.endswith("_mask"):
                    raise ConfigError(f"{key}: expected a name of letters, digits and _ that no other column has")
                if not isinstance(one, kind):
                    raise ConfigError(f"{key}: expected a column ({hint}), found {type(one).__name__}")
        both = {*self.aligned} & {*self.drawn}
        both |= {MASK} & {*self.aligned, *self.drawn} if self.masked is not None else set()
        if both:
            raise ConfigError(
                f"data.params: two columns of the name {min(both)}: keep one of data.params.aligned, .drawn and .masked"
            )
        self._check_masked()

    def _check_masked(self) -> None:
        if self.masked is None or self.masked.masks is None:
            return
        if self.masked.variants is None and not isinstance(self.aligned.get("image"), Pixels):
            raise ConfigError(
                f"{KEY}: without variants pictures are encoded in the loop: have the cache keep them, with "
                "data.params.aligned.image={target: ldm.latents.aligned.Pixels}, or say how many variants"
            )
        for name in self.masked.masks.reads:
            if name not in self._readable:
                raise ConfigError(f"{KEY}.masks: reads {name}, which is not in data.params.aligned: add it")

    @property
    def _readable(self) -> dict[str, Column]:
        return {"image": Pixels(), **self.aligned}

    @property
    def live(self) -> bool:
        """Whether the autoencoder is needed while a model trains."""
        return self.masked is not None and self.masked.variants is None

    @property
    def all_drawn(self) -> dict[str, Drawn]:
        """What is drawn for each sample, with the masks of which nothing is cached."""
        if self.masked is None or self.masked.masks is None or not self.live:
            return dict(self.drawn)
        return {**self.drawn, MASK: self.masked.masks}

    def facts(self) -> dict[str, Any]:
        """What must not change when a run resumes; nothing where nothing is wanted."""
        groups: dict[str, Mapping[str, Column | Drawn]] = {"aligned": self.aligned, "drawn": self.drawn}
        found = {name: {key: one.describe() for key, one in group.items()} for name, group in groups.items() if group}
        return found if self.masked is None else {**found, "masked": self.masked.describe()}

    def demand(self, dataset: ImageDataset) -> None:
        """ConfigError if its first item lacks any of it: as far as can be seen before hours of encoding."""
        reads = {f"data.params.aligned.{name}": column.reads for name, column in self.aligned.items()}
        if self.masked is not None and self.masked.masks is None:
            reads[KEY] = "mask"
        for item in range(len(dataset)) if reads else ():
            try:
                found = dataset[item]
            except DataError:
                continue
            for key, name in reads.items():
                if name not in found:
                    raise ConfigError(
                        f"{key}: reads {name}, and the items of the data set ({dataset.path(item)}, ...) have "
                        f"{', '.join(found)}: name another data set, or leave it out"
                    )
            return

    def meta(self, crop: Crop, latent: Tensor) -> dict[str, Tensor]:
        """The columns of a batch with these (N,c,h,w) latents, without values, as a model reads them."""
        rows = len(latent)
        raw: dict[str, Tensor] = {}
        batch: dict[str, Tensor] = {}
        for name, column in self.aligned.items():
            part = column.part(crop)
            raw[name] = torch.empty(rows, *part.shape, dtype=part.dtype, device="meta")
            batch[name] = column.placed(raw[name])
            if part.ragged:
                batch[f"{name}_mask"] = torch.empty(rows, part.shape[0], dtype=torch.bool, device="meta")
        for name, drawn in self.all_drawn.items():
            batch[name] = placed(name, meta_column(name, drawn, raw))
        if self.masked is not None:
            batch[MASK] = torch.empty(rows, 1, *crop.size, device="meta")
            batch[LATENT] = torch.empty_like(latent)
        return batch

    def opened(self, parts: DatasetParts, crop: Crop, codec: Codec, encoder: str, mirrored: bool) -> "DenseRows | None":
        """Those of a data set, or of a bucket of one, whose parts are computed where they are not there.

        Args:
            parts: of the data set.
            crop: of its pictures.
            codec: the autoencoder.
            encoder: the hash of its encoder.
            mirrored: mirror images are seen, too.
        """
        if not (self.aligned or self.all_drawn or self.masked):
            return None
        if not isinstance(crop.transform, EvalTransform):
            raise ConfigError(
                "data.params.transform: what lies on pictures is cropped as EvalTransform crops them, found "
                f"{type(crop.transform).__name__}: leave it out, or data.params.aligned, .drawn and .masked"
            )
        kept = {
            name: parts.of_items(name, AlignedRows(column, crop), f"data.params.aligned.{name}", _TOO_MANY)
            for name, column in self.aligned.items()
        }
        masked = None
        if self.masked is not None and not self.live:
            rows = MaskedRows(self.masked, crop, codec, encoder, self._readable)
            if not mirrored and not parts.has(NAME, rows):  # with mirror images it serves as well
                rows = replace(rows, mirrored=False)
            masked = parts.of_items(NAME, rows, KEY)
        return DenseRows(self, crop, kept, masked)

    def place(self, batch: dict[str, Any], manifest: Manifest, codec: Codec | None) -> None:
        """Turn the columns of a batch, on the device, into what a model reads.

        Args:
            batch: changed in place.
            manifest: standardizes latents.
            codec: the autoencoder, where it is needed in the loop.
        """
        for name, column in self.aligned.items():
            batch[name] = column.placed(batch[name])
        for name in self.all_drawn:
            batch[name] = placed(name, batch[name])
        if self.masked is None:
            return
        if self.live:
            assert codec is not None, "kept where it is needed"
            batch[LATENT] = live(batch["image"], batch[MASK], codec, self.masked.fill)
        else:
            batch[MASK] = hole(batch[MASK])
        batch[LATENT] = manifest.standardize(batch[LATENT].float())


@dataclass(frozen=True)
class DenseRows:
    """The open parts of a data set, or of a bucket of one, whose items they number.

    Args:
        dense: what is wanted.
        crop: of the pictures.
        kept: of aligned columns, by name.
        masked: of masked pictures; None: there is none.
    """

    dense: Dense
    crop: Crop
    kept: Mapping[str, PartReader]
    masked: PartReader | None

    def parts(self) -> list[PartReader]:
        return [*self.kept.values(), *([] if self.masked is None else [self.masked])]

    @property
    def broken(self) -> np.ndarray:
        """Items that lack some of it, ascending: int64. A batch must not have them."""
        several = [part.broken for part in self.parts()]
        return np.unique(np.concatenate([np.zeros(0, np.int64), *several]).astype(np.int64))

    def gather(self, items: np.ndarray, numbers: np.ndarray, mirrored: np.ndarray, seed: int) -> dict[str, Tensor]:
        """The columns of a batch on the host: pixels as uint8, latents as they are stored.

        Args:
            items: (N,) int64.
            numbers: (N,) int64, the sample numbers.
            mirrored: (N,) bool: of these samples the mirror image is seen.
            seed: of the run; of validation `VALIDATION_SEED`.
        """
        batch: dict[str, Tensor] = {}
        first, sides = np.zeros(len(items), np.int64), torch.from_numpy(mirrored)
        for name, part in self.kept.items():
            found = part.gather(name, items, first)
            rows = found[f"{name}.{VALUE}"]
            rows[sides] = self.dense.aligned[name].mirrored(rows[sides])
            batch[name] = rows
            if (mask := found.get(f"{name}.{VALUE}_mask")) is not None:
                batch[f"{name}_mask"] = mask
        kept = dict(batch)
        for name, drawn in self.dense.all_drawn.items():
            batch[name] = draw_rows(name, drawn, kept, seed, numbers)
        if self.masked is not None and self.dense.masked is not None:
            batch |= self.dense.masked.gathered(self.masked, self.crop.size, items, numbers, mirrored, seed)
        return batch


def placed(name: str, rows: Tensor) -> Tensor:
    """A drawn column as a model reads it: a mask as 0 and 1, pixels in [-1,1]."""
    return hole(rows) if name == MASK else pixels(rows)
