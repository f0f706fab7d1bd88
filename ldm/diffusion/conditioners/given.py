"""Conditions that come ready-made: tensors of the batch, put into the slots as they are.

For encoders that are not part of ldm, whose output was computed elsewhere: text embeddings, layouts, retrieved
neighbors, masks. To sample, the same tensors are a condition: generate(seeds, [{"tokens": tensor}]).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.conditioners.base import Conditioning
from ldm.errors import ConfigError
from ldm.ranges import Count


class Field:
    """One tensor of the batch: batch[key], (N, *shape).

    Args:
        key: in the batch and in a condition.
        shape: of a row; None where any size is accepted.
        origin: where it comes from, for messages.
    """

    def __init__(self, key: str, shape: Sequence[Count | None], origin: str = "it is made elsewhere") -> None:
        self.key = key
        self.shape = tuple(shape)
        self.origin = origin

    def read(self, batch: Mapping[str, Any], like: Tensor) -> Tensor:
        """(N, *shape), on the device of `like` and of its type; errors of `find`."""
        return self.find(batch).to(like)

    def find(self, batch: Mapping[str, Any]) -> Tensor:
        """(N, *shape) as it is in the batch.

        Raises:
            ConfigError: it is missing or of another shape.
        """
        found = batch.get(self.key)
        shape = tuple(found.shape[1:]) if isinstance(found, Tensor) else None
        fits = shape is not None and len(shape) == len(self.shape)
        if not fits or any(side not in (None, there) for side, there in zip(self.shape, shape or (), strict=True)):
            expected = ", ".join("any" if side is None else str(side) for side in self.shape)
            there_is = "none" if found is None else shape or type(found).__name__
            raise ConfigError(
                f"condition {self.key}: expected a tensor ({expected}) for each row, found {there_is}; "
                f"{self.origin} and handed in with the batch, or as {{'{self.key}': tensor}} to sample"
            )
        assert isinstance(found, Tensor)
        return found

    def zeros(self, n: int, like: Tensor) -> Tensor:
        return like.new_zeros(n, *(side or 1 for side in self.shape))


class Given(nn.Module):
    """Fills the slots with tensors of the batch. It has no weights.

    The null conditioning is zeros, of size 1 where any size is accepted. A model whose own null is another one must not
    be guided with it: its `label_dropout` is 0, and guidance is refused.

    Args:
        vector: (channels,); None: the slot is not used, as for the others.
        tokens: (L, channels).
        spatial: (channels, height, width), of the latent's height and width.
        token_mask: (L,), as many as of `tokens`; 0 is padding, all else a token. None: all are tokens.

    Raises:
        ConfigError: no slot, or a shape of another number of sides, or a mask of no tokens.
    """

    def __init__(
        self,
        vector: Field | None = None,
        tokens: Field | None = None,
        spatial: Field | None = None,
        token_mask: Field | None = None,
    ) -> None:
        super().__init__()
        slots = {"vector": (vector, 1), "tokens": (tokens, 2), "spatial": (spatial, 3), "token_mask": (token_mask, 1)}
        self.fields = {slot: field for slot, (field, _) in slots.items() if field is not None}
        if not self.fields:
            raise ConfigError(
                "Given: expected one or more of vector, tokens and spatial, found none; use Unconditional"
            )
        for slot, (field, sides) in slots.items():
            if field is not None and len(field.shape) != sides:
                raise ConfigError(f"Given: {slot}: expected a shape of {sides} sides, found {[*field.shape]}")
        if token_mask is not None and (tokens is None or token_mask.shape != tokens.shape[:1]):
            there_is = "none" if tokens is None else [*tokens.shape]
            raise ConfigError(f"Given: token_mask: {[*token_mask.shape]} is no mask of the tokens, {there_is}")
        self.register_buffer("_place", torch.zeros(()), persistent=False)

    @property
    def keys(self) -> Sequence[str]:
        return tuple(field.key for field in self.fields.values())

    def forward(self, batch: Mapping[str, Any]) -> Conditioning:
        found = {slot: field.read(batch, self._like) for slot, field in self.fields.items()}
        return Conditioning(**{slot: one != 0 if slot == "token_mask" else one for slot, one in found.items()})

    def null(self, n: int) -> Conditioning:
        zeros = {slot: field.zeros(n, self._like) for slot, field in self.fields.items()}
        return Conditioning(**{slot: one == 0 if slot == "token_mask" else one for slot, one in zeros.items()})

    @property
    def _like(self) -> Tensor:
        return self.get_buffer("_place")
