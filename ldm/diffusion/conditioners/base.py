"""What a denoiser is conditioned on besides the noisy latent, and where it comes from.

Every conditional model fills some of three slots: a vector (added to the noise-level embedding), tokens (read by
cross-attention) and an image (concatenated to the latent). A conditioner maps a batch to the slots and defines the
null conditioning, which training uses for label dropout and sampling for guidance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import ConfigError
from ldm.sizes import Size, spell


@dataclass(frozen=True)
class Conditioning:
    """The slots; None if a slot is not used.

    Attributes:
        vector: (N, D).
        tokens: (N, L, D).
        spatial: (N, C, H, W), with the latent's height and width; sides of 1 stand for any.
        token_mask: (N, L) bool, true for tokens, false for padding, which nothing may depend on; each row has a token.
            None: all are tokens.

    Raises:
        ValueError: the mask is not one of these tokens.
    """

    vector: Tensor | None = None
    tokens: Tensor | None = None
    spatial: Tensor | None = None
    token_mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.token_mask is None:
            return
        tokens, found = None if self.tokens is None else self.tokens.shape[:2], self.token_mask
        if found.shape != tokens or found.dtype != torch.bool:
            raise ValueError(f"token_mask: expected bool {tokens} as the tokens, found {found.dtype} {found.shape}")

    def where(self, mask: Tensor, other: "Conditioning") -> "Conditioning":
        """The rows of self where `mask` (N,) is true, those of `other` elsewhere (as torch.Tensor.where)."""

        def choose(ours: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(mask.reshape(-1, *[1] * (ours.ndim - 1)), ours, theirs)

        return self._join(other, choose)

    def cat(self, other: "Conditioning") -> "Conditioning":
        """The rows of self, then those of `other`, whose sides of 1 are repeated, as a null's may be."""
        return self._join(other, lambda ours, theirs: torch.cat([ours, theirs.expand(len(theirs), *ours.shape[1:])]))

    def masked(self) -> Tensor:
        """`token_mask`, all true where it is None; of filled `tokens` only."""
        assert self.tokens is not None
        return (
            self.tokens.new_ones(self.tokens.shape[:2], dtype=torch.bool)
            if self.token_mask is None
            else self.token_mask
        )

    def clean_tokens(self) -> Tensor | None:
        """`tokens` with zeros in place of padding, whatever values, even NaN, are there: (N, L, D) or None."""
        if self.tokens is None or self.token_mask is None:
            return self.tokens
        return self.tokens.masked_fill(~self.token_mask[..., None], 0)

    def beside(self, x: Tensor) -> Tensor:
        """`x` (N, c, H, W) with `spatial`, if there is one, as further channels: (N, c + C, H, W).

        Raises:
            ConfigError: the image has another height or width.
        """
        if self.spatial is None:
            return x
        (height, width), (rows, columns) = self.spatial.shape[2:], x.shape[2:]
        if height not in (1, rows) or width not in (1, columns):
            raise ConfigError(
                f"the conditioner's spatial slot is {spell((height, width))}, expected {spell((rows, columns))}, the "
                "latent's height and width"
            )
        return torch.cat([x, self.spatial.expand(-1, -1, rows, columns).to(x.dtype)], dim=1)

    def padded(self, length: int) -> "Conditioning":
        """With masked tokens, zeros at the end, up to `length` of them; itself if there are as many or no tokens."""
        if self.tokens is None or self.tokens.shape[1] >= length:
            return self
        missing = length - self.tokens.shape[1]
        tokens, mask = F.pad(self.tokens, (0, 0, 0, missing)), F.pad(self.masked(), (0, missing))
        return replace(self, tokens=tokens, token_mask=mask)

    def _join(self, other: "Conditioning", join: Any) -> "Conditioning":
        ours, theirs = self, other
        if ours.tokens is not None and theirs.tokens is not None:
            masked = ours.token_mask is not None or theirs.token_mask is not None
            if masked:
                longest = max(ours.tokens.shape[1], theirs.tokens.shape[1])
                ours, theirs = (side.padded(longest) for side in (ours, theirs))
                ours, theirs = (replace(side, token_mask=side.masked()) for side in (ours, theirs))
        slots = {}
        for slot in (field.name for field in fields(self)):
            mine, its = getattr(ours, slot), getattr(theirs, slot)
            if (mine is None) != (its is None):
                raise ValueError(f"conditioning slot '{slot}' is filled on one side only")
            slots[slot] = None if mine is None else join(mine, its)
        return Conditioning(**slots)


