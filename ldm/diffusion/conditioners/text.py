"""Captions as conditions, read by a trained text encoder of the package transformers that stays as it is.

The encoder is no part of the model: its weights are not trained, averaged, sharded or saved. A configuration names its
folder, and a checkpoint holds the hash of its weights, which is compared whenever the checkpoint is loaded. Every
process loads it once, however many conditioners read it.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Le
from torch import Tensor, nn

from ldm.diffusion.conditioners.base import Conditioning
from ldm.errors import CheckpointError, ConfigError
from ldm.ranges import Count
from ldm.runtime.full_precision import full_precision
from ldm.weights.digest import weight_hash

_HASH = "_extra_state"
"""The key under which torch puts a module's extra state."""


class FrozenText(nn.Module):
    """The caption as tokens (N, `max_length`, `channels`), one for each place of the padded text; null: of the text "".

    Captions are cut and padded to `max_length` by the encoder's own tokenizer, and padding is a token like any other,
    as in Stable Diffusion. The encoder runs on the model's device in true float32, and in eval mode.

    Args:
        encoder: folder with `config.json`, weights and tokenizer of a CLIP, T5 or BERT-like model; where it is the
            `text_encoder` of a pipeline of diffusers, the tokenizer may lie in `tokenizer` beside it. Nothing is
            downloaded.
        channels: width of the encoder's tokens, which is the network's `context_dim`.
        max_length: tokens of a caption.
        layer: -1: the encoder's output; -2: the hidden states before its last layer ("clip skip"), and so on.
        final_norm: of an earlier layer: its hidden states pass through the encoder's last norm, as in Stable Diffusion
            2 and OpenCLIP; False: as they are, as in SDXL.

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
        self.register_load_state_dict_pre_hook(_may_lack_hash)
        _check_sizes(self.encoder, channels, max_length, layer)

    def forward(self, batch: Mapping[str, Any]) -> Conditioning:
        if "caption" not in batch:
            raise ConfigError(
                "FrozenText: the data set has no captions: write each picture's into a .txt of its name, or use "
                "another conditioner"
            )
        return Conditioning(tokens=self._encoded(batch["caption"]))

    def null(self, n: int) -> Conditioning:
        if self._device.type == "meta":
            return Conditioning(tokens=self._encoded([""] * n))
        return Conditioning(tokens=_of_empty(self._settings, self._device).expand(n, -1, -1))

    def get_extra_state(self) -> Tensor:
        """The hash of the encoder's weights, (32,) uint8; of a model without values zeros."""
        if self._device.type == "meta":
            return torch.zeros(32, dtype=torch.uint8, device="meta")
        return torch.tensor([*bytes.fromhex(opened(self.encoder).weights)], dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor | None) -> None:
        """CheckpointError if the encoder in the folder is another one than that of a checkpoint; None: not known."""
        if state is None or state.is_meta or self._device.type == "meta":
            return
        found, expected = opened(self.encoder).weights, bytes(state.tolist()).hex()
        if found != expected:
            raise CheckpointError(
                f"{self.encoder}: not the text encoder that this model was trained with: weights {found[:16]}..., "
                f"expected {expected[:16]}.... Put that encoder into the folder."
            )

    @property
    def _device(self) -> torch.device:
        return self.get_buffer("_place").device

    @property
    def _settings(self) -> "_Settings":
        return _Settings(self.encoder, self.max_length, self.layer, self.final_norm)

    def _encoded(self, captions: Sequence[str]) -> Tensor:
        """(N, max_length, channels) float32."""
        if self._device.type == "meta":
            return torch.empty(len(captions), self.max_length, self.channels, device="meta")
        return _encoded(self._settings, captions, self._device)


@dataclass(frozen=True)
class _Settings:
    """What, besides the caption and the device, decides the tokens."""

    encoder: str
    max_length: int
    layer: int
    final_norm: bool


@dataclass(frozen=True)
class TextEncoder:
    """A loaded encoder.

    Attributes:
        network: frozen, float32, in eval mode.
        tokenizer: of transformers.
        weights: sha256 (hex) of its parameters.
        masked: whether padding is hidden from the network. CLIP's words never see what follows them, so that nothing
            is to be hidden; where every word sees all others, padding would change them.
    """

    network: nn.Module
    tokenizer: Any
    weights: str
    masked: bool


