"""Numbers as conditions: the size of a picture as it was stored, where it was cropped, an aesthetic score."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.conditioners.base import Conditioning
from ldm.errors import ConfigError
from ldm.layers import timestep_embedding
from ldm.ranges import Count


class Numbers(nn.Module):
    """Numbers as a vector: waves of each, side by side, as SDXL reads sizes (Podell et al. 2023, section 2.2).

    Such as original_size (height and width of the stored picture, pixels), crop_top_left (where the crop begins in the
    resized picture) and target_size (of the crop), which `data.params.numbers` puts into batches. Training on them
    keeps small and badly cropped pictures from being the model's idea of a picture; samples ask for good ones.

    The null is zeros in place of the waves, which no number has: there a cosine and a sine are never 0 together. It has
    no weights; to bring it to another width, as SDXL's two layers do, is up to the network's `vector_channels` or to
    Projected.

    Args:
        counts: by key of a batch, how many numbers it holds for each row: {original_size: 2, aesthetic_score: 1}.
        channels: width of the waves of a number; the vector is that many times the sum of `counts` wide.

    Raises:
        ConfigError: no numbers, or a batch without them.
    """

    def __init__(self, counts: Mapping[str, Count], channels: Count = 256) -> None:
        super().__init__()
        if not counts:
            raise ConfigError("Numbers: counts: expected one key or more, such as {original_size: 2}; found none")
        self.counts = dict(counts)
        self.channels = channels
        self.register_buffer("_place", torch.zeros(()), persistent=False)  # where the model is

    @property
    def keys(self) -> Sequence[str]:
        return tuple(self.counts)

    def forward(self, batch: Mapping[str, Any]) -> Conditioning:
        numbers = torch.cat([self._read(key, batch) for key in self.counts], dim=1)  # (N, sum of counts)
        waves = timestep_embedding(numbers.flatten(), self.channels)  # (N sum of counts, channels)
        return Conditioning(vector=waves.reshape(len(numbers), -1))  # (N, sum of counts x channels)

    def null(self, n: int) -> Conditioning:
        return Conditioning(vector=self.get_buffer("_place").new_zeros(n, sum(self.counts.values()) * self.channels))

    def _read(self, key: str, batch: Mapping[str, Any]) -> Tensor:
        """(N, count) float32 from (N, count), or (N,) of one."""
        found, count = batch.get(key), self.counts[key]
        if found is None:
            raise ConfigError(f"Numbers: a batch has no {key}: name it in data.params.numbers, or not in counts")
        numbers = torch.as_tensor(found, device=self.get_buffer("_place").device).float()
        numbers = numbers[:, None] if numbers.ndim == 1 else numbers
        if numbers.ndim != 2 or numbers.shape[1] != count:
            raise ConfigError(f"Numbers: {key}: expected {count} for each row, found {[*numbers.shape[1:]]}")
        return numbers
