"""Captions as conditions, read by a small transformer that is trained with the denoiser.

The text encoder of latent diffusion's own models (Rombach et al. 2022, section 4.3.1; `BERTEmbedder` in
CompVis/latent-diffusion): token_transformer.py. Its words are those of a tokenizer, a file that every checkpoint
carries.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.conditioners.token_transformer import TokenTransformer
from ldm.diffusion.conditioners.tokenizer import Tokenizer, read
from ldm.errors import ConfigError
from ldm.ranges import Count

log = logging.getLogger(__name__)

EXTRA_STATE = "_extra_state"
"""The key under which torch puts a module's extra state."""


class TextTransformer(TokenTransformer):
    """The caption as tokens (N, `max_length`, `channels`), masked where it is padded; null: of the text "".

    The tokenizer is a part of the model's state, so that a checkpoint needs no other file to read captions. A new
    model has that of the file; whatever lies there later, weights are read with the one that they were trained with.

    Args:
        tokenizer: `tokenizer.json`, a BERT's `vocab.txt`, or a folder with one of them; `ldm tokenizer` makes one of a
            data set's captions.
        channels: width of the tokens, which is the network's `context_dim`.
        depth: layers.
        vocab_size: rows of the table of words, as many as the tokenizer has tokens, or more.
        max_length: tokens of a caption, those at its ends included; the rest is cut off.
        num_heads: of attention.
        num_head_channels: of each of them, whatever the width.
        attend_padding: padding is read like any other token, by this transformer and the network, and there is no
            mask, as in the published models.

    Raises:
        ConfigError: the tokenizer cannot be read, or has more tokens than there are rows.
    """

    keys: Sequence[str] = ("caption",)

    def __init__(
        self,
        tokenizer: str | Path,
        channels: Count,
        depth: Count,
        vocab_size: Count,
        max_length: Count = 77,
        num_heads: Count = 8,
        num_head_channels: Count = 64,
        attend_padding: bool = False,
    ) -> None:
        super().__init__(vocab_size, max_length, channels, depth, num_heads, num_head_channels)
        self.path = str(tokenizer)
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.attend_padding = attend_padding
        self._tokenizer = read(Path(tokenizer), max_length)
        if self._tokenizer is not None:
            self._check(self._tokenizer, self.path)
        self._cut = 0
        self.register_load_state_dict_pre_hook(_may_lack_tokenizer)

    def forward(self, batch: Mapping[str, Any]) -> Conditioning:
        if "caption" not in batch:
            raise ConfigError(
                "TextTransformer: the data set has no captions: write each picture's into a .txt of its name, or use "
                "another conditioner"
            )
        return self._conditioning(batch["caption"])

    def null(self, n: int) -> Conditioning:
        one = self._conditioning([""])
        assert one.tokens is not None
        mask = None if one.token_mask is None else one.token_mask.expand(n, -1)
        return Conditioning(tokens=one.tokens.expand(n, -1, -1), token_mask=mask)

    def files(self) -> Mapping[str, bytes]:
        """The tokenizer's file, for the run folder."""
        return {self.tokenizer.file_name: self.tokenizer.content}

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ConfigError if neither a file nor a checkpoint has said it."""
        if self._tokenizer is None:
            raise ConfigError(
                f"TextTransformer: tokenizer: {self.path}: no such file. Make one of the captions: ldm tokenizer "
                f"--base CONFIG --vocab {self.vocab_size} --out {self.path}; or name a tokenizer.json or a vocab.txt"
            )
        return self._tokenizer

    def get_extra_state(self) -> Tensor:
        """The content of the tokenizer's file, (bytes,) uint8; none of it on the meta device."""
        if self._device.type == "meta" or self._tokenizer is None:
            return torch.empty(0, dtype=torch.uint8, device=self._device.type if self._device.type == "meta" else "cpu")
        return torch.frombuffer(bytearray(self._tokenizer.content), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        """The tokenizer of a checkpoint, in place of the file's; None: it has none, as weights of others.

        Raises:
            ConfigError: it has more tokens than there are rows.
        """
        if state is None or state.is_meta or not state.numel() or self._device.type == "meta":
            return
        found = Tokenizer(state.cpu().numpy().tobytes(), self.max_length, "the tokenizer of the checkpoint")
        if self._tokenizer is not None and found.digest != self._tokenizer.digest:
            log.warning(
                "%s: not the tokenizer that this model was trained with, and not used: sha256 %s, expected %s; "
                "captions are read with the one in the checkpoint",
                *(self.path, self._tokenizer.digest, found.digest),
            )
        self._check(found, "the tokenizer of the checkpoint")
        self._tokenizer = found

    @property
    def _device(self) -> torch.device:
        return self.words.weight.device

    def _check(self, tokenizer: Tokenizer, where: str) -> None:
        if tokenizer.size > self.vocab_size:
            raise ConfigError(
                f"TextTransformer: vocab_size: {where} has {tokenizer.size} tokens, gaps in their numbers included, "
                f"found {self.vocab_size}; write {tokenizer.size}"
            )
        if self.attend_padding and tokenizer.padding is None:
            raise ConfigError(f"TextTransformer: attend_padding: {where} has no token for padding; leave it out")

    def _conditioning(self, captions: Sequence[str]) -> Conditioning:
        words, mask = self._read(captions)
        seen = None if self.attend_padding else mask
        h = self.encoded(words, seen)  # (N, L, D)
        if seen is None:
            return Conditioning(tokens=h)
        return Conditioning(tokens=h * seen[..., None], token_mask=seen)

    def _read(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Words (N, L) int64, and where there are any (N, L) bool."""
        shape = len(captions), self.max_length
        if self._device.type == "meta":
            words = torch.empty(shape, dtype=torch.int64, device="meta")
            return words, torch.empty_like(words, dtype=torch.bool)
        padding = self.tokenizer.padding or 0
        words, mask = torch.full(shape, padding, device="cpu"), torch.zeros(shape, dtype=torch.bool, device="cpu")
        for row, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise ConfigError(f"caption: expected a text, found {caption!r}")
            found, whole = self.tokenizer.encode(caption)
            found = found or [padding]  # a text of no tokens: each row has one
            words[row, : len(found)], mask[row, : len(found)] = torch.tensor(found), True
            if whole > len(found):
                self._count_cut(caption, whole)
        return words.to(self._device), mask.to(self._device)

    def _count_cut(self, caption: str, whole: int) -> None:
        """A warning at the 1st, 10th, 100th ... caption that is too long."""
        self._cut += 1
        if str(self._cut).strip("0") == "1":
            log.warning(
                "captions cut to max_length %d so far: %d, the last one of %d tokens: %r",
                *(self.max_length, self._cut, whole, f"{caption[:40]}..."),
            )


def _may_lack_tokenizer(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Weights of others come without: then the file's is taken."""
    state_dict.setdefault(f"{prefix}{EXTRA_STATE}", None)