@runtime_checkable
class Conditioner(Protocol):
    """A module that reads its own keys of a batch."""

    @property
    def keys(self) -> Sequence[str]:
        """The keys that it reads, which are also those of a condition to sample with; none: it is unconditional."""
        ...

    def __call__(self, batch: Mapping[str, Any]) -> Conditioning:
        """The conditioning of every row of the batch."""
        ...

    def null(self, n: int) -> Conditioning:
        """The null conditioning of `n` rows, in the shapes of `__call__`.

        Not a view of a parameter: if parameters are sharded, their memory is freed after this call.
        """
        ...


@runtime_checkable
class Keeping(Protocol):
    """Optional: a conditioner of which some stays where the rest is dropped, as the picture of inpainting by text."""

    def kept_keys(self) -> Sequence[str]:
        """The keys that are never dropped; none: `dropped` is `null`."""
        ...

    def dropped(self, batch: Mapping[str, Any], n: int) -> Conditioning:
        """`null(n)`, in which what is kept is that of the batch's `n` rows; no view of a parameter either."""
        ...


def kept_keys(conditioner: Conditioner) -> Sequence[str]:
    """The keys that are never dropped."""
    return conditioner.kept_keys() if isinstance(conditioner, Keeping) else ()


def dropped(conditioner: Conditioner, batch: Mapping[str, Any], n: int) -> Conditioning:
    """What label dropout puts in place of the conditioning of a batch of `n` rows, and what guidance leads away from.

    The null conditioning, but for what the conditioner keeps.
    """
    return conditioner.dropped(batch, n) if isinstance(conditioner, Keeping) else conditioner.null(n)


@runtime_checkable
class Defaulting(Protocol):
    """Optional: a conditioner that reads more keys of a condition, if they are there."""

    def defaults(self) -> Mapping[str, float]:
        """By key, beside `keys`, what holds of a sample whose condition does not say it."""
        ...


def defaults(conditioner: Conditioner) -> Mapping[str, float]:
    """By key that a condition may leave out, what holds then."""
    return conditioner.defaults() if isinstance(conditioner, Defaulting) else {}


def latent_size(batch: Mapping[str, Any]) -> Size:
    """Height and width of the batch's `latent`, which a conditioning image is to have.

    In training it is what is learned; to sample, a tensor of that shape without values.

    Raises:
        ConfigError: there is none.
    """
    found = batch.get("latent")
    if not isinstance(found, Tensor) or found.ndim != 4:
        there = "none" if found is None else tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(
            f"a batch's latent: expected (N, c, h, w), whose height and width a map of conditions has, found {there}; "
            "without one, hand in torch.empty(N, c, h, w, device='meta')"
        )
    return found.shape[2], found.shape[3]


@runtime_checkable
class Filed(Protocol):
    """Optional: a conditioner that reads files, which a run folder keeps."""

    def files(self) -> Mapping[str, bytes]:
        """{name: content}. Raises ConfigError if one is missing."""
        ...


@runtime_checkable
class Dropping(Protocol):
    """Optional: a conditioner that drops conditions on its own, or one around such a conditioner."""

    def drops_all(self) -> bool:
        """Whether it happens in training that all of a row's conditions are dropped."""
        ...


def drops_all(conditioner: object) -> bool:
    """Whether a conditioner says of itself that all of a row's conditions are dropped at times."""
    return isinstance(conditioner, Dropping) and conditioner.drops_all()


def require_conditioner(found: object, key: str = "model.params.conditioner") -> None:
    """ConfigError, naming the `key` of the configuration, unless `found` is a conditioner."""
    if not isinstance(found, Conditioner):
        raise ConfigError(
            f"{key}: expected a module with keys, forward and null (ldm/diffusion/conditioners/base.py), found "
            f"{type(found).__name__}"
        )


class Unconditional(nn.Module):
    """Fills no slot."""

    keys: Sequence[str] = ()

    def forward(self, batch: Mapping[str, Any]) -> Conditioning:
        return Conditioning()

    def null(self, n: int) -> Conditioning:
        return Conditioning()
