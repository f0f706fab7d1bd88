"""The text encoders inside Stable Diffusion's files, as folders of transformers that `FrozenText` reads.

Stable Diffusion 1 holds CLIP ViT-L/14 in the names of transformers; Stable Diffusion 2 holds OpenCLIP ViT-H/14 in
OpenCLIP's own, of which it reads the output of the last layer but one. No file holds a tokenizer.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.errors import CheckpointError, ConfigError
from ldm.interop.tables import Change, Dropped, Entry, Table, layer, to_theirs, under

CLIP = "transformer.text_model."
OPEN_CLIP = "model.transformer.resblocks."
TOKENIZER = (
    "expected CLIP's: vocab.json and merges.txt, or tokenizer.json, as in `tokenizer` of the model for diffusers"
)
_HEAD = 64
"""Channels of a head, in both."""
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_LAYERS = "text_model.encoder.layers"
_QKV = Change(lambda parts: torch.cat([*parts]), lambda whole: whole.chunk(3))


@dataclass(frozen=True)
class TextEncoder:
    """Of a file, ready to be written.

    Attributes:
        config: what transformers' config.json says.
        tensors: by transformers' names.
        pad: the tokenizer's token for the empty places of a text.
        dropped: {reason: number of tensors}.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    pad: str
    dropped: Mapping[str, int]

    @property
    def channels(self) -> int:
        return int(self.config["hidden_size"])

    @property
    def max_length(self) -> int:
        return int(self.config["max_position_embeddings"])

    def write(self, folder: Path, tokenizer: Path) -> None:
        """The encoder and the tokenizer out of another folder.

        Raises:
            ConfigError: transformers is not installed, or there is no tokenizer.
        """
        words = _tokenizer(tokenizer)
        if self.pad not in words.get_vocab() or len(words) != self.config["vocab_size"]:
            raise ConfigError(
                f"--text-encoder: {tokenizer}: not the tokenizer of this text encoder: expected "
                f"{self.config['vocab_size']} tokens with {self.pad!r} among them, found {len(words)}"
            )
        words.pad_token = self.pad
        words.model_max_length = self.max_length
        folder.mkdir()
        words.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        save_file(dict(self.tensors), folder / "model.safetensors", {"format": "pt"})


def found_in(tensors: Mapping[str, Tensor], origin: str, *, last_layer: bool = False) -> TextEncoder | None:
    """The text encoder among a file's `cond_stage_model.`, without that prefix; None: there is none that is known.

    Args:
        origin: the file, for messages.
        last_layer: of OpenCLIP: the model reads its last layer, too.

    Raises:
        CheckpointError: it lacks tensors, or has some that have no place in it.
    """
    if any(name.startswith(CLIP) for name in tensors):
        return _clip({name.removeprefix("transformer."): one for name, one in tensors.items()}, origin)
    if any(name.startswith(OPEN_CLIP) for name in tensors):
        return _open_clip({name.removeprefix("model."): one for name, one in tensors.items()}, origin, last_layer)
    return None


def _clip(tensors: Mapping[str, Tensor], origin: str) -> TextEncoder:
    layers = _count(tensors, f"{_LAYERS}.{{}}.layer_norm1.weight")
    table = [Entry(name, (name,)) for entry in _table(layers) for name in entry.theirs]
    dropped = (Dropped("text_model.embeddings.position_ids", "the places of words, which are counted"),)
    return _encoder(tensors, table, dropped, "quick_gelu", "<|endoftext|>", origin)


def _open_clip(tensors: Mapping[str, Tensor], origin: str, last_layer: bool) -> TextEncoder:
    layers = _count(tensors, "transformer.resblocks.{}.ln_1.weight") - (0 if last_layer else 1)
    dropped = (
        Dropped(f"transformer.resblocks.{layers}.*", "the text encoder's last layer, which the model does not read"),
        Dropped("text_projection", "CLIP's comparison of texts with pictures"),
        Dropped("logit_scale", "CLIP's comparison of texts with pictures"),
        Dropped("attn_mask", "the mask of later words, which is always the same"),
    )
    return _encoder(tensors, _table(layers), dropped, "gelu", "!", origin)


def _table(layers: int) -> list[Entry]:
    """OpenCLIP's names -> transformers'."""
    entries = [
        Entry("token_embedding.weight", ("text_model.embeddings.token_embedding.weight",)),
        Entry("positional_embedding", ("text_model.embeddings.position_embedding.weight",)),
        *layer("ln_final", "text_model.final_layer_norm"),
    ]
    for number in range(layers):
        block = [
            *layer("ln_1", "layer_norm1"),
            *layer("ln_2", "layer_norm2"),
            *layer("attn.out_proj", "self_attn.out_proj"),
            *layer("mlp.c_fc", "mlp.fc1"),
            *layer("mlp.c_proj", "mlp.fc2"),
        ]
        for kind in ("weight", "bias"):
            parts = tuple(f"self_attn.{part}_proj.{kind}" for part in "qkv")
            block.append(Entry(f"attn.in_proj_{kind}", parts, _QKV))
        entries += under(block, f"transformer.resblocks.{number}.", f"{_LAYERS}.{number}.")
    return entries


def _encoder(
    tensors: Mapping[str, Tensor], table: Table, dropped: Sequence[Dropped], act: str, pad: str, origin: str
) -> TextEncoder:
    """Of the tensors that the table lists; CheckpointError unless they and what is dropped are all."""
    listed = {entry.ours for entry in table}
    missing = sorted(listed - tensors.keys())
    reasons = {name: one.reason for name in tensors for one in dropped if one.covers(name)}
    left = sorted(tensors.keys() - listed - reasons.keys())
    if missing or left:
        raise CheckpointError(
            f"{origin}: its text encoder does not fit: {len(missing)} tensors missing ({', '.join(missing[:3])}), "
            f"{len(left)} in no place of it ({', '.join(left[:3])})"
        )
    weights = to_theirs(table, {name: tensors[name] for name in listed})
    words = weights["text_model.embeddings.token_embedding.weight"]
    layers = _count(weights, f"{_LAYERS}.{{}}.layer_norm1.weight")
    config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": words.shape[0],
        "hidden_size": words.shape[1],
        "intermediate_size": weights[f"{_LAYERS}.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, words.shape[1] // _HEAD),
        "max_position_embeddings": weights["text_model.embeddings.position_embedding.weight"].shape[0],
        "hidden_act": act,
        "layer_norm_eps": 1e-5,
        "torch_dtype": str(words.dtype).removeprefix("torch."),
    }
    return TextEncoder(config, weights, pad, dict(Counter(reasons.values())))


def _tokenizer(folder: Path) -> Any:
    """transformers' tokenizer in a folder, or in the `tokenizer` of a pipeline's."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"--text-encoder: needs the package {error.name}: pip install -e .[interop]") from error
    places = (folder / "tokenizer", folder)
    found = next((one for one in places if any((one / name).is_file() for name in _TOKENIZER_FILES)), None)
    if found is None:
        raise ConfigError(f"--text-encoder: {folder}: no tokenizer in it: {TOKENIZER}")
    try:
        described = (found / "tokenizer_config.json").is_file()
        kind = transformers.AutoTokenizer if described else transformers.CLIPTokenizer
        return kind.from_pretrained(found, local_files_only=True)
    except Exception as error:  # transformers and tokenizers have classes of their own
        text = " ".join(str(error).split())
        raise ConfigError(f"--text-encoder: {found}: cannot be read as a tokenizer: {text}") from error


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How many names fit the pattern, with numbers from 0 on in its braces."""
    number = 0
    while pattern.format(number) in tensors:
        number += 1
    return number
