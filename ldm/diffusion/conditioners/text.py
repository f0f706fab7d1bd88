"""Captions as conditions, read by a trained text encoder of the package transformers that stays as it is.

The encoder is no part of the model: its weights are not trained, averaged, sharded or saved. A configuration names its
folder, or an encoder in the catalog of weights (`ldm weights`), and a checkpoint holds the hash of its weights, which
is compared whenever the checkpoint is loaded.

`TextEncoder` is the encoder as a feature, which a cache may keep; `FeatureText` is the conditioner that reads it.
`FrozenText` encodes every batch anew, with Stable Diffusion's padding.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Le
from torch import Tensor, nn

from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.conditioners.features import Part, columns, held, meta_columns
from ldm.diffusion.conditioners.frozen import as_state, may_lack_hash, require_same
from ldm.diffusion.conditioners.pooling import Pooling
from ldm.diffusion.conditioners.text_models import TextModel, check_sizes, opened
from ldm.errors import ConfigError, DataError
from ldm.ranges import Count

_WHAT = "text encoder"
_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_COMPUTE: dict[str, tuple[torch.dtype, ...]] = {"float32": (), "bfloat16": (torch.bfloat16,)}
"""What `opened` is called with besides the folder: as everybody calls it, so that all have the same one."""


@dataclass(frozen=True)
class TextEncoder:
    """A trained text encoder as a feature of captions: `tokens` of each, and a pooled `vector`.

    Each caption is encoded on its own, in true float32 unless `compute` says otherwise, and the encoder is in eval
    mode. A caption with more tokens than `max_length` is cut by the encoder's own tokenizer.

    Args:
        encoder: folder with `config.json`, weights and tokenizer of a CLIP, T5, BERT-like or decoder model such as
            Gemma; or the name of one in the catalog of weights, such as `all-minilm-l6-v2`. Where it is the
            `text_encoder` of a pipeline of diffusers, the tokenizer may lie in `tokenizer` beside it. Nothing is
            downloaded.
        channels: width of the encoder's tokens, which is the network's `context_dim`.
        max_length: tokens of a caption, at most.
        layer: -1: the encoder's output; -2: the hidden states before its last layer ("clip skip"), and so on.
        final_norm: of an earlier layer: its hidden states pass through the encoder's last norm, as in Stable Diffusion
            2 and OpenCLIP; False: as they are, as in SDXL.
        padding: True: each caption is padded to `max_length`, and padding is a token like any other, as in Stable
            Diffusion; False: a caption's own tokens alone, of any number, which a mask tells from others.
        tokens: whether there are tokens; False: the vector alone.
        pooling: what makes the vector (ldm/diffusion/conditioners/pooling.py); None: there is none.
        prefix: text before each caption, where an encoder was trained with one, such as "query: ".
        dtype: of what is made, and stored.
        compute: of the encoder's weights; bfloat16 halves the memory of a large one.

    Raises:
        ConfigError: transformers is not installed, the encoder has other sizes, or nothing is asked for.
        CheckpointError: there is no encoder in that folder.
    """

    encoder: str | Path
    channels: Count
    max_length: Count = 77
    layer: Annotated[int, Le(-1)] = -1
    final_norm: bool = True
    padding: bool = False
    tokens: bool = True
    pooling: Pooling | None = None
    prefix: str = ""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    compute: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        check_sizes("TextEncoder", str(self.encoder), self.channels, self.max_length, self.layer)
        if not self.tokens and self.pooling is None:
            raise ConfigError("TextEncoder: expected tokens: true, or a pooling for the vector, found neither")

    @property
    def model(self) -> TextModel:
        return opened(str(self.encoder), *_COMPUTE[self.compute])

    @property
    def reads(self) -> str:
        return "caption"

    @property
    def parts(self) -> Mapping[str, Part]:
        found = {}
        if self.tokens:
            found["tokens"] = Part((self.max_length, self.channels), _TYPES[self.dtype], ragged=not self.padding)
        if self.pooling is not None:
            found["vector"] = Part((self.pooling.channels(self.model),), _TYPES[self.dtype])
        return found

    def describe(self) -> dict[str, Any]:
        settings = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "encoder"}
        settings["pooling"] = None if self.pooling is None else self.pooling.describe(self.model)
        return {"weights": self.model.weights, "tokenizer": self.model.vocabulary, **settings}

    @property
    def null_value(self) -> str:
        return ""

    def keep_null(self, made: Mapping[str, Tensor]) -> None:
        _kept_nulls[self] = made

    def encode(self, value: Any, device: torch.device) -> dict[str, Tensor]:
        kept = _kept_nulls.get(self) if value == self.null_value else None
        return dict(kept or _made(self, checked(value), device))

    def is_cut(self, value: Any) -> bool:
        """Whether a caption has more tokens than `max_length`."""
        return self.model.length(self.prefix + checked(value)) > self.max_length

    def release(self) -> None:
        self.model.release()


_kept_nulls: dict[TextEncoder, Mapping[str, Tensor]] = {}
"""What caches keep of the empty text: a configuration makes a feature for the cache, and an equal one for the model."""


def checked(caption: Any) -> str:
    """The caption; DataError unless it is a text that can be written down."""
    if not isinstance(caption, str):
        raise DataError(f"caption {caption!r:.60}: expected text, found {type(caption).__name__}")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"caption {ascii(caption)[:60]}: character {error.start} is half of a surrogate pair, which no text has; "
            f"it was decoded wrongly: write it anew, as UTF-8"
        ) from error
    return caption


@functools.lru_cache(maxsize=64)  # previews ask for the same ones again, when the encoder may be gone
def _made(feature: TextEncoder, caption: str, device: torch.device) -> dict[str, Tensor]:
    model = feature.model
    if feature.padding and not model.pads:
        raise ConfigError(f"TextEncoder: padding: the tokenizer of {model.folder} cannot pad; write padding: false")
    words = model.words(feature.prefix + caption, feature.max_length, feature.padding)
    tokens, output = model.hidden(words, feature.layer, feature.final_norm, device)
    made = {}
    if feature.tokens:
        made["tokens"] = _rounded(feature, tokens[0])
    if feature.pooling is not None:
        own = words["attention_mask"][0].bool()
        vector = feature.pooling(model, output[0, own.to(device)].float(), words["input_ids"][0, own].to(device))
        made["vector"] = _rounded(feature, vector)
    return made


def _rounded(feature: TextEncoder, made: Tensor) -> Tensor:
    """In the type of storage, on the CPU; ConfigError if that has no such numbers."""
    rounded = made.to("cpu", _TYPES[feature.dtype])
    if not rounded.isfinite().all():
        raise ConfigError(
            f"TextEncoder: dtype: {feature.encoder} makes numbers up to {made.abs().max():.0f}, which {feature.dtype} "
            f"does not hold; write float32, or final_norm: true"
        )
    return rounded


class FeatureText(nn.Module):
    """The caption as a feature: its tokens with their mask, and its vector, if it has one; null: of the text "".

    Where a batch has the feature's columns, because a cache keeps them, they are read, and the encoder's memory is
    given back; otherwise captions are encoded on the model's device.

    Args:
        feature: the encoder; with a cache of it, `${data.params.features.text}`.
        name: of the feature there, with which its columns in a batch begin.
    """

    keys: Sequence[str] = ("caption",)

    def __init__(self, feature: TextEncoder, name: str = "text") -> None:
        super().__init__()
        self.feature = feature
        self.name = name
        self.register_buffer("_place", torch.zeros(()), persistent=False)  # where the model is; nothing else is held
        self.register_load_state_dict_pre_hook(may_lack_hash)

    def forward(self, batch: Mapping[str, Any]) -> Conditioning:
        if held(self.feature, self.name, batch):
            self.feature.release()
        else:
            _require_captions(self, batch)
        return _conditioning(self.name, columns(self.feature, self.name, batch, self._device))

    def null(self, n: int) -> Conditioning:
        if self._device.type == "meta":
            return _conditioning(self.name, meta_columns(self.feature, self.name, n))
        null = _null(self.feature, self.name, self._device)
        slots = ((field.name, getattr(null, field.name)) for field in fields(null))
        return Conditioning(**{name: None if one is None else one.expand(n, *one.shape[1:]) for name, one in slots})

    def get_extra_state(self) -> Tensor:
        """The hashes of the encoder's weights and tokenizer, (64,) uint8; of a model without values zeros."""
        if self._device.type == "meta":
            return torch.zeros(64, dtype=torch.uint8, device="meta")
        return as_state(self.feature.model.weights + self.feature.model.vocabulary)

    def set_extra_state(self, state: Tensor | None) -> None:
        """CheckpointError if the encoder in the folder is another one than that of a checkpoint; None: not known."""
        if state is not None and not state.is_meta and self._device.type != "meta":
            model = self.feature.model
            require_same(model.folder, _WHAT, {"weights": model.weights, "tokenizer": model.vocabulary}, state)

    @property
    def _device(self) -> torch.device:
        return self.get_buffer("_place").device


