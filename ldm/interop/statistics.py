"""A file that says how latents are scaled: their mean and standard deviation per channel."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import ConfigError
from ldm.interop import sources


def read(path: Path, channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of a `.pt` or `.safetensors` with the tensors `mean` and `std`, or a `.json`.

    Args:
        path: LightningDiT's `latents_stats.pt` holds tensors (1, C, 1, 1); a JSON {"mean": [...], "std": [...]}.
        channels: C, of the latents.

    Raises:
        ConfigError: it is not such a file, or has another number of channels.
        CheckpointError: it cannot be read.
    """
    found = _json(path) if path.suffix == ".json" else dict(sources.read(path).tensors)
    if not {"mean", "std"} <= found.keys():
        names = ", ".join(sorted(found)[:8]) or "nothing"
        raise ConfigError(f"{path}: expected `mean` and `std` of the latents, one number a channel; found {names}")
    mean, std = (found[name].flatten().tolist() for name in ("mean", "std"))
    check(mean, std, channels, str(path))
    return mean, std


def check(mean: Sequence[float], std: Sequence[float], channels: int, origin: str) -> None:
    """ConfigError unless these can be the mean and the deviation of latents of so many channels."""
    if len(mean) != channels or len(std) != channels:
        raise ConfigError(
            f"{origin}: expected {channels} channels, as the model's latents have; found {len(mean)} means and "
            f"{len(std)} deviations. These are the statistics of another autoencoder."
        )
    if not torch.tensor([*mean, *std]).isfinite().all() or min(std) <= 0:
        raise ConfigError(f"{origin}: expected finite means and deviations above 0; found {[*mean]} and {[*std]}")


def _json(path: Path) -> dict[str, Tensor]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return {name: torch.tensor(tree[name], dtype=torch.float64) for name in ("mean", "std") if name in tree}
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read as the latents' statistics: {error}") from error
