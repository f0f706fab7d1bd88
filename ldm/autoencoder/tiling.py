"""Pictures larger than memory or training: overlapping tiles, each encoded or decoded alone, joined without seams.

Where two tiles overlap one fades into the other, smoothly and in the middle half of the overlap only: the outer quarter
of it, where a tile lacks its surroundings, counts for nothing. So a network whose output depends on no more than a
quarter of the overlap around gives exactly what it gives of the whole. Of others the norms are those of the whole
picture, nearly (whole_norms.py), and attention stays within a tile.

Measured, mean difference from the whole in levels of 255: the quickstart's autoencoder on 96 x 192 pixels in tiles of
32 with an overlap of 16, 1.7 (3.8 with norms of each tile, 5.0 with an overlap of 4 as well), in tiles of 64 with 32,
0.9; its reconstruction errs by 8.6 as a whole, and by 8.7 in either. Peak memory of decoding 2,048 x 2,048 pixels with
configs/autoencoder/kl_f8.yaml in float32 on a CPU, of which 0.84 GiB are the interpreter and the weights: 1.2 GiB in
tiles of 256, 1.9 GiB in tiles of 512 (seen in the first tiles, which are as all others; the picture itself adds 0.05).
As a whole 512 x 512 pixels take 1.9 GiB, so that 2,048 would take about 17, which was not tried.

Peak memory of `sample.py --image FILE --tile 256 --overlap 32` for 4x super-resolution of 500 x 500 to 2,000 x 2,000
pixels in float32 on a CPU, by configs/emoji_scenes/super_resolution.yaml and its autoencoder, both of 64 channels: 1.0
GiB with 4 and with 20 steps, 1 and 3 minutes of two cores.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import TypeVar

import torch
from torch import Tensor

from ldm.autoencoder.codec import Codec
from ldm.autoencoder.whole_norms import WholeNorms
from ldm.errors import ConfigError
from ldm.sizes import Size, nearest, spell

T = TypeVar("T")

Report = Callable[[str, int, int], None]
"""What is being done ("decoding"), and how many tiles of it are done, of how many; what it raises ends the work."""


def unreported(doing: str, done: int, total: int) -> None:
    """To nobody."""


@dataclass(frozen=True)
class Window:
    """A tile's place: `rows` and `columns` of the whole, and `weights` (h,w), which sum to 1 over all windows."""

    rows: slice
    columns: slice
    weights: Tensor

    def of(self, whole: Tensor) -> Tensor:
        """The window's part of (N,C,H,W), a view."""
        return whole[..., self.rows, self.columns]

    def add(self, whole: Tensor, part: Tensor) -> None:
        """Add the weighted part (N,C,h,w) to `whole` (N,C,H,W)."""
        self.of(whole).add_(part * self.weights)