@functools.cache
def opened(folder: str) -> TextEncoder:
    """The encoder in a folder, on the CPU; loaded by the first call.

    Raises:
        CheckpointError: it cannot be read, or lacks weights.
    """
    import transformers

    kind = _kind(_config(folder))
    with _reading(folder), torch.device("cpu"), _quiet():
        network, info = kind.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(_tokenizer_folder(folder), local_files_only=True)
    # A pooler, which sentence encoders may come without, has no part in the tokens.
    lacking = sorted(str(name) for name in [*info["missing_keys"], *info["mismatched_keys"]])
    if lacking := [name for name in lacking if "pooler." not in name]:
        raise CheckpointError(f"{folder}: {len(lacking)} weights are missing or of another shape, such as {lacking[0]}")
    network.requires_grad_(False).eval()
    return TextEncoder(network, tokenizer, _hash(network), not isinstance(network, transformers.CLIPTextModel))


def _hash(network: nn.Module) -> str:
    """Of all tensors without their names, which differ between versions of transformers."""
    tensors = [tensor for name, tensor in network.named_parameters() if "pooler." not in name]
    return sha256("".join(sorted(weight_hash({"": tensor}) for tensor in tensors)).encode()).hexdigest()


@functools.cache
def _of_empty(settings: _Settings, device: torch.device) -> Tensor:
    """The tokens of "", (1, L, D)."""
    return _encoded(settings, [""], device)


def _encoded(settings: _Settings, captions: Sequence[str], device: torch.device) -> Tensor:
    """(N, L, D) float32 on `device`."""
    encoder = opened(settings.encoder)
    words = encoder.tokenizer(
        [*captions], padding="max_length", truncation=True, max_length=settings.max_length, return_tensors="pt"
    )
    # Not in inference mode, even where the caller is: training could not use tokens that are kept for later.
    with torch.inference_mode(False), torch.no_grad(), full_precision(device.type):
        network = encoder.network.to(device)
        mask = words["attention_mask"].to(device) if encoder.masked else None
        last = settings.layer == -1
        found = network(input_ids=words["input_ids"].to(device), attention_mask=mask, output_hidden_states=not last)
        if last:
            tokens: Tensor = found.last_hidden_state
        else:
            tokens = found.hidden_states[settings.layer]
            if settings.final_norm and (norm := _final_norm(network)) is not None:
                tokens = norm(tokens)
    return tokens


def _final_norm(network: nn.Module) -> nn.Module | None:
    """The norm after the last layer; None: the layers of BERT and its kin end with their own."""
    return next((module for name, module in network.named_modules() if name.endswith("final_layer_norm")), None)


def _check_sizes(folder: str, channels: int, max_length: int, layer: int) -> None:
    """ConfigError unless the encoder in the folder has these sizes; reads its description alone."""
    config = _config(folder)
    if config.hidden_size != channels:
        raise ConfigError(
            f"FrozenText: channels: the tokens of {folder} are {config.hidden_size} wide, found {channels}; "
            f"write {config.hidden_size}, also as the network's context_dim"
        )
    longest = config.to_dict().get("max_position_embeddings")  # T5 has no limit
    if longest is not None and max_length > longest:
        raise ConfigError(f"FrozenText: max_length: {folder} reads up to {longest} tokens, found {max_length}")
    if -layer > config.num_hidden_layers:
        raise ConfigError(f"FrozenText: layer: {folder} has {config.num_hidden_layers} layers, found {layer}")


@functools.cache
def _config(folder: str) -> Any:
    """The description of the text encoder in a folder; of a whole CLIP that of its text half."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"FrozenText: needs the package {error.name}: pip install -e .[interop]") from error
    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: no text encoder: expected a folder with config.json, its weights and its tokenizer. "
            f"Put the one there that this configuration means, or name another."
        )
    with _reading(folder):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        return config.get_text_config()


def _kind(config: Any) -> Any:
    """The class of transformers that encodes texts with such a model."""
    import transformers

    known = transformers.models.auto.modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING
    return known.get(type(config), transformers.AutoModel)


def _tokenizer_folder(folder: str) -> Path:
    """The folder itself, or that of a pipeline of diffusers: `tokenizer_2` beside `text_encoder_2`."""
    path = Path(folder)
    beside = path.with_name(path.name.replace("text_encoder", "tokenizer"))
    return beside if not (path / "tokenizer_config.json").is_file() and beside.is_dir() else path


@contextmanager
def _reading(folder: str) -> Iterator[None]:
    """Within the block, whatever transformers raises is a CheckpointError of the folder."""
    try:
        yield
    except Exception as error:  # transformers, tokenizers and safetensors have classes of their own
        raise CheckpointError(f"{folder}: cannot be read as a text encoder: {' '.join(str(error).split())}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block transformers does not list what in a file is of no use here, such as CLIP's pictures."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _may_lack_hash(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Weights of others name no encoder: then there is nothing to compare."""
    state_dict.setdefault(f"{prefix}{_HASH}", None)
