"""Dense conditions of samples: pictures, masks, maps and layouts, from what a user gives to the columns a model reads.

A condition has, with the model's other keys:

    image, mask       of a model that reads `mask` and `masked_latent`: (C,H,W) in [-1,1], the picture, and (1,H,W), 1
                      where it is painted anew. Elsewhere the sample is the picture, pixel for pixel. (A row of a batch,
                      with `masked_latent` itself, will do; then nothing is known that could be kept.)
    low_resolution    (C,H/f,W/f) in [-1,1], and, if it is said, `augmentation`, the level of noise that is put on it
    image, pair       (C,H,W) in [-1,1]
    map               (H,W) whole numbers
    boxes             (K,5): left, top, right, bottom in [0,1] of the picture, class; as many as there are
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.autoencoder.tiling import Tiling, encode
from ldm.diffusion.conditioners.low_resolution import LEVEL, LowResolution
from ldm.errors import ConfigError
from ldm.sampling.conditions import Columns, Condition
from ldm.sizes import Size, spell

if TYPE_CHECKING:
    from ldm.sampling.pipeline import Pipeline


@dataclass(frozen=True)
class Dense:
    """What a model's dense conditions are, as far as its checkpoint says.

    Args:
        map_classes, box_classes: names of the classes; None: not known.
        num_map_classes: None: not known.
        most_boxes: of a layout; None: no limit.
        factor: a picture's side to that of its `low_resolution`; None: that of the autoencoder, as in the lineage.
        fill: what is put into the hole before a picture is encoded, in [-1,1].
    """

    map_classes: Sequence[str] | None = None
    box_classes: Sequence[str] | None = None
    num_map_classes: int | None = None
    most_boxes: int | None = None
    factor: int | None = None
    fill: float = 0.0

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Dense":
        """From what a data module says of itself (`LatentDataModule.facts`), and a checkpoint with it."""
        aligned = facts.get("aligned") or {}
        return cls(
            map_classes=facts.get("map_class_names"),
            box_classes=facts.get("box_class_names"),
            num_map_classes=facts.get("map_classes") or (aligned.get("map") or {}).get("num_classes"),
            most_boxes=(aligned.get("boxes") or {}).get("most"),
            factor=((facts.get("drawn") or {}).get("low_resolution") or {}).get("factor"),
            fill=(facts.get("masked") or {}).get("fill", 0.0),
        )


def asked(reads: Sequence[str], condition: Condition) -> tuple[str, ...]:
    """The keys of a condition of a model that reads these columns; `condition` shows which form it has."""
    if "masked_latent" not in reads or "masked_latent" in condition:
        return tuple(reads)
    return tuple(dict.fromkeys("image" if key == "masked_latent" else key for key in reads))


def check(pipeline: "Pipeline", table: Columns, size: Size | None) -> None:
    """ConfigError, naming the condition, unless the columns are those of samples of this size."""
    height, width = pipeline.image_size(size)
    channels, reads, factor = pipeline.codec.in_channels, pipeline.conditioner.keys, pipeline.dense.factor
    shapes: dict[str, tuple[int | None, ...]] = {"map": (height, width), "pair": (None, height, width)}
    if factor is not None:
        shapes["low_resolution"] = (channels, height // factor, width // factor)
    if "masked_latent" in reads:
        shapes["masked_latent"] = pipeline.codec.latent_shape((height, width))
        shapes |= {"mask": (1, height, width), "image": (channels, height, width)}
    for key in shapes.keys() & table.keys():
        wanted, column = shapes[key], table[key]
        found = tuple(column.shape[1:]) if isinstance(column, Tensor) else ("a text",)
        if len(found) != len(wanted) or any(a not in (None, b) for a, b in zip(wanted, found, strict=True)):
            spelled = ", ".join("any" if side is None else str(side) for side in wanted)
            raise ConfigError(
                f"conditions: {key}: expected ({spelled}) for samples of {spell((height, width))} pixels, found {found}"
            )
    levels, most = table.get(LEVEL), most_noise(pipeline)
    if most is not None and isinstance(levels, Tensor) and not bool(((levels >= 0) & (levels <= most)).all()):
        raise ConfigError(
            f"condition {LEVEL}: expected 0 to {most:g}, the levels of training, found "
            f"{', '.join(f'{level:g}' for level in levels.flatten().unique().tolist())}"
        )
    boxes, there = table.get("boxes"), table.get("boxes_mask")
    if isinstance(boxes, Tensor) and isinstance(there, Tensor):
        for number, (row, mask) in enumerate(zip(boxes, there, strict=True)):
            check_boxes(row[mask.bool()], f"condition {number}: boxes", pipeline.dense)


def check_boxes(boxes: Tensor, what: str, dense: Dense) -> None:
    """ConfigError, beginning with `what`, for boxes (K,5) that do not lie on the picture or have an unknown class."""
    if dense.most_boxes is not None and len(boxes) > dense.most_boxes:
        raise ConfigError(
            f"{what}: expected {dense.most_boxes} boxes at most, as the model was trained, found {len(boxes)}"
        )
    for left, top, right, bottom, label in boxes.tolist():
        box = f"[{left:g}, {top:g}, {right:g}, {bottom:g}]"
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ConfigError(
                f"{what}: expected [left, top, right, bottom] in fractions of the picture, 0 <= left < right <= 1 and "
                f"0 <= top < bottom <= 1, found {box}"
            )
        most = None if dense.box_classes is None else len(dense.box_classes)
        if label != int(label) or label < 0 or (most is not None and label >= most):
            known = "0 and up" if most is None else f"0 to {most - 1}"
            raise ConfigError(f"{what}: {box}: expected a class from {known}, found {label:g}")


def most_noise(pipeline: "Pipeline") -> float | None:
    """The highest level of noise that a sample may have put on its low-resolution picture; None: the model has none."""
    found = [part.most for part in pipeline.denoiser["conditioner"].modules() if isinstance(part, LowResolution)]
    return min((most for most in found if most > 0), default=None)


def low_factor(pipeline: "Pipeline") -> int:
    """A picture's side to that of its `low_resolution`."""
    return pipeline.dense.factor or pipeline.codec.down_factor


def completed(pipeline: "Pipeline", batch: Mapping[str, Any], tile: Tiling | None) -> dict[str, Any]:
    """A batch of conditions on the pipeline's device, with what the model reads beside: `masked_latent`.

    Encoded here, since that of all samples would not fit into memory; the mean of the posterior, standardized.
    """
    found = dict(batch)
    reads = pipeline.conditioner.keys
    if "mask" in found and "mask" in reads:
        found["mask"] = (found["mask"] > 0).float()
    if "masked_latent" in reads and "masked_latent" not in found:
        # Imported here: torchvision loads torch's compiler, half of a sampler's start, and only pictures need it.
        from ldm.latents.masked import filled

        left = filled(found["image"], found["mask"], pipeline.dense.fill)
        mean = encode(pipeline.codec, left, tile)[0].half().float()  # rounded as a cache keeps it
        found["masked_latent"] = pipeline.manifest.standardize(mean.to(pipeline.device))
    return found


def kept(pipeline: "Pipeline", images: Tensor, batch: Mapping[str, Any] | None) -> Tensor:
    """Samples (N,C,H,W) in the hole, the condition's picture elsewhere, where there is one."""
    if batch is None or "image" not in batch or "masked_latent" not in pipeline.conditioner.keys:
        return images
    return torch.where(batch["mask"].to(images.device) > 0, images, batch["image"].to(images.device))