@functools.cache
def _null(feature: TextEncoder, name: str, device: torch.device) -> Conditioning:
    """Of one row; the encoder is in memory afterwards only if it was before."""
    # Not in inference mode, even where the caller is: training could not use what is kept.
    with torch.inference_mode(False), feature.model.lent():
        return _conditioning(name, columns(feature, name, {feature.reads: [""]}, device))


def _conditioning(name: str, found: Mapping[str, Tensor]) -> Conditioning:
    tokens, vector = found.get(f"{name}.tokens"), found.get(f"{name}.vector")
    return Conditioning(
        vector=None if vector is None else vector.float(),
        tokens=None if tokens is None else tokens.float(),
        token_mask=found.get(f"{name}.tokens_mask"),
    )


class FrozenText(nn.Module):
    """The caption as tokens (N, `max_length`, `channels`), one for each place of the padded text; null: of the text "".

    Captions are cut and padded to `max_length` by the encoder's own tokenizer, and padding is a token like any other,
    as in Stable Diffusion. The encoder runs on the model's device in true float32, and in eval mode, and stays there:
    each batch is encoded as a whole, every time. What a cache can keep is FeatureText's.

    Args:
        encoder, channels, max_length, layer, final_norm: as in TextEncoder.

    Raises:
        ConfigError: transformers is not installed, or the encoder has other sizes.
        CheckpointError: there is no encoder in that folder.
    """

    keys: Sequence[str] = ("caption",)

    def __init__(
        self,
        encoder: str | Path,
        channels: Count,
        max_length: Count = 77,
        layer: Annotated[int, Le(-1)] = -1,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = str(encoder)
        self.channels = channels
        self.max_length = max_length
        self.layer = layer
        self.final_norm = final_norm
        self.register_buffer("_place", torch.zeros(()), persistent=False)  # where the model is; nothing else is held
        self.register_load_state_dict_pre_hook(may_lack_hash)
        check_sizes("FrozenText", self.encoder, channels, max_length, layer)

    def forward(self, batch: Mapping[str, Any]) -> Conditioning:
        _require_captions(self, batch)
        return Conditioning(tokens=self._encoded(batch["caption"]))

    def null(self, n: int) -> Conditioning:
        if self._device.type == "meta":
            return Conditioning(tokens=self._encoded([""] * n))
        return Conditioning(tokens=_of_empty(self._settings, self._device).expand(n, -1, -1))

    def get_extra_state(self) -> Tensor:
        """The hash of the encoder's weights, (32,) uint8; of a model without values zeros."""
        if self._device.type == "meta":
            return torch.zeros(32, dtype=torch.uint8, device="meta")
        return as_state(self._weights)

    def set_extra_state(self, state: Tensor | None) -> None:
        """CheckpointError if the encoder in the folder is another one than that of a checkpoint; None: not known."""
        if state is not None and not state.is_meta and self._device.type != "meta":
            require_same(self.encoder, _WHAT, {"weights": self._weights}, state)

    @property
    def _device(self) -> torch.device:
        return self.get_buffer("_place").device

    @property
    def _weights(self) -> str:
        model = opened(self.encoder)
        assert model.network is not None  # it is loaded once, and stays
        return model.weights

    @property
    def _settings(self) -> "_Settings":
        return _Settings(self.encoder, self.max_length, self.layer, self.final_norm)

    def _encoded(self, captions: Sequence[str]) -> Tensor:
        """(N, max_length, channels) float32."""
        if self._device.type == "meta":
            return torch.empty(len(captions), self.max_length, self.channels, device="meta")
        return _encoded(self._settings, [checked(caption) for caption in captions], self._device)


@dataclass(frozen=True)
class _Settings:
    """What, besides the caption and the device, decides the tokens of FrozenText."""

    encoder: str
    max_length: int
    layer: int
    final_norm: bool


@functools.cache
def _of_empty(settings: _Settings, device: torch.device) -> Tensor:
    """The tokens of "", (1, L, D)."""
    return _encoded(settings, [""], device)


def _encoded(settings: _Settings, captions: Sequence[str], device: torch.device) -> Tensor:
    """(N, L, D) float32 on `device`."""
    model = opened(settings.encoder)
    words = model.tokenizer(
        [*captions], padding="max_length", truncation=True, max_length=settings.max_length, return_tensors="pt"
    )
    return model.hidden(words, settings.layer, settings.final_norm, device)[0]


def _require_captions(conditioner: nn.Module, batch: Mapping[str, Any]) -> None:
    if "caption" not in batch:
        raise ConfigError(
            f"{type(conditioner).__name__}: the data set has no captions: write each picture's into a .txt of its "
            f"name, or use another conditioner"
        )
