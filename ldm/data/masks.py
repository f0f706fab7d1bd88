"""The hole of an inpainting task, drawn anew each time a picture is seen."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.chances import Choice
from ldm.data.mask_kinds import Bounds, Boxes, MaskKind, Strokes
from ldm.errors import ConfigError
from ldm.ranges import Fraction, NotNegative


class Masks:
    """A mixture of kinds of masks; the column `mask`, (1,H,W) uint8: 255 in the hole, 0 where the picture stays.

    A mask never has an empty hole. One whose share of hole is out of bounds is drawn again, of the same kind, so that
    the weights are those of the masks that are seen. At 256 pixels a mask takes 0.4 ms (strokes),
    0.9 ms (narrow strokes) or under 0.2 ms (others), at 1024 pixels 0.8, 1.4 and 0.3 ms (medians of processor
    time, one core).

    Args:
        kinds: objects of `ldm/data/mask_kinds.py` and `ldm/data/given_masks.py`; None: LaMa's wide masks (Suvorov et
            al. 2022), strokes and boxes 10 to 3.
        weights: of each kind; None: all alike.
        least: share of the picture that is hole, at least.
        most: at most; 1 allows masks that are all hole. The default is LaMa's.
        like: the column whose last two sizes are the picture's.

    Raises:
        ConfigError: no kinds; weights that are not one for each, or all 0; `least` above `most`; a kind hardly any of
            whose masks lie within the bounds.
    """

    def __init__(
        self,
        kinds: Sequence[MaskKind] | None = None,
        weights: Sequence[NotNegative] | None = None,
        least: Fraction = 0.0,
        most: Fraction = 0.5,
        like: str = "image",
    ) -> None:
        if kinds is None and weights is None:
            kinds, weights = (Strokes(), Boxes()), (1.0, 0.3)
        if not kinds:
            raise ConfigError("Masks.kinds: expected at least one, found none: name kinds, and their weights if any")
        if not least <= most or most <= 0:
            raise ConfigError(f"Masks: expected 0 <= least <= most and most above 0, found {least} and {most}")
        self.kinds = list(kinds)
        self.bounds = Bounds(least, most)
        self.like = like
        self._choice = Choice(len(self.kinds), weights, "Masks.weights")
        for kind in self.kinds:
            kind.check(self.bounds)

    @property
    def reads(self) -> Sequence[str]:
        return list(dict.fromkeys([self.like, *(key for kind in self.kinds for key in kind.reads)]))

    def describe(self) -> dict[str, Any]:
        return {
            "target": f"{__name__}.{type(self).__name__}",
            "kinds": [kind.describe() for kind in self.kinds],
            "shares": self._choice.shares,
            "least": self.bounds.least,
            "most": self.bounds.most,
        }

    def columns(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        like = rows[self.like]
        return {"mask": torch.empty(len(like), 1, *like.shape[-2:], dtype=torch.uint8, device="meta")}

    def draw(self, row: Mapping[str, Tensor], random: np.random.Generator) -> Tensor:
        height, width = row[self.like].shape[-2:]
        kind = self.kinds[self._choice.draw(random)]
        return torch.from_numpy(kind.draw_within(row, (height, width), random, self.bounds))[None]
