"""The transformer over tokens in latent diffusion's own models (`BERTEmbedder`), of texts or layouts, as ours.

It was trained with the model. That of texts reads the words of bert-base-uncased, whose list no file of this kind
holds. It is the tokenizer of many other models as well, such as the sentence encoder MiniLM that `ldm weights` brings.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.conditioners import tokenizer
from ldm.diffusion.conditioners.text_transformer import EXTRA_STATE
from ldm.errors import CheckpointError, ConfigError
from ldm.interop.models import RUN, node, shapes
from ldm.interop.tables import Change, Entry, layer, under
from ldm.weights import cache

VOCABULARY = 30522
"""Words of bert-base-uncased."""
UNUSED = "transformer.to_logits.*"
"""The prediction of words, which nothing reads."""
_CACHED = "all-minilm-l6-v2"
_HEAD = 64
_QKV = Change(lambda parts: torch.cat([*parts]), lambda whole: whole.chunk(3))
_LAYER = re.compile(r"transformer\.attn_layers\.layers\.(\d+)\.1\.to_q\.weight")


@dataclass(frozen=True)
class Found:
    """Of a file.

    Attributes:
        sizes: parameters of ours.
        words: the tokenizer.
    """

    sizes: Mapping[str, Any]
    words: tokenizer.Tokenizer

    @property
    def node(self) -> dict[str, Any]:
        """Ours, whose tokenizer lies in the run folder."""
        params = {"tokenizer": f"{RUN}/{self.words.file_name}", **self.sizes, "attend_padding": True}
        return node("diffusion.conditioners.text_transformer.TextTransformer", **params)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the tensors that are in the table."""
        return {name: shape for name, shape in shapes(self.node).items() if name != EXTRA_STATE}

    @property
    def state(self) -> dict[str, Tensor]:
        """What the table does not list: the tokenizer."""
        return {EXTRA_STATE: torch.frombuffer(bytearray(self.words.content), dtype=torch.uint8)}


def reads_texts(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], named: Path | None) -> bool:
    """Whether a file's `cond_stage_model.`, without that prefix, is such a transformer, of texts.

    Args:
        settings: of its YAML. Layouts are read by the same transformer, as numbers that are made elsewhere.
        named: the tokenizer that is asked for; None: none is.
    """
    words = tensors.get("transformer.token_emb.weight")
    if words is None or not any(map(_LAYER.fullmatch, tensors)) or settings.get("use_tokenizer") is False:
        return False
    return named is not None or words.shape[0] == VOCABULARY


def found_in(tensors: Mapping[str, Tensor], named: Path | None, origin: str) -> Found:
    """The transformer of a file, with its tokenizer.

    Args:
        tensors: `cond_stage_model.`, without that prefix.
        named: the tokenizer's file, or a folder with it; None: that of the weights in ldm's cache.
        origin: the file, for messages.

    Raises:
        ConfigError: there is no tokenizer, or it has other words.
    """
    sizes, places = _sizes(tensors)
    if places is not None:
        sizes["max_length"] = places  # otherwise it is missing, as the table will say
    words = _words(named, sizes.get("max_length", 77), origin)
    if words.size != sizes["vocab_size"]:
        raise ConfigError(
            f"--text-encoder: {named or _CACHED}: not the tokenizer of {origin}: expected {sizes['vocab_size']} "
            f"tokens, found {words.size}"
        )
    return Found(sizes, words)


def layouts(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The node of our `LayoutTransformer`; None: it is no transformer, or does not read three tokens for each box.

    Args:
        tensors: `cond_stage_model.` of a model of layouts, without that prefix.
    """
    if "transformer.token_emb.weight" not in tensors or not any(map(_LAYER.fullmatch, tensors)):
        return None
    sizes, places = _sizes(tensors)
    if places is None or places < 3 or places % 3 == 1:
        return None
    sizes |= {"most": places // 3, "crop": places % 3 == 2}
    return node("diffusion.conditioners.layout_transformer.LayoutTransformer", **sizes)


def _sizes(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], int | None]:
    """Parameters of ours, and how many tokens it reads; None: nothing says."""
    layers = [found for name in tensors if (found := _LAYER.fullmatch(name))]
    numbers, width = tensors["transformer.token_emb.weight"].shape
    inner = tensors[layers[0].string].shape[0]
    heads = {"num_heads": max(1, inner // _HEAD), "num_head_channels": min(inner, _HEAD)}
    places = tensors.get("transformer.pos_emb.emb.weight")
    sizes = {"channels": width, "depth": len(layers), "vocab_size": numbers, **heads}
    return sizes, None if places is None else places.shape[0]


def table(depth: int) -> list[Entry]:
    """Ours -> theirs, without `cond_stage_model.`."""
    entries = [
        Entry("words.weight", ("transformer.token_emb.weight",)),
        Entry("places", ("transformer.pos_emb.emb.weight",)),
        *layer("norm", "transformer.norm"),
    ]
    for number in range(depth):
        attend, feed = (f"transformer.attn_layers.layers.{2 * number + part}." for part in (0, 1))
        block = [
            *layer("norm_attend", f"{attend}0"),
            Entry("qkv.weight", tuple(f"{attend}1.to_{part}.weight" for part in "qkv"), _QKV),
            *layer("out", f"{attend}1.to_out"),
            *layer("norm_feed", f"{feed}0"),
            *layer("fc1", f"{feed}1.net.0.0"),
            *layer("fc2", f"{feed}1.net.2"),
        ]
        entries += under(block, f"layers.{number}.")
    return entries


def _words(named: Path | None, max_length: int, origin: str) -> tokenizer.Tokenizer:
    asked = "--text-encoder PATH: its vocab.txt or tokenizer.json, or a folder with one"
    if named is None:
        try:
            named = cache.find(_CACHED).parent
        except CheckpointError as error:
            raise ConfigError(
                f"{origin}: reads texts in the words of bert-base-uncased, which are in no file of this kind. Name "
                f"them with {asked}; or get a model that has the same:\n{error}"
            ) from error
    for place in (named / "tokenizer", named):
        if (found := tokenizer.read(place, max_length)) is not None:
            return found
    raise ConfigError(f"--text-encoder: {named}: no tokenizer in it. Expected {asked}")