@dataclass(frozen=True)
class Tiling:
    """How a large picture is cut.

    Args:
        tile: (height, width), pixels.
        overlap: of neighbors, at least, pixels.
        at_once: tiles that a diffusion model denoises at once; affects only speed and memory. (The autoencoder, whose
            layers take more memory, has one at a time.)
        surveys: times that all tiles go through the autoencoder beforehand, which then normalizes each by the mean and
            variance of the whole picture (whole_norms.py); 0: by its own. As much time again for each.
        report: called after each tile, or after those that are denoised at once.

    Raises:
        ConfigError: an overlap of nothing, or of more than half a tile.
    """

    tile: Size
    overlap: int
    at_once: int = 8
    surveys: int = 1
    report: Report = field(default=unreported, compare=False)

    def __post_init__(self) -> None:
        if not 0 < 2 * self.overlap <= min(self.tile):
            raise ConfigError(
                f"tile overlap: expected 1 pixel to half of a tile's side, {min(self.tile) // 2}, found {self.overlap}"
            )
        if self.at_once < 1:
            raise ConfigError(f"tiles at once: expected 1 or more, found {self.at_once}")

    def require(self, size: Size, factor: int) -> None:
        """ConfigError unless these tiles fit a picture of `size` and an autoencoder that divides by `factor`."""
        if self.tile[0] % factor or self.tile[1] % factor:
            raise ConfigError(
                f"tile {spell(self.tile)}: expected multiples of the autoencoder's down factor {factor}: "
                f"{nearest(self.tile, factor)}"
            )
        if self.overlap % factor:
            raise ConfigError(
                f"tile overlap {self.overlap}: expected a multiple of the autoencoder's down factor {factor}: "
                f"{nearest((self.overlap, self.overlap), factor)}"
            )
        if self.tile[0] > size[0] or self.tile[1] > size[1]:
            raise ConfigError(
                f"tile {spell(self.tile)}: is larger than the picture, {spell(size)}; make it smaller, or leave it out"
            )

    def windows(self, size: Size, factor: int, scale: int = 1, device: torch.device | str = "cpu") -> list[Window]:
        """The tiles of a picture, row by row, in positions of its latent times `scale`: `factor` for pixels.

        Args:
            size: of the picture, pixels, a multiple of `factor`.
            factor: pixels to one latent position.
            device: of the weights.
        """
        spans = [
            [*_spans(whole // factor, tile // factor, self.overlap // factor, scale)]
            for whole, tile in zip(size, self.tile, strict=True)
        ]
        return [
            Window(rows, columns, (down[:, None] * across).to(device))
            for (rows, down), (columns, across) in product(*spans)
        ]


def _spans(side: int, tile: int, overlap: int, scale: int) -> Iterator[tuple[slice, Tensor]]:
    """Evenly spaced spans of one side, with weights (tile * scale,) that sum to 1 at each place."""
    gaps = math.ceil((side - tile) / (tile - overlap))
    starts = [round(place * (side - tile) / max(1, gaps)) * scale for place in range(gaps + 1)]
    tile, overlap = tile * scale, overlap * scale
    rise = _rise(overlap)
    total = torch.zeros(side * scale, dtype=torch.float64)
    ramps = []
    for start in starts:
        ramp = torch.ones(tile, dtype=torch.float64)
        if start > 0:
            ramp[:overlap] = rise
        if start + tile < side * scale:
            ramp[tile - overlap :] *= rise.flip(0)
        total[start : start + tile] += ramp
        ramps.append(ramp)
    for start, ramp in zip(starts, ramps, strict=True):
        span = slice(start, start + tile)
        yield span, (ramp / total[span]).float()


def _rise(overlap: int) -> Tensor:
    """(overlap,) from 0 to 1: half a wave in the middle half of it, whose values and mirror image sum to 1."""
    border = overlap // 4
    place = (torch.arange(overlap, dtype=torch.float64) + 0.5 - border) / (overlap - 2 * border)
    return torch.sin(place.clamp(0, 1) * math.pi / 2) ** 2


@torch.no_grad()
def decode(codec: Codec, latents: Tensor, tiling: Tiling | None) -> Tensor:
    """`codec.decode` tile by tile: (N,c,h,w), not standardized -> images (N,C,H,W) float32 in [-1, 1].

    Memory: the images, and what the decoder takes for one tile.
    """
    if tiling is None:
        return codec.decode(latents)
    size = latents.shape[2] * codec.down_factor, latents.shape[3] * codec.down_factor
    pairs = _pairs(codec, size, tiling)
    images = torch.zeros(len(latents), codec.in_channels, *size, device=codec.device)
    for latent, image in zip(latents.split(1), images.split(1), strict=True):
        decoded = partial(_decoded, codec, latent)
        for (_, place), part in _each(codec, pairs, tiling, "decoding", decoded):
            place.add(image, part)
    return images


def _decoded(codec: Codec, latent: Tensor, there: Window, here: Window) -> Tensor:
    return codec.decode(there.of(latent))


@torch.no_grad()
def encode(codec: Codec, images: Tensor, tiling: Tiling | None) -> tuple[Tensor, Tensor]:
    """`codec.encode` tile by tile: images (N,C,H,W) in [-1, 1] -> mean and std, each (N,c,h,w), not standardized."""
    if tiling is None:
        return codec.encode(images)
    size = images.shape[2], images.shape[3]
    pairs = _pairs(codec, size, tiling)
    mean, std = torch.zeros(2, len(images), *codec.latent_shape(size), device=codec.device)
    for image, *moments in zip(images.split(1), mean.split(1), std.split(1), strict=True):
        for (place, _), parts in _each(codec, pairs, tiling, "encoding", partial(_encoded, codec, image)):
            for whole, part in zip(moments, parts, strict=True):
                place.add(whole, part)
    return mean, std


def _encoded(codec: Codec, image: Tensor, there: Window, here: Window) -> tuple[Tensor, Tensor]:
    return codec.encode(here.of(image))


Pair = tuple[Window, Window]
"""A tile as a window of a picture's latent, and of its pixels."""


def _pairs(codec: Codec, size: Size, tiling: Tiling) -> list[Pair]:
    factor = codec.down_factor
    tiling.require(size, factor)
    latent, pixels = (tiling.windows(size, factor, scale, codec.device) for scale in (1, factor))
    return [*zip(latent, pixels, strict=True)]


def _each(
    codec: Codec, pairs: Sequence[Pair], tiling: Tiling, doing: str, work: Callable[[Window, Window], T]
) -> Iterator[tuple[Pair, T]]:
    """What `work` makes of each tile of one picture, with the norms of the whole."""
    norms = WholeNorms(codec)
    surveys = tiling.surveys if norms.norms and len(pairs) > 1 else 0
    total = len(pairs) * (surveys + 1)
    for survey in range(surveys):
        with norms.measuring():
            for number, pair in enumerate(pairs, 1):
                norms.weights = pair[0].weights
                work(*pair)
                tiling.report(doing, survey * len(pairs) + number, total)
    with norms.applied():
        for number, pair in enumerate(pairs, 1):
            yield pair, work(*pair)
            tiling.report(doing, surveys * len(pairs) + number, total)
