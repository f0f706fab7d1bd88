"""Class labels as conditions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.conditioners.base import Conditioning
from ldm.ranges import Count, NotNegative


class _ClassTable(nn.Module):
    """One learned row per class, and a last one for "no class".

    Args:
        num_classes: labels are 0 .. num_classes - 1; None: the data has none, and "no class" is used for every row.
        channels: width of a row.
        std: standard deviation of the rows' normal initialization.
    """

    def __init__(self, num_classes: Count | None, channels: Count, std: NotNegative = 1.0) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding((num_classes or 0) + 1, channels)
        with torch.no_grad():
            self.table.weight.mul_(std)

    @property
    def keys(self) -> Sequence[str]:
        return () if self.num_classes is None else ("class_label",)

    def rows(self, batch: Mapping[str, Any]) -> Tensor:
        """(N, D) from batch["class_label"], (N,) integers in [0, num_classes)."""
        return self.null_rows(len(batch["draws"])) if self.num_classes is None else self.table(batch["class_label"])

    def null_rows(self, n: int) -> Tensor:
        return self.table(torch.full((n,), self.num_classes or 0, device=self.table.weight.device))


class ClassVector(_ClassTable):
    """The class as a vector (N, `channels`), as in ADM (Dhariwal and Nichol 2021) and DiT."""

    def forward(self, batch: Mapping[str, Any]) -> Conditioning:
        return Conditioning(vector=self.rows(batch))

    def null(self, n: int) -> Conditioning:
        return Conditioning(vector=self.null_rows(n))


class ClassOneHot(nn.Module):
    """The class as a one-hot vector (N, num_classes) times sqrt(num_classes), so that its mean square is 1.

    "No class" is all zeros. For networks that have their own class embedding (EDM2).

    Args:
        num_classes: labels are 0 .. num_classes - 1; None: the data has none, and no slot is filled.
    """

    def __init__(self, num_classes: Count | None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.register_buffer("rows", math.sqrt(num_classes or 0) * torch.eye(num_classes or 0), persistent=False)

    @property
    def keys(self) -> Sequence[str]:
        return () if self.num_classes is None else ("class_label",)

    def forward(self, batch: Mapping[str, Any]) -> Conditioning:
        if self.num_classes is None:
            return Conditioning()
        return Conditioning(vector=self.get_buffer("rows")[batch["class_label"]])

    def null(self, n: int) -> Conditioning:
        if self.num_classes is None:
            return Conditioning()
        return Conditioning(vector=self.get_buffer("rows").new_zeros(n, self.num_classes))


class ClassToken(_ClassTable):
    """The class as one token (N, 1, `channels`) for cross-attention, as in LDM's class-conditional models."""

    def forward(self, batch: Mapping[str, Any]) -> Conditioning:
        return Conditioning(tokens=self.rows(batch)[:, None])

    def null(self, n: int) -> Conditioning:
        return Conditioning(tokens=self.null_rows(n)[:, None])
