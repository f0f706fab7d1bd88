"""Whether samples are what they were asked to be: measures of a model that reads pictures, masks, maps or boxes.

Every measure has rows of numbers, one a sample, and beside its values those of a baseline that knows nothing.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from ldm.autoencoder.metrics import EXACT, OF_SSIM, structural_similarity
from ldm.evaluation.feature_store import Column
from ldm.evaluation.pictures.base import digest
from ldm.evaluation.pictures.made import Generated
from ldm.evaluation.values import Value
from ldm.images import to_uint8
from ldm.latents.columns import pixels
from ldm.ranges import Count
from ldm.runtime.float64 import double
from ldm.runtime.full_precision import full_precision
from ldm.sampling.conditions import Condition
from ldm.sampling.shown import HOLE
from ldm.weights.digest import weight_hash

FOLLOWED = ("psnr", "ssim", "lpips", "boxes", "map")
"""Measures of samples of dense models, by their names on the command line."""


class Followed(NamedTuple):
    """A batch of samples, and what they were asked by; all of it on the CPU.

    Attributes:
        images: the samples, (n, C, H, W) uint8.
        truths: the pictures of the items that they were asked by, (n, C, H, W) uint8.
        conditions: what each was asked by, n (`DenseItems.condition`).
        others: what the sample of the next seed is asked by, n: conditions shuffled, whatever batches and ranks are.
    """

    images: Tensor
    truths: Tensor
    conditions: Sequence[Condition]
    others: Sequence[Condition]


class Measure(Protocol):
    """Something to be known of samples and what they were asked by."""

    @property
    def column(self) -> Column:
        """Computes (n, k) rows from a `Followed`."""

    def values(self, rows: np.ndarray) -> list[Value]:
        """The numbers, with standard errors, from all rows (N, k).

        Baselines are values of their own, whose names say so: "PSNR in the hole", "PSNR in the hole, mean fill".
        """

    def notes(self, rows: np.ndarray) -> list[str]:
        """What counts for nothing in the numbers, from all rows (N, k): a line each."""


def followed(samples: Generated, indices: Sequence[int]) -> Followed:
    """Samples that items ask for, made once for all that is measured of them.

    Raises:
        DataError: an item cannot be read, or lacks something.
    """
    items = samples.recipe.items
    assert items is not None, "whoever asks has looked"
    seeds = samples.seeds[np.asarray(indices, dtype=np.int64)]
    own = items.places(seeds)
    following = (own + 1) % len(items)
    places = np.unique(np.concatenate([own, following]))
    said = dict(zip(places.tolist(), items.conditions(places), strict=True))
    conditions, others = ([said[place] for place in chosen.tolist()] for chosen in (own, following))
    return Followed(samples.of(seeds, conditions), items.truths(seeds), conditions, others)


@dataclass(frozen=True)
class Task:
    """What a sample has to be like its item's picture in, and what comes out where nothing is known.

    Attributes:
        name: of the task.
        metrics: that are taken of it, by their names on the command line.
        where: the pixels that are made: a batch -> (n, 1, H, W) bool; PSNR is that of these.
        place: what follows the name of PSNR.
        baseline: its name; "": there is none.
        without: its pictures: a batch -> (n, C, H, W) uint8.
    """

    name: str
    metrics: Sequence[str]
    where: Callable[[Followed], Tensor]
    place: str = ""
    baseline: str = ""
    without: Callable[[Followed], Tensor] | None = None


def hole(made: Followed) -> Tensor:
    """Where the pictures are painted anew."""
    return torch.stack([torch.as_tensor(condition["mask"]) > 0 for condition in made.conditions])


def everywhere(made: Followed) -> Tensor:
    """All pixels."""
    return torch.ones_like(made.truths[:, :1], dtype=torch.bool)


def mean_filled(made: Followed) -> Tensor:
    """The true pictures, their holes filled with the mean color of the rest; gray where there is no rest."""
    holes = hole(made)
    known = made.truths.long() * ~holes
    number = (~holes).sum((2, 3), keepdim=True)
    mean = (double(known.sum((2, 3), keepdim=True)) / number).nan_to_num(HOLE).round()
    return torch.where(holes, mean.to(torch.uint8), made.truths)


def bicubic(made: Followed) -> Tensor:
    """The low-resolution pictures at the size of the samples, by torchvision, which enlarges as Pillow does."""
    small = torch.stack([torch.as_tensor(condition["low_resolution"]) for condition in made.conditions])
    return to_uint8(resize(small.float(), [*made.truths.shape[2:]], InterpolationMode.BICUBIC, antialias=True))


INPAINTING = Task("inpainting", ("psnr", "lpips"), hole, " in the hole", "mean fill", mean_filled)
SUPER_RESOLUTION = Task("super-resolution", ("psnr", "ssim", "lpips"), everywhere, "", "bicubic", bicubic)
PAIRS = Task("pairs", ("psnr", "ssim", "lpips"), everywhere)
JUDGED = ("boxes", "map")
"""Keys of a condition that a judge looks for in the sample; its metric has the same name."""


def task_of(keys: Collection[str]) -> Task | None:
    """Of a model that reads these; None: what its samples should be like is not decided by what it reads."""
    known = {"masked_latent": INPAINTING, "low_resolution": SUPER_RESOLUTION, "pair": PAIRS}
    return next((task for key, task in known.items() if key in keys), None)


def metrics_of(keys: Collection[str]) -> tuple[str, ...]:
    """Those of `FOLLOWED` that a model has that reads these."""
    task = task_of(keys)
    return (*(() if task is None else task.metrics), *(key for key in JUDGED if key in keys))


def measures_of(
    keys: Collection[str],
    metrics: Collection[str],
    perceptual: Mapping[str, nn.Module],
    judges: Mapping[str, Measure],
    device: str | torch.device = "cpu",
    items: Count | None = None,
) -> list[Measure]:
    """The measures of a model.

    Args:
        keys: that it reads.
        metrics: what is asked for, names of `FOLLOWED`.
        perceptual: LPIPS, by its name: distances of pictures in [-1, 1], (N, C, H, W) twice -> (N,).
        judges: by the key that they look for, of `JUDGED`.
        device: on which the distances are computed.
        items: how many ask in turn; None: each sample is asked for by one of its own.
    """
    task, found = task_of(keys), []
    if task is not None and (wanted := {*metrics} & {*task.metrics}):
        distances = perceptual if "lpips" in wanted else {}
        found.append(Closeness(task, wanted, distances, torch.device(device), items))
    return [*found, *(judge for key, judge in judges.items() if key in keys and key in metrics)]


class Closeness:
    """How close samples are to the pictures of their items, and how close those of the baseline are.

    Args:
        task: of the model.
        metrics: that are computed, "psnr" and "ssim"; pictures have the size that it needs.
        perceptual: other distances by name, of pictures in [-1, 1], (N, C, H, W) twice -> (N,).
        device: on which they are computed.
        items: how many ask in turn; None: each sample is asked for by one of its own.
    """

    def __init__(
        self,
        task: Task,
        metrics: Collection[str],
        perceptual: Mapping[str, nn.Module],
        device: torch.device,
        items: Count | None = None,
    ) -> None:
        self.task = task
        own = {"psnr": f"PSNR{task.place}", "ssim": "SSIM"}
        self._names = [*(called for name, called in own.items() if name in metrics), *perceptual]
        self._metrics = [name for name in own if name in metrics]
        self._perceptual = {name: distance.to(device) for name, distance in perceptual.items()}
        self._device = device
        self._items = items

    @property
    def column(self) -> Column:
        weights = {name: weight_hash(dict(network.named_parameters())) for name, network in self._perceptual.items()}
        decides = {"closeness": self.task.name, "metrics": self._metrics, "networks": weights, "ssim": "of 0 to 1"}
        return Column(digest(decides), self.rows, self.task.name)

    def rows(self, made: Followed) -> Tensor:
        """(n, k): of the samples, then of the baseline, each distance; last the share of the picture that is made."""
        where = self.task.where(made)
        pictures = [made.images, *([] if self.task.without is None else [self.task.without(made)])]
        found = [one for images in pictures for one in self._distances(images, made.truths, where)]
        return torch.stack([*found, double(where).mean((1, 2, 3))], dim=1)

    def _distances(self, images: Tensor, truths: Tensor, where: Tensor) -> list[Tensor]:
        """Of each picture, (n,) float64 on the CPU, by `_names`."""
        found = [psnr(images, truths, where)] if "psnr" in self._metrics else []
        shown, real = (pixels(one.to(self._device)) for one in (images, truths))
        with full_precision(self._device.type):
            if "ssim" in self._metrics:
                found.append(structural_similarity(shown, real))
            found += [distance(shown, real) for distance in self._perceptual.values()]
        return [double(one.cpu()) for one in found]

    def values(self, rows: np.ndarray) -> list[Value]:
        """Means over the samples of which something is made: an empty hole is no work."""
        there = rows[:, -1] > 0
        asked, items = rows[there].astype(np.float64), turns(len(rows), self._items)[there]
        if not len(asked):
            return []
        found = []
        for place, name in enumerate(self._names):
            better = "higher" if name.startswith(("PSNR", "SSIM")) else "lower"
            settings = OF_SSIM if name == "SSIM" else {}
            found.append(mean_value(name, asked[:, place], items, better, settings))
            if self.task.without is not None:
                beside = asked[:, len(self._names) + place]
                found.append(mean_value(f"{name}, {self.task.baseline}", beside, items, "", settings))  # of no model
        return found

    def notes(self, rows: np.ndarray) -> list[str]:
        nothing = int((rows[:, -1] == 0).sum())
        note = f"{self.task.name}: {nothing} of {len(rows)} samples have an empty hole, which counts for nothing"
        return [note] if nothing else []


def psnr(images: Tensor, truths: Tensor, where: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture, in whole numbers until the end; at most `EXACT`.

    Args:
        images, truths: (n, C, H, W) uint8.
        where: the pixels that count, (n, 1, H, W) bool.

    Returns:
        (n,) float64; `EXACT` where no pixel counts.
    """
    squares = ((images.long() - truths.long()).square() * where).sum((1, 2, 3))
    number = where.sum((1, 2, 3)) * images.shape[1]
    return (10 * torch.log10(255**2 * double(number) / squares)).nan_to_num(EXACT).clamp(max=EXACT)


def turns(number: int, items: int | None) -> np.ndarray:
    """Which of so many items that ask in turn asks for each sample, counted from that of the first: (N,) int64."""
    return np.arange(number) % (items or max(1, number))


def mean_value(name: str, rows: np.ndarray, items: np.ndarray, better: str, settings: Mapping[str, Any]) -> Value:
    """The mean of numbers (N,), with its standard error where there are two items or more.

    Samples of one item are alike: the error is that of the items as clusters (Liang and Zeger 1986), so that a thousand
    samples that ten items ask for are no surer than ten of them make it. Each its own: the usual deviation / sqrt(N).

    Args:
        rows: the numbers.
        items: which item asked for each, (N,) whole numbers.
        settings: what else decides it, beside their number.
    """
    number, mean = len(rows), float(rows.mean())
    _, places = np.unique(items, return_inverse=True)
    sums = np.bincount(places, rows - mean)
    freedom = len(sums) - 1
    error = float(np.sqrt(np.square(sums).sum() * len(sums) / freedom) / number) if freedom else None
    return Value(name, mean, error, freedom or None, better=better, settings={"images": number, **settings})
