"""How well an autoencoder reconstructs, picture by picture, and what its latents are like.

Everything is a row for each picture, in float32: the numbers of a data set are their means in float64, whatever the
batches and ranks were.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ldm.autoencoder.codec import Codec
from ldm.autoencoder.metrics import DEAD, EXACT, OF_SSIM, PSNR, SMALLEST_FOR_SSIM, SSIM, Output, Perceptual
from ldm.evaluation.feature_store import Column
from ldm.evaluation.pictures.base import digest
from ldm.evaluation.pictures.made import Reconstruction
from ldm.evaluation.values import Value
from ldm.ranges import Count
from ldm.runtime.full_precision import full_precision
from ldm.runtime.validation_metrics import Mean
from ldm.weights.digest import weight_hash

RECONSTRUCTION = ("fd", "sfd", "psnr", "ssim", "lpips", "latents")
"""Metrics of a stage-1 run, by their names on the command line."""


class Fidelity:
    """The measures of a reconstruction, as a column of a store.

    Args:
        codec: the autoencoder, whose latents are described.
        size: the smaller side of the pictures; SSIM is left out where its window does not fit.
        perceptual: LPIPS, by its name: distances of pictures in [-1, 1], (N, C, H, W) twice -> (N,).
    """

    def __init__(self, codec: Codec, size: Count, perceptual: dict[str, nn.Module]) -> None:
        self._measures = perceptual
        self.metrics: dict[str, Mean] = {"PSNR": PSNR()}
        if size >= SMALLEST_FOR_SSIM:
            self.metrics["SSIM"] = SSIM()
        self.metrics |= {name: Perceptual(distance).to(codec.device) for name, distance in perceptual.items()}
        self.channels = codec.latent_channels
        self.gaussian = not codec.deterministic

    @property
    def column(self) -> Column:
        measures = {name: weight_hash(metric.state_dict()) for name, metric in self._measures.items()}
        names = [*self.metrics, self.channels, self.gaussian, "squares of the means", "SSIM of 0 to 1"]
        decides = {"fidelity": [str(name) for name in names], "measures": measures}
        return Column(digest(decides), self.rows, "reconstructions")

    def rows(self, made: Reconstruction) -> Tensor:
        """(n, metrics + 4 c): the metrics; then of each channel E z, E z^2, the square of the mean, and the KL.

        The last four are means over the channel's elements.
        """
        # Nothing here reads the posterior or losses.
        output = Output(made.decoded, None, {})  # type: ignore[arg-type]
        batch = {"image": made.original}
        with full_precision(made.original.device.type):
            measured = [
                metric.values(batch, output).reshape(1, -1).clamp(max=EXACT) for metric in self.metrics.values()
            ]
        mean, variance = made.mean, made.std.square()  # (n, c, h, w)
        square = mean.square() + variance
        kl = 0.5 * (square - 1 - variance.log()) if self.gaussian else torch.zeros_like(mean)
        channels = [values.flatten(2).mean(2) for values in (mean, square, mean.square(), kl)]  # (n, c) each
        return torch.cat([torch.cat(measured).T, *channels], dim=1)

    def values(self, blocks: Sequence[np.ndarray] | np.ndarray) -> list[Value]:
        """The numbers of a data set, from all rows (N, metrics + 4 c)."""
        rows = np.asarray(blocks, dtype=np.float64)
        number, own = len(rows), len(self.metrics)
        better = {"PSNR": "higher", "SSIM": "higher"}
        found = [
            Value(
                name,
                float(rows[:, place].mean()),
                *_error(rows[:, place]),
                better=better.get(name, "lower"),
                settings=OF_SSIM if name == "SSIM" else {},
            )
            for place, name in enumerate(self.metrics)
        ]
        mean, square, of_means, kl = rows[:, own:].reshape(number, 4, self.channels).mean(0)
        std = np.sqrt(np.maximum(square - mean**2, 0))
        per_channel = {"mean": mean.tolist(), "std": std.tolist()}
        found.append(Value("latent std", float(std.mean()), better="", settings=per_channel))
        if self.gaussian:
            settings = {"nats an element, of each channel": kl.tolist()}
            found.append(Value("KL, nats an element", float(kl.mean()), better="", settings=settings))
            # As `val/dead_channels` in training.
            share = np.maximum(of_means - mean**2, 0) / np.maximum(std**2, np.finfo(float).tiny)
            settings = {"share of the means in the variance, of each channel": share.tolist(), "dead below": DEAD}
            found.append(Value("dead latent channels", float((share <= DEAD).mean()), settings=settings))
        return found


def _error(rows: np.ndarray) -> tuple[float, int]:
    """The standard error of the mean, and its degrees of freedom."""
    return float(rows.std(ddof=1) / np.sqrt(len(rows))), len(rows) - 1
