"""Items of a data set as samples are asked for by them: what lies on their pictures, cropped as for a cache.

For previews and evaluation, which need no cache. What is drawn for an item, such as a mask, is always the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm.data.asked_for import asked_for
from ldm.data.datamodule import VALIDATION_SEED
from ldm.data.dataset import ImageDataset
from ldm.data.drawn import draw_rows
from ldm.data.transforms import EvalTransform
from ldm.errors import DataError
from ldm.latents.aligned import Mask, Pixels, hole, pixels
from ldm.latents.columns import Crop
from ldm.latents.dense import Dense, placed
from ldm.latents.manifest import Manifest
from ldm.latents.masked import LATENT, MASK, NAME
from ldm.randomness import permutation
from ldm.sizes import Size

_SAID = ("class_label", "caption")


@dataclass(frozen=True)
class DenseItems:
    """
    Args:
        dense: the columns of a batch.
        crop: of the pictures.
    """

    dense: Dense
    crop: Crop

    @classmethod
    def of(cls, dense: Dense, manifest: Manifest, size: Size | None = None) -> "DenseItems":
        """As the latents of the manifest were made, or at another size."""
        made = manifest.plan.pixels
        transform = EvalTransform(size or made["resolution"], made.get("interpolation", "bicubic"))
        return cls(dense, Crop(transform, made["channels"]))

    def says(self, keys: Sequence[str]) -> bool:
        """Whether items say all that a model reads that reads these."""
        own = [*self.dense.aligned, *(f"{name}_mask" for name in self.dense.aligned), *self.dense.drawn]
        return {*keys} <= {*own, *_SAID, *(() if self.dense.masked is None else (MASK, LATENT))}

    def condition(self, item: Mapping[str, Any], keys: Sequence[str], number: int, path: str) -> dict[str, Any]:
        """What a sample is asked for by, which is to be like the item (ldm/sampling/dense.py).

        Args:
            item: of the data set.
            keys: that the model reads.
            number: of the item, which decides what is drawn for it.
            path: of the item, for messages.

        Raises:
            DataError: the item lacks something, or it does not fit its picture.
        """
        rows = {name: column.row(item, self.crop, path)[0] for name, column in self.dense.aligned.items()}
        found: dict[str, Any] = asked_for(item, [key for key in keys if key in _SAID], path)
        found |= {name: self.dense.aligned[name].placed(row[None])[0] for name, row in rows.items() if name in keys}
        for name, drawn in self.dense.drawn.items():
            if name in keys:
                found[name] = placed(name, draw_rows(name, drawn, _batch(rows), VALIDATION_SEED, [number]))[0]
        if LATENT in keys:
            found |= self._masked(item, rows, number, path)
        return found

    def _masked(self, item: Mapping[str, Any], rows: Mapping[str, Tensor], number: int, path: str) -> dict[str, Tensor]:
        image, _ = Pixels().row(item, self.crop, path)
        assert self.dense.masked is not None, "as `says` says"
        masks = self.dense.masked.masks
        if masks is None:
            mask, _ = Mask().row(item, self.crop, path)
        else:
            mask = draw_rows(NAME, masks, _batch({"image": image, **rows}), VALIDATION_SEED, [number])[0]
        return {"image": pixels(image), MASK: hole(mask)}

    def picture(self, item: Mapping[str, Any], path: str) -> Tensor:
        """The item's picture, as the autoencoder sees it: (C,H,W) uint8."""
        return Pixels().row(item, self.crop, path)[0]

    def some(self, dataset: ImageDataset, keys: Sequence[str], number: int) -> list[tuple[dict[str, Any], Tensor]]:
        """Conditions and pictures of that many items, scattered, always the same; none if items do not say `keys`."""
        if not keys or not self.says(keys):
            return []
        found = []
        for place in permutation(0, 0, len(dataset))[:number].tolist():
            try:
                item, path = {**dataset[place]}, dataset.path(place)
                found.append((self.condition(item, keys, place, path), self.picture(item, path)))
            except DataError:
                continue
        return found


def _batch(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: row[None] for name, row in rows.items()}
